"""Who this process is: rank, world and rendezvous, from torchrun's or Slurm's variables, or alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightrft.errors import ConfigError

__all__ = ["RankEnvironment", "first_host", "initialise"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RANKS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_FIRST_PORT = 10000
_PORTS = 20000
"""Ports derived from a job's id end below 32768, where Linux begins to give ports to outgoing connections."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankEnvironment:
    """The place of one process among all processes of a run.

    Attributes:
        rank: number among all processes, from 0.
        world_size: number of processes.
        local_rank: number among the processes of this machine, from 0.
        master_addr: where rank 0 listens; empty for a process alone.
        master_port: its port; 0 for a process alone.
        source: who said so: ``torchrun``, ``slurm`` or ``alone``.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = ""
    master_port: int = 0
    source: str = "alone"

    @classmethod
    def read(
        cls, environ: Mapping[str, str], *, gpus_per_node: int | None = None, local_rank: int | None = None
    ) -> RankEnvironment:
        """Read the variables of a launcher.

        torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) come first, as torchrun may itself
        run under Slurm. Then those of a process that ``srun`` started, recognised by SLURM_PROCID: the address is the
        first host of the list of nodes and the port follows from the job's id, unless MASTER_ADDR and MASTER_PORT say
        otherwise. With none of these the process is alone.

        Args:
            environ: ``os.environ``, usually.
            gpus_per_node: processes on a machine; gives the local rank where neither a variable nor ``local_rank``
                does.
            local_rank: where no variable says it, as launchers pass it on the command line. A process alone takes it
                too.

        Raises:
            ConfigError: a variable is missing while others are set, is no number, or contradicts another.
        """
        if gpus_per_node is not None and (type(gpus_per_node) is not int or gpus_per_node < 1):
            raise ConfigError(f"num_gpu_per_node={gpus_per_node!r}: expected a number of at least 1, or None")
        present = {name: value for name, value in environ.items() if value != ""}
        if any(name in present for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            found = _from_torchrun(present, gpus_per_node, local_rank)
        elif "SLURM_PROCID" in present:
            found = _from_slurm(present, gpus_per_node, local_rank)
        elif "MASTER_ADDR" in present or "MASTER_PORT" in present:
            found = _from_torchrun(present, gpus_per_node, local_rank)
        else:
            found = cls(local_rank=local_rank or 0)
        found._check()
        return found

    def _check(self) -> None:
        if self.source == "alone":
            return
        rank, world_size, local_rank = _RANKS[self.source]
        if self.world_size < 1:
            raise ConfigError(f"{world_size}={self.world_size}: expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"{rank}={self.rank} with {world_size}={self.world_size}: expected 0 to world size - 1")
        if not 0 <= self.local_rank <= self.rank:
            raise ConfigError(f"{local_rank}={self.local_rank} with {rank}={self.rank}: expected 0 to the rank")
        if not 0 < self.master_port < 1 << 16:
            raise ConfigError(f"MASTER_PORT={self.master_port}: expected a port from 1 to 65535")

    def device_index(self, visible: int) -> int:
        """Which of ``visible`` GPUs is this process's: the local rank, or the only one if the launcher shows just one.

        Raises:
            ConfigError: the machine has fewer GPUs than processes.
        """
        if visible == 1:
            return 0
        if self.local_rank < visible:
            return self.local_rank
        raise ConfigError(
            f"local rank {self.local_rank} needs its own GPU, and {visible} are visible: start as many processes on a "
            "machine as it has GPUs"
        )


def _from_torchrun(environ: Mapping[str, str], gpus_per_node: int | None, given: int | None) -> RankEnvironment:
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        there = [name for name in (*_TORCHRUN, "LOCAL_RANK") if name in environ]
        raise ConfigError(
            f"{', '.join(there)} set and {', '.join(missing)} missing: start with torchrun, which sets all of "
            f"{', '.join(_TORCHRUN)}, or unset them to run one process alone"
        )
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    local_rank = _local_rank(environ, "LOCAL_RANK", rank, world_size, gpus_per_node, given)
    if "LOCAL_WORLD_SIZE" in environ and local_rank >= (size := _number(environ, "LOCAL_WORLD_SIZE")):
        raise ConfigError(f"LOCAL_RANK={local_rank} with LOCAL_WORLD_SIZE={size}: expected a lower local rank")
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        master_addr=environ["MASTER_ADDR"],
        master_port=_number(environ, "MASTER_PORT"),
        source="torchrun",
    )


def _from_slurm(environ: Mapping[str, str], gpus_per_node: int | None, given: int | None) -> RankEnvironment:
    rank = _number(environ, "SLURM_PROCID")
    world_size = _number(environ, "SLURM_NTASKS")
    nodes = next((environ[name] for name in _NODE_LISTS if name in environ), "")
    if not nodes and "MASTER_ADDR" not in environ:
        raise ConfigError("SLURM_PROCID is set and SLURM_NODELIST is missing: set it, or MASTER_ADDR")
    if "SLURM_JOB_ID" not in environ and "MASTER_PORT" not in environ:
        raise ConfigError("SLURM_PROCID is set and SLURM_JOB_ID is missing: set it, or MASTER_PORT")
    port = (
        _number(environ, "MASTER_PORT")
        if "MASTER_PORT" in environ
        else _FIRST_PORT + _number(environ, "SLURM_JOB_ID") % _PORTS
    )
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=_local_rank(environ, "SLURM_LOCALID", rank, world_size, gpus_per_node, given),
        master_addr=environ.get("MASTER_ADDR") or first_host(nodes),
        master_port=port,
        source="slurm",
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise ConfigError(f"{name} is missing while other variables of the launcher are set: set it")
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"{name}={environ[name]!r}: expected an integer") from None


def _local_rank(
    environ: Mapping[str, str], name: str, rank: int, world_size: int, gpus_per_node: int | None, given: int | None
) -> int:
    if name in environ or given is not None:
        name, local_rank = (name, _number(environ, name)) if name in environ else ("local_rank", given or 0)
        if gpus_per_node is not None and local_rank >= gpus_per_node:
            raise ConfigError(f"{name}={local_rank} with num_gpu_per_node={gpus_per_node}: expected a lower local rank")
        return local_rank
    if gpus_per_node is not None:
        return rank % gpus_per_node
    if world_size == 1:
        return 0
    raise ConfigError(f"{name} is missing in a world of {world_size}: set it, or give local_rank or num_gpu_per_node")


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's notation, e.g. ``node003`` of ``node[003-006,9],x1``.

    Raises:
        ConfigError: the list does not read as one.
    """
    match = re.match(r"(?:[^\[\],\s]|\[[^\[\]\s]+\])+", nodes)  # commas in brackets do not end a host
    first = match.group() if match else ""
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)
    if not host or "[" in host or nodes[len(first) :][:1] not in ("", ","):
        raise ConfigError(f"SLURM_NODELIST={nodes!r}: expected a list such as node[003-006,9],x1; or set MASTER_ADDR")
    return host


def initialise(
    environment: RankEnvironment,
    backend: str,
    timeout: timedelta | None = None,
    device: torch.device | None = None,
) -> bool:
    """Make the default process group, unless there is one.

    Args:
        environment: who this process is. Alone, it needs no port and no variable.
        backend: such as ``gloo``, ``nccl``, ``cpu:gloo,cuda:nccl``.
        timeout: of collectives; the backend's own if None.
        device: the device of this process. A CUDA device becomes the current one, and the group is bound to it.

    Returns:
        whether this call made the group, and its caller should destroy it.

    Raises:
        ConfigError: ``timeout`` is no positive ``timedelta``.
    """
    if timeout is not None and (type(timeout) is not timedelta or timeout <= timedelta(0)):
        raise ConfigError(f"timeout={timeout!r}: expected a positive datetime.timedelta, or None")
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return False
    bound = device if device is not None and device.type == "cuda" and "nccl" in backend else None
    where: dict[str, Any] = {"store": dist.HashStore()}  # type: ignore[attr-defined]
    if environment.source != "alone":
        host = f"[{environment.master_addr}]" if ":" in environment.master_addr else environment.master_addr
        where = {"init_method": f"tcp://{host}:{environment.master_port}"}
    dist.init_process_group(
        backend, rank=environment.rank, world_size=environment.world_size, timeout=timeout, device_id=bound, **where
    )
    return True
