"""What ``torch.distributed`` asks a process group about itself."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightrft.errors import RefusedError
from lightrft.sim.places import caller_place

if TYPE_CHECKING:
    from lightrft.sim.calls import Group
    from lightrft.sim.profiles import Profile
    from lightrft.sim.rank import SimRank

__all__ = ["GroupHandle"]

_CPU, _CUDA = torch.device("cpu"), torch.device("cuda")


def _device_types(backend: str) -> list[torch.device]:
    if backend == "nccl":
        return [_CUDA]
    if ":" in backend:
        return [torch.device(part.partition(":")[0]) for part in backend.split(",")]
    return [_CPU, _CUDA]


class GroupHandle(dist.ProcessGroup):
    """One rank's handle of a :class:`~lightrft.sim.calls.Group`; it stands for the group's backends as well."""

    supports_splitting = True
    supports_coalescing = False
    """Batches are posted one by one, without blocking."""
    supports_time_estimate = False
    supports_shrinking = False

    def __init__(self, rank: SimRank, group: Group, profile: Profile, store: Any) -> None:
        self._member = group.ranks.index(rank.index)
        super().__init__(self._member, group.size)  # type: ignore[call-arg]
        self._rank = rank
        self._world = rank.world
        self._group = group
        self._profile = profile
        self._store = store
        self._sequence = 0
        self._bound_device: torch.device | None = None
        self._types = _device_types(group.backend)
        self.closed = False
        self.made_at = caller_place(3)

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """The name torch gave the group."""
        return self._group.name

    @property
    def group_desc(self) -> str:
        """The description given when the group was made."""
        return self._group.description

    @property
    def bound_device_id(self) -> torch.device | None:
        """The device given to ``init_process_group(device_id=...)``."""
        return self._bound_device

    @bound_device_id.setter
    def bound_device_id(self, device: torch.device | None) -> None:
        self._bound_device = device

    @property
    def _device_types(self) -> list[torch.device]:
        return self._types

    @property
    def options(self) -> Any:
        """No backend options."""
        return None

    def supports_tensor_alloc(self, device: Any) -> bool:  # noqa: ARG002
        """Memory comes from PyTorch's allocator."""
        return False

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """A name of our own: for ``gloo`` C++ would ask the real backend for its devices."""
        return "simulated"

    def name(self) -> str:
        """The backend the group was made with."""
        return self._group.backend

    def _get_backend_name(self) -> str:
        return self._group.backend

    def _get_backend(self, device: Any) -> Any:  # noqa: ARG002
        return self

    def _has_hooks(self) -> bool:
        return False

    def _set_sequence_number_for_group(self) -> None:
        """Sequence numbers always agree at the start."""

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def get_group_store(self) -> Any:
        """The store of the group."""
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:
        """Change how long a collective may wait for its members, in virtual time."""
        self._group.timeout = round(timeout.total_seconds() * 1e9)

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """The group takes no more calls.

        Raises:
            RefusedError: collectives were recorded by a coalescing manager that failed; they never ran.
        """
        self.closed = True
        self._rank.touched(f"destroyed {self._group.title}")
        lost = self._rank.tables().pg_coalesce_state.get(self)
        if lost and sys.exc_info()[0] is None:
            raise RefusedError(
                f"{len(lost)} collectives were only recorded, and never ran: a coalescing manager on this group ended "
                "with an exception, and torch silently records every later collective of the group"
            )

    abort = shutdown

    def __repr__(self) -> str:
        return (
            f"<simulated {self._group.backend} group {self._group.name!r}, rank {self._member} of {self._group.size}>"
        )
