"""How ``torch.distributed`` makes process groups inside a run.

Torch's own ``init_process_group`` and ``new_group`` run unchanged; only the function that builds one group is replaced,
and what asks for hardware.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from lightrft.errors import RefusedError
from lightrft.sim.calls import Group
from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch
from lightrft.sim.process_group import SimProcessGroup
from lightrft.sim.profiles import profile_for

if TYPE_CHECKING:
    from lightrft.sim.rank import SimRank

__all__ = ["patches"]

_KNOWN = {"nccl", "gloo", "undefined", "fake"}


def _helper(original: Any) -> Any:
    def new_process_group_helper(
        group_size: int,
        group_rank: int | None,
        global_ranks_in_group: list[int],
        backend: Any,
        store: Any,
        group_name: Any,
        backend_options: Any = None,
        timeout: timedelta | None = None,
        pg_tag: str | None = None,
        device_id: torch.device | None = None,
        group_desc: str | None = None,
        **rest: Any,
    ) -> Any:
        task = current_task()
        if task is None or str(backend) == "fake":
            return original(
                group_size,
                group_rank,
                global_ranks_in_group,
                backend,
                store,
                group_name,
                backend_options=backend_options,
                timeout=timeout,
                pg_tag=pg_tag,
                device_id=device_id,
                group_desc=group_desc,
                **rest,
            )
        return _make_group(
            task.rank,
            group_size,
            global_ranks_in_group,
            backend,
            store,
            group_name,
            timeout,
            pg_tag,
            device_id,
            group_desc,
        )

    return new_process_group_helper


def _make_group(
    rank: SimRank,
    size: int,
    members: list[int],
    backend: Any,
    store: Any,
    name: str,
    timeout: timedelta | None,
    tag: str | None,
    device: torch.device | None,
    description: str | None,
) -> Any:
    _check_backend(str(backend))
    tables = rank.tables()
    if name in tables.pg_names.values():
        raise ValueError("The specified group name has already been created, please use a different group name")
    c10d._check_valid_timeout(timeout)
    if tag:
        existing = c10d._find_pg_by_ranks_and_tag(f"user:{tag}", members)
        if existing is not None:
            return existing, tables.pg_map[existing][1]
    if members and name.isdigit():  # a hashed name: made with use_local_synchronization, by the members alone
        rank.world.note_creation(rank, tuple(members), str(backend))
    if members and rank.index not in members:
        return c10d.GroupMember.NON_GROUP_MEMBER, None
    ranks = tuple(members) or tuple(range(size))
    prefixed = c10d.PrefixStore(f"{name}/", store)
    pg = build(rank, name, ranks, str(backend), timeout, description, prefixed)
    pg.bound_device_id = device
    rank.touched(f"made {pg._group.title}")
    register(pg, rank, str(backend), prefixed, f"user:{tag}" if tag else None)
    return pg, prefixed


def _check_backend(backend: str) -> None:
    names = {part.rpartition(":")[2] for part in backend.split(",")}
    unknown = names - _KNOWN
    if unknown:
        raise RefusedError(
            f"backend {backend!r}: simulated ranks know nccl, gloo and pairs such as 'cpu:gloo,cuda:nccl', not "
            f"{', '.join(sorted(unknown))}"
        )


def build(
    rank: SimRank,
    name: str,
    ranks: tuple[int, ...],
    backend: str,
    timeout: timedelta | None,
    description: str | None,
    store: Any,
) -> SimProcessGroup:
    """The handle of ``rank`` for the group of this name; the group itself is made by whoever comes first."""
    world = rank.world
    limit = round((timeout or timedelta(minutes=30)).total_seconds() * 1e9)
    epoch = rank.count_group(name)
    group = world.groups.get((name, epoch, ranks))
    if group is None:
        group = world.groups[name, epoch, ranks] = Group(name, ranks, backend, limit, description or "undefined")
    return SimProcessGroup(rank, group, profile_for(world.profile, backend), store)


def register(pg: SimProcessGroup, rank: SimRank, backend: str, store: Any, tag: str | None) -> None:
    """Enter a new group into the rank's tables, as torch does."""
    tables = rank.tables()
    name = pg.group_name
    tables.pg_map[pg] = (backend, store)
    tables.pg_names[pg] = name
    tables.pg_backend_config[pg] = str(c10d.BackendConfig(c10d.Backend(backend)))
    c10d._register_process_group(name, pg)  # type: ignore[attr-defined,arg-type]
    if tag is None:
        tables.tags_to_pg.setdefault("", []).append(pg)
        tag = f"ptd:{name}"
    tables.tags_to_pg.setdefault(tag, []).append(pg)
    tables.pg_to_tag[pg] = tag
    rank.handles.append(pg)


def _split_group(original: Any) -> Any:
    @functools.wraps(original)
    def split_group(
        parent_pg: Any = None,
        split_ranks: list[list[int]] | None = None,
        timeout: timedelta | None = None,
        pg_options: Any = None,
        group_desc: str | None = None,
        **rest: Any,
    ) -> Any:
        task = current_task()
        if task is None:
            return original(parent_pg, split_ranks, timeout, pg_options, group_desc, **rest)
        if not split_ranks:
            raise ValueError("split_ranks cannot be None or empty")
        default: Any = c10d._get_default_group()
        if default.bound_device_id is None:
            raise RefusedError(
                "split_group: the default group is bound to no device; call init_process_group(device_id=...)"
            )
        parent: Any = parent_pg or default
        return _split(task.rank, parent, split_ranks, timeout, group_desc)

    return split_group


def _split(
    rank: SimRank,
    parent: SimProcessGroup,
    split_ranks: list[list[int]],
    timeout: timedelta | None,
    description: str | None,
) -> Any:
    for members in split_ranks:
        if not members:
            raise ValueError("the split group cannot be empty")
        if len(members) != len(set(members)):
            raise ValueError("the split group cannot have duplicate ranks")
        if len(members) > parent.size():
            raise ValueError(
                "the split group's size should be less or equal to the world_size set by init_process_group"
            )
        if not all(0 <= member < parent.size() for member in members):
            raise ValueError(f"{members} holds a rank that the parent group, of size {parent.size()}, does not have")
    tables = rank.tables()
    to_global = parent._group.ranks
    mine = next((sorted(members) for members in split_ranks if parent.rank() in members), None)
    number = parent.meet_split(tuple(tuple(sorted(members)) for members in split_ranks))
    if mine is None:
        return None
    ranks = tuple(to_global[member] for member in mine)
    # torch would hash in how many groups this rank has, which its fellow members need not have
    name = f"{parent.group_name}:split{number}:{'_'.join(map(str, ranks))}"
    backend, store = tables.pg_map[parent]
    timeout = timeout or c10d._get_default_timeout(backend)
    prefixed = c10d.PrefixStore(f"{name}/", store)
    pg = build(rank, name, ranks, str(backend), timeout, description or f"{parent.group_desc}:split", prefixed)
    pg.bound_device_id = parent.bound_device_id
    register(pg, rank, str(backend), prefixed, None)
    tables.pg_group_ranks[pg] = {member: position for position, member in enumerate(ranks)}
    return pg


def _init(original: Any) -> Any:
    @functools.wraps(original)
    def init_process_group(
        backend: Any = None,
        init_method: Any = None,
        timeout: Any = None,
        world_size: int = -1,
        rank: int = -1,
        store: Any = None,
        group_name: str = "",
        pg_options: Any = None,
        device_id: Any = None,
        **rest: Any,
    ) -> None:
        task = current_task()
        device = None
        if task is not None and device_id is not None:
            device = torch.device("cuda", device_id) if isinstance(device_id, int) else torch.device(device_id)
            device_id = None
        original(
            backend=backend,
            init_method=init_method,
            timeout=timeout,
            world_size=world_size,
            rank=rank,
            store=store,
            group_name=group_name,
            pg_options=None if task is not None else pg_options,
            device_id=device_id,
            **rest,
        )
        if device is not None:
            c10d._get_default_group().bound_device_id = device

    return init_process_group


def _set_timeout(original: Any) -> Any:
    def set_pg_timeout(timeout: timedelta, group: Any = None) -> None:
        if current_task() is None:
            original(timeout, group)
            return
        group = c10d._get_default_group() if group is None else group
        if c10d._rank_not_in_group(group):
            raise ValueError("Invalid process group specified")
        group.set_timeout(timeout)

    return set_pg_timeout


class _NCCL:
    """``ProcessGroupNCCL`` for builds of torch without it: no group is one, and its options have no effect."""

    class Options:
        """Takes every option."""

        def __init__(self, **options: Any) -> None:
            self.config = SimpleNamespace()
            vars(self).update(options)


def _or_placeholder(original: Any) -> Any:
    return original or _NCCL


def _true_in_rank(original: Any) -> Any:
    def available() -> bool:
        return True if current_task() is not None else bool(original())

    available.__name__ = original.__name__
    return available


def _default_timeout(original: Any) -> Any:
    def default_timeout(backend: Any) -> Any:
        if current_task() is None:
            return original(backend)
        return timedelta(minutes=10) if str(backend) == "nccl" else timedelta(minutes=30)

    return default_timeout


def _patches() -> list[Patch]:
    return [
        Patch(c10d, "_new_process_group_helper", _helper),
        Patch(c10d, "init_process_group", _init),
        Patch(c10d, "split_group", _split_group),
        Patch(c10d, "_get_default_timeout", _default_timeout),
        Patch(c10d, "_set_pg_timeout", _set_timeout),
        Patch(c10d, "ProcessGroupNCCL", _or_placeholder),
        Patch(dist, "ProcessGroupNCCL", _or_placeholder),
        Patch(c10d, "is_nccl_available", _true_in_rank),
        Patch(c10d, "is_gloo_available", _true_in_rank),
    ]


_PATCHES = _patches()


def patches() -> list[Patch]:
    """The replacements inside :mod:`torch.distributed`."""
    return _PATCHES
