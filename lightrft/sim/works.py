"""Handles of operations under way, and what keeps an asynchronous one honest.

The outputs of an asynchronous operation hold poison until ``wait()`` (NaN, or the most negative integer), so that
reading them early shows. Its inputs are copied when it is issued and compared at ``wait()``: changing them in between is
an error, as it would corrupt the data on a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.errors import RefusedError
from lightrft.sim.current import _local

if TYPE_CHECKING:
    from lightrft.sim.calls import Call, Meeting, Message
    from lightrft.sim.rank import SimRank

__all__ = ["CoalescedWork", "CollectiveWork", "DoneWork", "MessageWork", "deliver", "poison"]


def poison(tensor: Tensor) -> None:
    """Overwrite ``tensor`` with values that nobody mistakes for a result."""
    target = tensor.data
    if target.numel():
        _fill(target)


def _fill(target: Tensor) -> None:
    dtype = target.dtype
    if dtype.is_floating_point and dtype.itemsize == 1:
        target.view(torch.uint8).fill_(0x7F)
    elif dtype.is_floating_point or dtype.is_complex:
        target.fill_(float("nan"))
    elif dtype == torch.bool:
        target.fill_(True)
    else:
        info = torch.iinfo(dtype)
        target.fill_(info.min if info.min < 0 else info.max)


def _is_poisoned(tensor: Tensor) -> bool:
    expected = torch.empty_like(tensor)
    if expected.numel():
        _fill(expected)
    return _same_bits(tensor, expected)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.detach().reshape(-1).view(torch.uint8), right.detach().reshape(-1).view(torch.uint8))


def deliver(results: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Copy results into the caller's tensors without a trace in autograd: real backends leave none either."""
    if not results:
        return
    grad = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        if len(outputs) == 1:
            output, result = outputs[0].data, results[0]
            output.copy_(result if result.shape == output.shape else result.view(output.shape))
        else:
            targets = [output.data for output in outputs]
            sources = [r if r.shape == t.shape else r.view(t.shape) for r, t in zip(results, targets, strict=True)]
            torch._foreach_copy_(targets, sources)
    finally:
        torch._C._set_grad_enabled(grad)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class SimWork(dist.Work):
    """What all handles share; ``wait`` is all that a subclass has to say."""

    call: Call

    def wait(self, timeout: timedelta | None = None) -> bool:  # type: ignore[override]
        """Block until the operation is complete and its results have arrived."""
        raise NotImplementedError

    def _done(self) -> bool:
        raise NotImplementedError

    def is_completed(self) -> bool:
        """Whether the operation is complete; if it is, its results have arrived. Lets other ranks go on first."""
        if not self._done():
            task = _local.task
            if task is not None:
                task.scheduler.poll()
        if self._done():
            self.wait()
            return True
        return False

    def is_success(self) -> bool:
        """Complete, without an error."""
        return self.is_completed()

    def synchronize(self) -> None:
        """As :meth:`wait`."""
        self.wait()

    def block_current_stream(self) -> None:
        """As :meth:`wait`: there is one stream."""
        self.wait()

    def exception(self) -> None:
        """Errors end the run; a handle never carries one."""

    def result(self) -> list[Tensor]:
        """The output tensors, after waiting."""
        self.wait()
        return list(self._outputs())

    def _outputs(self) -> Sequence[Tensor]:
        return ()

    def get_future(self) -> torch.futures.Future[Any]:
        """A future that is already complete: asking for it waits."""
        self.wait()
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(list(self._outputs()))
        return future

    getFuture = get_future  # noqa: N815 - the name under which C++ looks for it


class DoneWork(SimWork):
    """An operation with nothing left to wait for."""

    def wait(self, timeout: timedelta | None = None) -> bool:  # type: ignore[override]
        """Return at once."""
        return True

    def _done(self) -> bool:
        return True


class CollectiveWork(SimWork):
    """An asynchronous collective."""

    def __init__(
        self,
        rank: SimRank,
        call: Call,
        meeting: Meeting,
        member: int,
        inputs: Sequence[Any],
        outputs: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self.call = call
        self._rank = rank
        self._meeting = meeting
        self._member = member
        self._inputs = inputs
        self._targets = outputs
        self._copies: list[Any] = []
        rank.outstanding[self] = None

    def hold(self) -> list[Any]:
        """Copy the inputs and poison the outputs; returns the copies, which take part in the collective."""
        with torch.no_grad():
            self._copies = [t.detach().clone() if isinstance(t, Tensor) else t for t in self._inputs]
            for output in self._targets:
                poison(output)
        return self._copies

    def _outputs(self) -> Sequence[Tensor]:
        return self._targets

    def _done(self) -> bool:
        return self._meeting.complete

    def wait(self, timeout: timedelta | None = None) -> bool:  # type: ignore[override]
        """Block until every member has come, then let the results arrive.

        Raises:
            RefusedError: an input or output was written to since the operation was issued.
        """
        if self.call.done:
            return True
        if not self._meeting.complete:
            self._rank.world.wait_for_meeting(self._meeting, self.call)
        self.call.done = True
        self._rank.outstanding.pop(self, None)
        with torch.no_grad():
            self._check_untouched()
        assert self._meeting.results is not None
        results = self._meeting.results[self._member]
        deliver(results, self._targets)
        self._copies = []
        return True

    def _check_untouched(self) -> None:
        overwritten = {_storage(t) for t in self._targets if t.numel()}
        for copy, tensor in zip(self._copies, self._inputs, strict=True):
            if not isinstance(tensor, Tensor) or _storage(tensor) in overwritten:
                continue
            if not _same_bits(copy, tensor):
                raise RefusedError(self._complaint("an input"))
        for output in self._targets:
            if not _is_poisoned(output):
                raise RefusedError(self._complaint("the output"))

    def _complaint(self, what: str) -> str:
        call = self.call
        return (
            f"{what} of the asynchronous {call.describe()} (issued at {call.place}) was written to before wait(): "
            "the data that other ranks receive would be undefined"
        )


class MessageWork(SimWork):
    """A send or receive that was posted."""

    def __init__(self, rank: SimRank, message: Message, target: Sequence[Tensor], copy: Sequence[Tensor]) -> None:
        super().__init__()
        self.call = message.call
        self._rank = rank
        self._message = message
        self._target = target
        self._copy = copy
        rank.outstanding[self] = None

    def _done(self) -> bool:
        return self._message.matched

    def _outputs(self) -> Sequence[Tensor]:
        return self._target

    def wait(self, timeout: timedelta | None = None) -> bool:  # type: ignore[override]
        """Block until the counterpart was posted.

        Raises:
            RefusedError: the tensor was written to since the operation was posted.
        """
        if self.call.done:
            return True
        self._rank.world.wait_for_message(self._message)
        self.call.done = True
        self._rank.outstanding.pop(self, None)
        with torch.no_grad():
            self._finish()
        return True

    def _finish(self) -> None:
        message = self._message
        if message.call.signature.operation == "send":
            for copy, tensor in zip(self._copy, self._target, strict=True):
                if not _same_bits(copy, tensor):
                    raise RefusedError(
                        f"the tensor of the {message.call.describe()} (posted at {message.call.place}) was written to "
                        "before wait(): the receiver would get undefined data"
                    )
        else:
            deliver(message.tensors, self._target)

    def source_rank(self) -> int:
        """Rank in the group that the message came from."""
        return self._message.source

    _source_rank = source_rank
    sourceRank = source_rank  # noqa: N815


class CoalescedWork(SimWork):
    """Several operations as one."""

    def __init__(self, works: Sequence[SimWork]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:  # type: ignore[override]
        """Wait for all of them."""
        for work in self._works:
            work.wait()
        return True

    def _done(self) -> bool:
        return all(work._done() for work in self._works)
