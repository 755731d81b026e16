"""The process group that simulated ranks get from ``torch.distributed``.

Every method of :class:`SimProcessGroup` has the name and arguments under which torch calls it; what it does is to say
what the call needs (its signature, inputs and outputs) and to hand it to :meth:`SimProcessGroup._meet`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.errors import CollectiveTimeoutError, RefusedError, SimulationError
from lightrft.sim import collectives
from lightrft.sim.acceptance import Acceptance, Reduction, elsewhere
from lightrft.sim.buffers import BelowAutograd, below_modes, copy_results, plain, poison, write_results
from lightrft.sim.calls import Call, Group, Meeting, Signature
from lightrft.sim.current import _local
from lightrft.sim.group_handle import GroupHandle
from lightrft.sim.places import caller_place
from lightrft.sim.point_to_point import post_receive, post_send
from lightrft.sim.works import CoalescedWork, CollectiveWork, DoneWork, SimWork, nanoseconds

if TYPE_CHECKING:
    from lightrft.sim.profiles import Profile
    from lightrft.sim.rank import SimRank

__all__ = ["SimProcessGroup"]

Compute = Callable[[Meeting], list[Sequence[Tensor]]]


def _shapes(tensors: Sequence[Tensor]) -> tuple[Any, Any]:
    """Dtype and shape of one tensor; of several, tuples of them."""
    if len(tensors) == 1:
        return tensors[0].dtype, tensors[0].shape
    return tuple(t.dtype for t in tensors), tuple(t.shape for t in tensors)


class SimProcessGroup(GroupHandle):
    """One rank's handle of a :class:`~lightrft.sim.calls.Group`, with all that can be done on it."""

    def __init__(self, rank: SimRank, group: Group, profile: Profile, store: Any) -> None:
        super().__init__(rank, group, profile, store)
        self._accept = Acceptance(profile, group.backend, group.size, self._meet_elsewhere)
        self._coalesced: list[SimWork] | None = None
        self._splits_made = 0

    # -- meeting the other members ------------------------------------------------------------------------------

    def _call(self, signature: Signature, inputs: Sequence[Any] = (), peer: int | None = None, tag: int = 0) -> Call:
        task = _local.task
        if task is None or task.rank is not self._rank:
            raise SimulationError(
                f"{signature.operation} on a group of rank {self._rank.index} from a thread that is not this rank's: "
                "start the thread inside the rank, and use the group only there"
            )
        if task.killed:
            task.scheduler.end_of(task)
        if self.closed:
            raise RefusedError(f"{signature.operation}: the process group has been destroyed")
        if peer is None:
            self._sequence += 1
            number = self._sequence
        else:  # counted apart: only two members make them
            number = self._rank.count_message(self._group)
        place, now = caller_place(3), task.scheduler.now
        call = Call(self._rank.index, self._group, number, signature, place, now, task.number, peer, tag)
        world = self._world
        if world.stopwatch is not None:
            world.stopwatch.stop_at(call, task)
        world.record(call, inputs)
        return call

    def _join(self, call: Call) -> Meeting:
        """The meeting that ``call`` belongs to, entered."""
        group = self._group
        meeting = group.meetings.get(call.sequence)
        if meeting is None:
            meeting = group.meetings[call.sequence] = Meeting(call.sequence, group.size, call)
        elif meeting.first.signature != call.signature:
            self._world.disagree(meeting, call, self._member)
        else:
            call.signature = meeting.first.signature  # a trace of a million calls holds few
        meeting.calls[self._member] = call
        meeting.arrived += 1
        return meeting

    def _meet(
        self,
        signature: Signature,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        opts: Any,
        compute: Compute,
        sizes: tuple[int, int] | None = None,
    ) -> Any:
        """Contribute ``inputs``; once everybody has, ``compute`` runs and its results reach ``outputs``.

        Returns:
            None if the caller wants to wait (``opts.asyncOp`` is false) and has waited, else a work handle.
        """
        if torch._C._len_torch_dispatch_stack():
            return below_modes(self._meet, signature, inputs, outputs, opts, compute, sizes)
        inputs = plain(inputs)
        outputs = plain(outputs) if len(outputs) == 1 else outputs
        deliver = write_results
        if signature.operation in self._profile.copying:
            deliver = copy_results
            if torch.is_grad_enabled():
                self._accept.outputs(signature.operation, outputs)
        call = self._call(signature, inputs)
        call.sizes = sizes
        meeting = self._join(call)
        member = self._member
        work = None
        if getattr(opts, "asyncOp", True) or self._coalesced is not None:
            call.async_op = True
            work = CollectiveWork(self._rank, call, meeting, member, inputs, outputs, deliver, self._accept)
            inputs = work.hold()
        meeting.inputs[member] = inputs
        meeting.outputs[member] = outputs
        if meeting.arrived == self._group.size:
            self._complete(meeting, compute)
        elif work is None:
            self._wait(meeting, call)
        if work is not None:
            return self._issued(work)
        assert meeting.results is not None
        call.done = True
        deliver(meeting.results[member], outputs)
        if self._world.stopwatch is not None:
            self._world.stopwatch.start()
        return None

    def _meet_elsewhere(self, operation: str, tensor: Tensor) -> NoReturn:
        """Come to a collective with a tensor that is not in the memory of the CPU, and wait to be compared.

        Raises:
            RefusedError: the tensors of all members are elsewhere, or not all of them can come.
        """
        device = str(tensor.device)
        call = self._call(Signature(operation, tensor.dtype, tensor.shape, device=device))
        meeting = self._join(call)
        if meeting.arrived < self._group.size:
            task = _local.task
            assert task is not None
            meeting.waiters.append(task)
            self._world.wait_to_be_refused(task, call)
        else:
            del self._group.meetings[call.sequence]
            self._world.scheduler.wake_all(meeting.waiters)
        if self._world.stopwatch is not None:
            self._world.stopwatch.start()
        raise elsewhere(operation, device)

    def _issued(self, work: SimWork) -> SimWork:
        """Hand out a work, unless it becomes part of a coalesced one."""
        if self._world.stopwatch is not None:
            self._world.stopwatch.start()
        if self._coalesced is None:
            return work
        self._coalesced.append(work)
        return DoneWork()

    def _wait(self, meeting: Meeting, call: Call) -> None:
        task = _local.task
        assert task is not None
        scheduler = task.scheduler
        meeting.waiters.append(task)
        limit = call.since + self._group.timeout
        scheduler.watch_at = min(scheduler.watch_at, limit)
        scheduler.block(call)

    def _complete(self, meeting: Meeting, compute: Compute) -> None:
        world = self._world
        problem: _DisagreementError | None = None
        try:
            with BelowAutograd(True):
                meeting.results = compute(meeting)
        except _DisagreementError as error:
            problem = error
        if problem is not None:
            world.disagree_among(meeting, str(problem), problem.pairs)
        meeting.complete = True
        del self._group.meetings[meeting.sequence]
        world.scheduler.wake_all(meeting.waiters)
        meeting.waiters = []
        world.scheduler.interleave()

    # -- what the collectives share -----------------------------------------------------------------------------

    def _shape(self, tensor: Tensor) -> Any:
        return tensor.shape if self._profile.same_shape else (tensor.numel(),)

    def _reducer(self, collective: Callable[..., list[Sequence[Tensor]]], reduction: Reduction, *args: Any) -> Compute:
        """``collective`` with the reduction of this group and of the meeting's sequence number."""
        order, world_seed = self._world.numerics, self._world.seed

        def compute(meeting: Meeting) -> list[Sequence[Tensor]]:
            seed = 0 if order == "rank" else hash((world_seed, meeting.sequence))
            name, factor = reduction.name, reduction.factor
            return collective(meeting.inputs, lambda t: collectives.reduce(t, name, order, seed, factor), *args)

        return compute

    # -- collectives --------------------------------------------------------------------------------------------

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """``all_reduce``: tensors are reduced in place."""
        accept = self._accept
        tensors = [accept.in_memory_order("all_reduce", tensor) for tensor in _as_list(tensors)]
        accept.tensors("all_reduce", tensors)
        reduction = accept.reduction(_reduce_op(opts), tensors, "all_reduce")
        signature = Signature("all_reduce", tensors[0].dtype, self._shape(tensors[0]), reduction.label)
        return self._meet(signature, tensors, tensors, opts, self._reducer(collectives.all_reduce, reduction))

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """``all_reduce`` of several tensors at once."""
        self._accept.tensors("all_reduce_coalesced", tensors)
        reduction = self._accept.reduction(_reduce_op(opts), tensors, "all_reduce_coalesced")
        signature = Signature("all_reduce_coalesced", *_shapes(tensors), reduction.label)
        return self._meet(signature, tensors, tensors, opts, self._reducer(collectives.all_reduce, reduction))

    def reduce(self, tensors: Any, opts: Any = None, op: Any = None, *_rest: Any) -> Any:
        """``reduce``: ``opts.rootRank`` gets the result; what the others hold afterwards is undefined."""
        accept, root = self._accept, _root(opts)
        tensors = [accept.in_memory_order("reduce", tensor) for tensor in _as_list(tensors)]
        accept.root("reduce", root)
        accept.tensors("reduce", tensors)
        reduction = accept.reduction(op if op is not None else _reduce_op(opts), tensors, "reduce")
        at_root = self._group.ranks[root]
        signature = Signature("reduce", tensors[0].dtype, self._shape(tensors[0]), reduction.label, at_root)
        scratch = self._member != root and self._profile.name != "nccl"  # gloo works in the tensors of all members
        outputs = tensors if scratch or self._member == root else []
        compute = self._reducer(collectives.reduce_to, reduction, root)
        work = self._meet(signature, tensors, outputs, opts, compute)
        if work is None and scratch:
            below_modes(poison, tensors)
        return work

    def broadcast(self, tensors: Any, opts: Any = None, *_rest: Any) -> Any:
        """``broadcast`` from ``opts.rootRank``."""
        accept, root = self._accept, _root(opts)
        tensors = [accept.in_memory_order("broadcast", tensor) for tensor in _as_list(tensors)]
        accept.root("broadcast", root)
        accept.tensors("broadcast", tensors)
        dtype, shape = _shapes(tensors)
        if len(tensors) == 1:
            shape = self._shape(tensors[0])
        signature = Signature("broadcast", dtype, shape, None, self._group.ranks[root])
        outputs = [] if self._member == root else tensors
        return self._meet(signature, tensors, outputs, opts, lambda m: collectives.broadcast(m.inputs, root))

    def allgather(self, output_lists: Any, inputs: Any, opts: Any = None) -> Any:
        """``all_gather`` into a list; the sizes may differ from rank to rank where the backend allows it."""
        accept, outputs, tensor = self._accept, _first_list(output_lists), _as_list(inputs)[0]
        accept.count("all_gather", "the output list", len(outputs))
        accept.tensors("all_gather", (tensor,))
        shape = accept.parts_of_list("all_gather", outputs, tensor)
        accept.same("all_gather", f"output {self._member}", outputs[self._member], tensor)
        signature = Signature("all_gather", tensor.dtype, shape)
        return self._meet(signature, [tensor], outputs, opts, lambda m: collectives.all_gather(m.inputs))

    def allgather_coalesced(self, output_lists: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        """``all_gather`` of several tensors; ``output_lists[m][i]`` receives the ``i``-th of member ``m``."""
        accept = self._accept
        accept.feature("lists_of_ranks", "all_gather_coalesced")
        accept.count("all_gather_coalesced", "the list of output lists", len(output_lists))
        flat = [tensor for outputs in output_lists for tensor in outputs]
        accept.tensors("all_gather_coalesced", (*inputs, *flat))
        for outputs in output_lists:
            accept.pairs("all_gather_coalesced", "output", outputs, inputs)
        signature = Signature("all_gather_coalesced", *_shapes(inputs))
        return self._meet(signature, inputs, flat, opts, lambda m: collectives.all_gather_lists(m.inputs))

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        """``all_gather_into_tensor``: everybody's tensor end to end."""
        accept = self._accept
        accept.tensors("all_gather_single", (output, tensor))
        accept.parts("all_gather_single", output, tensor, "output")
        accept.gathered_input("all_gather_single", tensor)
        signature = Signature("all_gather_single", tensor.dtype, self._shape(tensor))
        return self._meet(signature, [tensor], [output], opts, lambda m: collectives.all_gather_single(m.inputs))

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """``all_gather_into_tensor`` of several tensors."""
        accept, operation = self._accept, "all_gather_single_coalesced"
        accept.tensors(operation, (*inputs, *outputs))
        accept.lengths(operation, outputs, inputs)
        for output, tensor in zip(outputs, inputs, strict=True):
            accept.parts(operation, output, tensor, "output")
        signature = Signature(operation, *_shapes(inputs))
        return self._meet(signature, inputs, outputs, opts, lambda m: collectives.all_gather_single(m.inputs))

    def gather(self, output_lists: Any, inputs: Any, opts: Any = None, *_rest: Any) -> Any:
        """``gather`` to ``opts.rootRank``."""
        accept, root, tensor = self._accept, _root(opts), _as_list(inputs)[0]
        outputs = _first_list(output_lists)
        accept.root("gather", root)
        accept.tensors("gather", (tensor, *outputs))
        if self._member == root:
            accept.count("gather", "the output list", len(outputs))
            for member, output in enumerate(outputs):
                accept.exactly("gather", f"output {member}", output, tensor)
        signature = Signature("gather", tensor.dtype, tensor.shape, None, self._group.ranks[root])
        return self._meet(signature, [tensor], outputs, opts, lambda m: collectives.gather(m.inputs, root))

    def scatter(self, outputs: Any, input_lists: Any, opts: Any = None, *_rest: Any) -> Any:
        """``scatter`` from ``opts.rootRank``."""
        accept, root, output = self._accept, _root(opts), _as_list(outputs)[0]
        inputs = _first_list(input_lists)
        accept.root("scatter", root)
        accept.tensors("scatter", (output, *inputs))
        if self._member == root:
            accept.count("scatter", "the input list", len(inputs))
            for member, tensor in enumerate(inputs):
                accept.exactly("scatter", f"input {member}", tensor, output)
        signature = Signature("scatter", output.dtype, output.shape, None, self._group.ranks[root])
        return self._meet(signature, inputs, [output], opts, lambda m: collectives.scatter(m.inputs, root))

    def reduce_scatter(self, outputs: Any, input_lists: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """``reduce_scatter`` of a list: member ``m`` gets the reduction of everybody's ``m``-th tensor."""
        accept, output, inputs = self._accept, _as_list(outputs)[0], _first_list(input_lists)
        accept.count("reduce_scatter", "the input list", len(inputs))
        accept.tensors("reduce_scatter", (output,))
        accept.dense("reduce_scatter", output)
        shape = accept.parts_of_list("reduce_scatter", inputs, output)
        accept.same("reduce_scatter", "the output", output, inputs[self._member])
        reduction = accept.reduction(_reduce_op(opts), inputs, "reduce_scatter")
        signature = Signature("reduce_scatter", output.dtype, shape, reduction.label)
        return self._meet(signature, inputs, [output], opts, self._reducer(collectives.reduce_scatter, reduction))

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        """``reduce_scatter_tensor``: member ``m`` gets the ``m``-th equal part of the reduction."""
        accept, operation = self._accept, "reduce_scatter_single"
        accept.tensors(operation, (output, tensor))
        accept.parts(operation, tensor, output, "input")
        reduction = accept.reduction(_reduce_op(opts), (tensor,), operation)
        signature = Signature(operation, tensor.dtype, self._shape(tensor), reduction.label)
        compute = self._reducer(collectives.reduce_scatter_single, reduction)
        return self._meet(signature, [tensor], [output], opts, compute)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """``reduce_scatter_tensor`` of several tensors."""
        accept, operation = self._accept, "reduce_scatter_single_coalesced"
        accept.tensors(operation, (*inputs, *outputs))
        accept.lengths(operation, outputs, inputs)
        for output, tensor in zip(outputs, inputs, strict=True):
            accept.parts(operation, tensor, output, "input")
        reduction = accept.reduction(_reduce_op(opts), inputs, operation)
        signature = Signature(operation, *_shapes(inputs), reduction.label)
        compute = self._reducer(collectives.reduce_scatter_single, reduction)
        return self._meet(signature, inputs, outputs, opts, compute)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """``all_to_all`` of lists."""
        accept = self._accept
        accept.count("all_to_all", "the output list", len(outputs))
        accept.count("all_to_all", "the input list", len(inputs))
        accept.tensors("all_to_all", (*inputs, *outputs))
        accept.one_dtype("all_to_all", inputs[0], outputs)
        accept.one_dtype("all_to_all", inputs[0], inputs)
        accept.even("all_to_all", (*inputs, *outputs))
        shape = None if "all_to_all" in self._profile.uneven else self._shape(inputs[0])
        sizes = sum(t.numel() for t in inputs), sum(t.numel() for t in outputs)
        return self._meet(Signature("all_to_all", inputs[0].dtype, shape), inputs, outputs, opts, self._exchange, sizes)

    def _exchange(self, meeting: Meeting) -> list[Sequence[Tensor]]:
        if meeting.first.signature.shape is not None:  # all sizes are equal
            return collectives.all_to_all(meeting.inputs)
        problems = []
        for sender, tensors in enumerate(meeting.inputs):
            for receiver, tensor in enumerate(tensors):
                expected = meeting.outputs[receiver][sender]
                agree = tensor.shape == expected.shape or not self._profile.same_shape
                if not agree or expected.numel() != tensor.numel():
                    sent, wanted = f"{tensor.dtype}{list(tensor.shape)}", f"{expected.dtype}{list(expected.shape)}"
                    problems.append((sender, receiver, sent, wanted))
        self._refuse_pairs("sizes", problems)
        return collectives.all_to_all(meeting.inputs)

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_splits: Any = None, input_splits: Any = None, opts: Any = None
    ) -> Any:
        """``all_to_all_single``; splits count along dimension 0, empty means equal parts."""
        accept = self._accept
        accept.tensors("all_to_all_single", (output, tensor))
        sending = accept.splits("input", tensor, input_splits)
        receiving = accept.splits("output", output, output_splits)
        accept.rows("all_to_all_single", output, tensor)
        even = not input_splits and not output_splits
        signature = Signature("all_to_all_single", tensor.dtype, tensor.shape if even else (-1, *tensor.shape[1:]))
        contributed: Any = [tensor, sending, receiving]
        sizes = tensor.numel(), output.numel()
        return self._meet(signature, contributed, [output], opts, self._exchange_parts, sizes)

    def _exchange_parts(self, meeting: Meeting) -> list[Sequence[Tensor]]:
        sending = [tuple(entry[1]) for entry in meeting.inputs]
        expected = list(zip(*(entry[2] for entry in meeting.inputs), strict=True))
        problems = [
            (sender, receiver, str(size), str(wanted))
            for sender in range(self._group.size)
            if sending[sender] != expected[sender]
            for receiver, (size, wanted) in enumerate(zip(sending[sender], expected[sender], strict=True))
            if size != wanted
        ]
        self._refuse_pairs("split sizes", problems)
        return collectives.all_to_all_single([entry[:1] for entry in meeting.inputs], sending)

    def _refuse_pairs(self, what: str, problems: list[tuple[int, int, str, str]]) -> None:
        """Complain about pairs of members (sender, receiver, what is sent, what is expected), if there are any."""
        if problems:
            ranks = self._group.ranks
            sender, receiver, sent, expected = problems[0]
            raise _DisagreementError(
                f"{what} differ: rank {ranks[sender]} sends {sent} to rank {ranks[receiver]}, which expects {expected}",
                [(ranks[problem[0]], ranks[problem[1]]) for problem in problems],
            )

    # -- barriers -----------------------------------------------------------------------------------------------

    def barrier(self, opts: Any = None, *_rest: Any) -> Any:
        """``barrier``; a timeout given for this barrier alone runs in virtual time."""
        limit = nanoseconds(getattr(opts, "timeout", None))
        if limit is None or getattr(opts, "asyncOp", True) or self._coalesced is not None:
            return self._meet(_BARRIER, (), (), opts, _nothing)
        call = self._call(_BARRIER)
        missing = self._gather_members(call, limit)
        if missing:
            raise CollectiveTimeoutError(
                f"{call.describe()} waited {limit // 1_000_000} ms of virtual time, the timeout given for it; these "
                f"ranks did not come, or have given up: {', '.join(map(str, missing))}"
            )
        return None

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """``monitored_barrier``: after ``timeout`` (virtual) the ranks that did not come are named.

        Raises:
            RuntimeError: some rank did not come in time.
        """
        call = self._call(Signature("monitored_barrier"))
        limit = nanoseconds(timeout) or self._group.timeout
        # the first member monitors the others: it gives up first, and names them
        missing = self._gather_members(call, limit if self._member == 0 else 2 * limit)
        if not missing:
            return
        if self._member:
            raise RuntimeError(
                f"[Rank {self._rank.index}]: came to monitoredBarrier, but rank {self._group.ranks[0]}, which monitors "
                "it, has failed or never came"
            )
        named = missing if wait_all_ranks else missing[:1]
        raise RuntimeError(
            f"[Rank {self._rank.index}]: Rank{'s' if len(named) > 1 else ''} {', '.join(map(str, named))} failed to "
            f"pass monitoredBarrier in {limit // 1_000_000} ms"
        )

    def _gather_members(self, call: Call, limit: int) -> list[int]:
        """Wait for everybody; the ranks that had not come after ``limit`` ns of virtual time, or have given up."""
        wait = self._world.waits(call)
        missing = self._members_missing(call, limit)
        self._world.returned(wait)
        return missing

    def _members_missing(self, call: Call, limit: int) -> list[int]:
        meeting = self._join(call)
        call.gives_up_at = call.since + limit
        gone = [other.rank for other in meeting.calls if other is not None and _gave_up(other, call.since)]
        if gone:
            call.done = True
            return gone
        if meeting.arrived == self._group.size:
            call.done = True
            self._complete(meeting, _nothing)
            return []
        task = _local.task
        assert task is not None
        meeting.waiters.append(task)
        task.scheduler.block(call, call.gives_up_at)
        call.done = True
        if meeting.complete:
            return []
        meeting.waiters.remove(task)
        calls = list(zip(self._group.ranks, meeting.calls, strict=True))
        missing = [rank for rank, other in calls if other is None or other.since >= call.gives_up_at]
        return missing or [rank for rank, other in calls if other is not call]

    def meet_split(self, split: tuple[tuple[int, ...], ...]) -> int:
        """All members of the parent come together to split it; they must ask for the same split.

        Returns:
            how many splits the group has seen, this one included.
        """
        self._accept.feature("split", "split_group")
        self._splits_made += 1
        self._meet(Signature("split_group", sizes=split), (), (), _SYNCHRONOUS, _nothing)
        return self._splits_made

    # -- point to point -----------------------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], destination: int, tag: int = 0) -> Any:
        """``send`` and ``isend`` to a member of the group."""
        return self._post(post_send, "send", tensors, destination, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Any:
        """``recv`` and ``irecv`` from a member of the group."""
        return self._post(post_receive, "recv", tensors, source, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Any:
        """``recv`` from whoever sends first."""
        self._accept.any_source(tensors)
        return self._post(post_receive, "recv", tensors, -1, tag)

    def _post(self, post: Any, operation: str, tensors: list[Tensor], peer: int, tag: int) -> Any:
        device = self._accept.messages(operation, tensors)
        if peer >= 0:
            self._accept.root(operation, peer)
        if peer == self._member:
            self._accept.feature("self_send", f"a {operation} from a rank to itself")
        sent = tensors if operation == "send" else ()
        other = self._group.ranks[peer] if peer >= 0 else -1
        call = self._call(Signature(operation, *_shapes(tensors), device=device), sent, other, tag)
        return self._issued(below_modes(post, self, call, plain(tensors), peer, tag))

    # -- coalescing ---------------------------------------------------------------------------------------------

    def _start_coalescing(self, device: Any = None) -> None:  # noqa: ARG002
        self._accept.feature("coalescing", "the coalescing manager with a device")
        self._coalesced = []

    def _end_coalescing(self, device: Any = None) -> Any:  # noqa: ARG002
        works, self._coalesced = self._coalesced or [], None
        return CoalescedWork(works) if works else DoneWork()


_OLDER_NAMES = {
    # torch 2.11 and 2.12, and C++ in 2.13     torch 2.13
    "_allgather_base": "all_gather_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "_reduce_scatter_base": "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
    "alltoall_base": "all_to_all_single",
}
for _older, _newer in _OLDER_NAMES.items():
    setattr(SimProcessGroup, _older, getattr(SimProcessGroup, _newer))


class _DisagreementError(Exception):
    """Members agree on the operation but not on the sizes of what they exchange: the pairs of global ranks."""

    def __init__(self, message: str, pairs: list[tuple[int, int]]) -> None:
        super().__init__(message)
        self.pairs = pairs


class _Synchronous:
    asyncOp = False  # noqa: N815 - torch's name


_SYNCHRONOUS = _Synchronous()
_BARRIER = Signature("barrier")


def _gave_up(call: Call, now: int) -> bool:
    """Whether a member that came to a barrier has stopped waiting, or will as soon as it runs: its time is over."""
    return call.done or (call.gives_up_at is not None and call.gives_up_at <= now)


def _nothing(meeting: Meeting) -> list[Sequence[Tensor]]:
    return [()] * len(meeting.calls)


def _as_list(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _first_list(lists: Any) -> list[Tensor]:
    """The tensors of ``[[a, b]]`` or of ``[a, b]``."""
    return list(lists[0]) if lists and isinstance(lists[0], (list, tuple)) else list(lists)


def _reduce_op(opts: Any) -> Any:
    """From the options, or given in their place; a sum if nothing is said."""
    return dist.ReduceOp.SUM if opts is None else getattr(opts, "reduceOp", opts)


def _root(opts: Any) -> int:
    """From the options, or given in their place."""
    return int(getattr(opts, "rootRank", opts))
