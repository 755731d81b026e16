"""What the simulator computes for nccl is what nccl computes, on as many ranks as there are GPUs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import all_gather_single, reduce_scatter_single
from torch import multiprocessing

from lightrft.sim import SimWorld

pytestmark = pytest.mark.gpu


def collective_results(device: str) -> list[torch.Tensor]:
    """Collectives on whole numbers, which every order of adding sums exactly; this rank's results, on the CPU."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def own(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        count = int(torch.tensor(shape).prod())
        return (torch.arange(count).reshape(shape) + 100 * rank).to(device=device, dtype=dtype)

    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX):
            tensor = own(3, 4, dtype=dtype) % 8
            dist.all_reduce(tensor, op=op)
            results.append(tensor)
    average = own(4)
    dist.all_reduce(average, op=dist.ReduceOp.AVG)
    copied = own(5)
    dist.broadcast(copied, src=size - 1)
    gathered = torch.empty(size * 6, device=device)
    all_gather_single(gathered, own(6))
    scattered = torch.empty(2, device=device)
    reduce_scatter_single(scattered, own(2 * size))
    exchanged = torch.empty(size * 2, device=device)
    dist.all_to_all_single(exchanged, own(size * 2))
    received = torch.empty(3, device=device)
    peers = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, own(3), (rank + 1) % size),
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
        ]
    )
    for work in peers:
        work.wait()
    objects: list[object] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(size)]
    results += [average, copied, gathered, scattered, exchanged, received]
    return [result.cpu() for result in results]


def run_process(rank: int, size: int, port: int, folder: str, backend: str) -> None:
    """One real rank: its results go to a file of its own."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = "cpu"
    if backend == "nccl":
        torch.cuda.set_device(rank)
        device = "cuda"
    dist.init_process_group(backend)
    torch.save(collective_results(device), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run_processes(size: int, folder: Path, backend: str) -> list[list[torch.Tensor]]:
    """The results of real ranks, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run_process, args=(size, port, str(folder), backend), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def run_simulated(size: int) -> list[list[torch.Tensor]]:
    """The results of simulated ranks, by rank."""

    def run() -> list[torch.Tensor]:
        dist.init_process_group("nccl")
        results = collective_results("cuda")
        dist.destroy_process_group()
        return results

    return SimWorld(size, profile="nccl", strict=True).run(run)


def test_simulated_collectives_equal_those_of_nccl(tmp_path: Path, gpus: int) -> None:
    for real, simulated in zip(run_processes(gpus, tmp_path, "nccl"), run_simulated(gpus), strict=True):
        torch.testing.assert_close(simulated, real, rtol=0, atol=0)


def test_simulated_ranks_leave_the_gpus_alone(gpus: int) -> None:
    """On a machine with GPUs, tensors of simulated ranks stay on the CPU all the same."""

    def run() -> str:
        dist.init_process_group("nccl")
        tensor = torch.ones(2, device="cuda")
        dist.all_reduce(tensor)
        dist.destroy_process_group()
        return tensor.device.type

    before = [torch.cuda.memory_allocated(index) for index in range(gpus)]
    assert SimWorld(4).run(run) == ["cpu"] * 4
    assert [torch.cuda.memory_allocated(index) for index in range(gpus)] == before
