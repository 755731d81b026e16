"""One simulated rank: what a process is to torchrun."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightrft.sim import places, works
from lightrft.sim.accelerator import DeviceState

if TYPE_CHECKING:
    from lightrft.sim.calls import Call, Group
    from lightrft.sim.process_group import SimProcessGroup
    from lightrft.sim.rank_state import GroupTables, ProcessState
    from lightrft.sim.scheduler import Task
    from lightrft.sim.works import SimWork
    from lightrft.sim.world import SimWorld

__all__ = ["SimRank"]


class SimRank:
    """One simulated process.

    Attributes:
        index: global rank.
        local_rank: rank on its node.
        state: its process-global state while another rank runs.
        accelerator: its simulated GPU.
        outstanding: asynchronous operations it has not waited for.
        abandoned: those of them that it had not waited for when it ended.
        handles: its process groups, in order of creation.
    """

    def __init__(self, world: SimWorld, index: int, state: ProcessState, gpus_per_node: int, cuda: bool) -> None:
        self.world = world
        self.index = index
        self.local_rank = index % gpus_per_node
        self.state = state
        self.accelerator = DeviceState(self.local_rank, gpus_per_node, cuda_available=cuda)
        self.outstanding: dict[SimWork, None] = {}
        self.abandoned: list[SimWork] = []
        self.handles: list[SimProcessGroup] = []
        self.threads: list[Task] = []
        self.main: Task | None = None
        self.creations: list[tuple[tuple[int, ...], str, places.Place]] = []
        self.latest_call: Call | None = None
        self.last: tuple[Call | None, str, places.Place] = (None, "made no call at all", places.UNKNOWN)
        self._group_epochs: dict[str, int] = {}
        self._messages: dict[Group, int] = {}

    def blocked_task(self) -> Task | None:
        """The task that stands for the rank in a report: its main one, or a thread that outlives it."""
        if self.main is not None and not self.main.finished:
            return self.main
        return next((task for task in self.threads if not task.finished), self.main)

    def touched(self, what: str) -> None:
        """The rank did something to a group that is no call: the last thing it did, until its next call."""
        self.last = (self.latest_call, what, places.caller_place(2))

    def last_place(self) -> places.Place:
        """The line of the last thing the rank did to a group."""
        call, _, place = self.last
        return place if self.latest_call is call or self.latest_call is None else self.latest_call.place

    def tables(self) -> GroupTables:
        """The rank's tables of ``torch.distributed``; call it only while the rank runs."""
        world: GroupTables = torch.distributed.distributed_c10d._world  # type: ignore[assignment]
        return world

    def count_group(self, name: str) -> int:
        """How often this rank has made a group of this name before: a destroyed group may come again."""
        epoch = self._group_epochs.get(name, 0)
        self._group_epochs[name] = epoch + 1
        return epoch

    def count_message(self, group: Group) -> int:
        """Number of the next send or receive on ``group``."""
        self._messages[group] = self._messages.get(group, 0) + 1
        return self._messages[group]

    def let_go(self) -> None:
        """The calling thread, one of the rank's, ends, and will wait for nothing any more."""
        works.let_go([*self.outstanding, *self.abandoned])

    def adopt_groups(self) -> None:
        """Make the rank's groups known to C++ on the calling thread."""
        for pg in self.handles:
            if not pg.closed:
                torch._C._distributed_c10d._register_process_group(pg.group_name, pg)  # type: ignore[arg-type]
