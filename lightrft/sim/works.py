"""Handles of operations under way, and what keeps an asynchronous one honest.

The outputs of an asynchronous operation hold poison until ``wait()`` (NaN, or the most negative integer), so that
reading them early shows. Its inputs are copied when it is issued and compared at ``wait()``: changing them in between
is an error, as it would corrupt the data on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.errors import CollectiveTimeoutError, RefusedError, SimulationError
from lightrft.sim.buffers import BelowAutograd, below_modes, is_poisoned, poison, same_bits, span, write_results
from lightrft.sim.current import _local
from lightrft.sim.futures import SimFuture, done_future

if TYPE_CHECKING:
    from lightrft.sim.acceptance import Acceptance
    from lightrft.sim.calls import Call, Meeting, Message
    from lightrft.sim.rank import SimRank

__all__ = ["CoalescedWork", "CollectiveWork", "DoneWork", "MessageWork", "SimWork", "let_go", "nanoseconds"]

_WITHOUT_FUTURE = frozenset({"reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced"})


def nanoseconds(timeout: timedelta | None) -> int | None:
    """How long a caller is ready to wait; None (also for zero and less) for as long as the group allows."""
    return round(timeout.total_seconds() * 1e9) if timeout is not None and timeout > timedelta(0) else None


class SimWork(dist.Work):
    """What all handles share; a subclass says how to wait (:meth:`_wait`) and whether that would block."""

    call: Call
    abandoned = False
    """Nobody will wait any more; ``wait()`` returns at once."""
    _future: SimFuture | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the operation is complete and its results have arrived.

        Raises:
            CollectiveTimeoutError: it was not complete after ``timeout``, in virtual time.
            RefusedError: an input or output was written to since the operation was issued.
        """
        if not self.call.done and not self.abandoned:
            self._wait(nanoseconds(timeout))
            self._tell_future()
        return True

    def _wait(self, limit: int | None) -> None:
        raise NotImplementedError

    def _done(self) -> bool:
        raise NotImplementedError

    def _awaited(self) -> Call:
        """What is not complete yet."""
        return self.call

    def _outputs(self) -> Sequence[Tensor]:
        return ()

    def is_completed(self) -> bool:
        """Whether the operation is complete; if it is, its results have arrived. Lets other ranks go on first."""
        if not self._done():
            task = _local.task
            if task is not None:
                task.scheduler.poll(self._awaited())
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

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the output tensors.

        During a backward pass it is complete when it is returned, because C++ (the gradient buckets of
        ``DistributedDataParallel``) waits for it there.
        """
        if torch._C._current_graph_task_id() != -1:
            self.wait()
        if self.call.done:
            return done_future(list(self._outputs()))
        if self._future is None:
            self._future = SimFuture(self.wait, self.is_completed)
        return self._future

    getFuture = get_future  # noqa: N815 - the name under which C++ looks for it

    def _tell_future(self) -> None:
        if self._future is not None:
            self._future.set_result(list(self._outputs()))


def let_go(works: Iterable[SimWork]) -> None:
    """Take works that the calling thread has issued, and that nobody waited for, out of torch's register.

    A functional collective enters its work there until somebody waits for its outputs; a register is kept for every
    thread, to the end of the process.
    """
    if not getattr(torch._C._distributed_c10d, "_get_work_registry_size", lambda: 1)():
        return
    for work in works:
        work.abandoned = True
        for output in work._outputs():
            torch.ops._c10d_functional.wait_tensor(output)


class DoneWork(SimWork):
    """An operation with nothing left to wait for."""

    def wait(self, timeout: timedelta | None = None) -> bool:  # noqa: ARG002
        """Return at once."""
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of nothing."""
        return done_future([])

    def _done(self) -> bool:
        return True


class _RankWork(SimWork):
    """A handle that belongs to a rank, which must wait for it; a subclass says how (:meth:`_finish`)."""

    def __init__(self, rank: SimRank, call: Call) -> None:
        super().__init__()
        self.call = call
        self._rank = rank
        rank.outstanding[self] = None

    def _wait(self, limit: int | None) -> None:
        self._check_owner()
        world = self._rank.world
        wait = world.waits(self.call)
        try:
            below_modes(self._finish, limit)
        except Exception:  # it gave up, or what it found is refused: the rank goes on
            world.returned(wait)
            raise
        world.returned(wait)

    def _finish(self, limit: int | None) -> None:
        raise NotImplementedError

    def _settled(self) -> None:
        self.call.done = True
        self._rank.outstanding.pop(self, None)

    def _block(self, register: Callable[[Any], None], forget: Callable[[Any], None], limit: int) -> None:
        """Block for at most ``limit`` ns of virtual time."""
        task = _local.task
        assert task is not None
        deadline = task.scheduler.now + limit
        while not self._done():
            register(task)
            if not task.scheduler.block(self.call, deadline):
                forget(task)
                raise CollectiveTimeoutError(
                    f"wait() on {self.call.describe()} (issued at {self.call.place}) gave up after "
                    f"{limit // 1_000_000} ms of virtual time"
                )

    def _check_owner(self) -> None:
        task = _local.task
        if task is None or task.rank is not self._rank:
            raise SimulationError(
                f"wait() on {self.call.describe()}, issued by rank {self._rank.index} at {self.call.place}, from a "
                "thread that is not this rank's"
            )


class CollectiveWork(_RankWork):
    """An asynchronous collective."""

    def __init__(
        self,
        rank: SimRank,
        call: Call,
        meeting: Meeting,
        member: int,
        inputs: Sequence[Any],
        outputs: Sequence[Tensor],
        deliver: Callable[[Sequence[Tensor], Sequence[Tensor]], None],
        accept: Acceptance,
    ) -> None:
        super().__init__(rank, call)
        self._meeting = meeting
        self._member = member
        self._inputs = inputs
        self._targets = outputs
        self._deliver = deliver
        self._accept = accept
        self._copies: list[Any] = []
        rank.world.watch(call)

    def hold(self) -> list[Any]:
        """Copy the inputs and poison the outputs; returns the copies, which take part in the collective."""
        with BelowAutograd(True):
            self._copies = [t.detach().clone() if isinstance(t, Tensor) else t for t in self._inputs]
        poison(self._targets)
        return self._copies

    def get_future(self) -> torch.futures.Future[Any]:
        """As for every handle; gloo has none for a reduce_scatter."""
        operation = self.call.signature.operation
        if operation in _WITHOUT_FUTURE:
            self._accept.feature("futures", f"get_future() of a {operation}")
        return super().get_future()

    getFuture = get_future  # noqa: N815

    def _outputs(self) -> Sequence[Tensor]:
        return self._targets

    def _done(self) -> bool:
        return self._meeting.complete

    def _finish(self, limit: int | None) -> None:
        meeting = self._meeting
        if not meeting.complete:
            if limit is None:
                self._rank.world.wait_for_meeting(meeting, self.call)
            else:
                self._block(meeting.waiters.append, meeting.waiters.remove, limit)
        self._settled()
        with BelowAutograd(True):
            self._check_untouched()
        assert meeting.results is not None
        self._deliver(meeting.results[self._member], self._targets)
        self._copies = []

    def _check_untouched(self) -> None:
        overwritten = [span(t) for t in self._targets]
        for copy, tensor in zip(self._copies, self._inputs, strict=True):
            if not isinstance(tensor, Tensor):
                continue
            start, end = span(tensor)
            if any(low < end and start < high for low, high in overwritten):
                continue  # an input that is (in) an output: the outputs are looked at below
            if not same_bits(copy, tensor):
                raise RefusedError(self._complaint("an input"))
        for output in self._targets:
            if not is_poisoned(output):
                raise RefusedError(self._complaint("the output"))

    def _complaint(self, what: str) -> str:
        call = self.call
        return (
            f"{what} of the asynchronous {call.describe()} (issued at {call.place}) was written to before wait(): "
            "the data that other ranks receive would be undefined"
        )


class MessageWork(_RankWork):
    """A send or receive that was posted."""

    def __init__(
        self, rank: SimRank, message: Message, target: Sequence[Tensor], copy: Sequence[Tensor], accept: Acceptance
    ) -> None:
        super().__init__(rank, message.call)
        self._message = message
        self._target = target
        self._copy = copy
        self._accept = accept

    def _done(self) -> bool:
        return self._message.matched

    def _outputs(self) -> Sequence[Tensor]:
        return self._target

    def get_future(self) -> torch.futures.Future[Any]:
        """As for every handle; gloo has none for a message."""
        self._accept.feature("futures", f"get_future() of a {self.call.signature.operation}")
        return super().get_future()

    getFuture = get_future  # noqa: N815

    def _finish(self, limit: int | None) -> None:
        if limit is None:
            self._rank.world.wait_for_message(self._message)
        else:
            self._block(self._expect, self._give_up, limit)
        self._settled()
        if self._message.failure is not None:
            raise self._message.failure
        call, receives = self.call, self.call.signature.operation == "recv"
        with BelowAutograd(True):
            untouched = all(map(is_poisoned, self._target) if receives else map(same_bits, self._copy, self._target))
        if not untouched:
            raise RefusedError(
                f"the tensor of the {call.describe()} (posted at {call.place}) was written to before wait(): "
                f"{'what arrives in it' if receives else 'what the receiver gets'} would be undefined"
            )
        if receives:
            write_results(self._message.tensors, self._target)

    def _expect(self, task: Any) -> None:
        self._message.waiter = task

    def _give_up(self, _task: Any) -> None:
        self._message.waiter = None

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

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for all of them."""
        for work in self._works:
            work.wait(timeout)
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of all outputs; asking for it waits."""
        self.wait()
        return done_future(list(self._outputs()))

    getFuture = get_future  # noqa: N815

    def _outputs(self) -> Sequence[Tensor]:
        return [tensor for work in self._works for tensor in work._outputs()]

    def _done(self) -> bool:
        return all(work._done() for work in self._works)

    def _awaited(self) -> Call:
        return next(work for work in self._works if not work._done())._awaited()
