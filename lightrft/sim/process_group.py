"""The process group that simulated ranks get from ``torch.distributed``.

Every method of :class:`SimProcessGroup` has the name and arguments under which torch calls it; what it does is to say
what the call needs (its signature, inputs and outputs) and to hand it to :meth:`SimProcessGroup._meet`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.errors import RefusedError, SimulationError
from lightrft.sim import collectives
from lightrft.sim.calls import Call, Group, Meeting, Signature
from lightrft.sim.current import _local
from lightrft.sim.places import caller_place
from lightrft.sim.point_to_point import post_receive, post_send
from lightrft.sim.scheduler import Killed
from lightrft.sim.works import CoalescedWork, CollectiveWork, DoneWork, deliver, poison

if TYPE_CHECKING:
    from lightrft.sim.profiles import Profile
    from lightrft.sim.rank import SimRank

__all__ = ["SimProcessGroup"]

_OP_NAMES = {
    getattr(dist.ReduceOp, name).op
    if hasattr(getattr(dist.ReduceOp, name), "op")
    else getattr(dist.ReduceOp, name): name
    for name in ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM")
}
_BITWISE = frozenset({"BAND", "BOR", "BXOR"})

Compute = Callable[[Meeting], list[Sequence[Tensor]]]


def _shapes(tensors: Sequence[Tensor]) -> tuple[Any, Any]:
    """Dtype and shape of one tensor; of several, tuples of them."""
    if len(tensors) == 1:
        return tensors[0].dtype, tensors[0].shape
    return tuple(t.dtype for t in tensors), tuple(t.shape for t in tensors)


class SimProcessGroup(dist.ProcessGroup):
    """One rank's handle of a :class:`~lightrft.sim.calls.Group`."""

    def __init__(self, rank: SimRank, group: Group, profile: Profile, store: Any) -> None:
        self._member = group.ranks.index(rank.index)
        super().__init__(self._member, group.size)
        self._rank = rank
        self._world = rank.world
        self._group = group
        self._profile = profile
        self._store = store
        self._sequence = 0
        self._coalesced: list[Any] | None = None
        self._bound_device: torch.device | None = None
        self.closed = False
        self._splits_made = 0
        self.made_at = caller_place(3)

    # -- what torch asks a group about itself -------------------------------------------------------------------

    @property
    def group_name(self) -> str:
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
    def supports_splitting(self) -> bool:
        """``split_group`` works on every simulated group."""
        return True

    @property
    def supports_coalescing(self) -> bool:
        """Batches are posted one by one, without blocking."""
        return False

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), torch.device("cuda")]

    @property
    def options(self) -> Any:
        """No backend options."""
        return None

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """A name of our own: for ``gloo`` C++ would ask the real backend for its devices."""
        return "simulated"

    def name(self) -> str:
        """As :meth:`getBackendName`."""
        return self._group.backend

    def _get_backend_name(self) -> str:
        return self._group.backend

    def _get_backend(self, device: Any) -> SimProcessGroup:
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
        """The group takes no more calls."""
        self.closed = True
        self._rank.touched(f"destroyed {self._group.title}")

    abort = shutdown

    def __repr__(self) -> str:
        return (
            f"<simulated {self._group.backend} group {self._group.name!r}, rank {self._member} of {self._group.size}>"
        )

    # -- meeting the other members ------------------------------------------------------------------------------

    def _call(self, signature: Signature, inputs: Sequence[Any] = (), peer: int | None = None, tag: int = 0) -> Call:
        task = _local.task
        if task is None or task.rank is not self._rank:
            raise SimulationError(
                f"{signature.operation} on a group of rank {self._rank.index} from a thread that is not this rank's: "
                "start the thread inside the rank, and use the group only there"
            )
        if task.killed:
            raise Killed
        if self.closed:
            raise RefusedError(f"{signature.operation}: the process group has been destroyed")
        if peer is None:
            self._sequence += 1
            number = self._sequence
        else:  # counted apart: only two members make them
            number = self._rank.count_message(self._group)
        call = Call(self._rank.index, self._group, number, signature, caller_place(3), task.scheduler.now)
        call.peer, call.tag = peer, tag
        self._world.record(call, inputs)
        return call

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
        call = self._call(signature, inputs)
        call.sizes = sizes
        group = self._group
        meeting = group.meetings.get(call.sequence)
        if meeting is None:
            meeting = group.meetings[call.sequence] = Meeting(call.sequence, group.size, call)
        elif meeting.first.signature != signature:
            self._world.disagree(meeting, call, self._member)
        asynchronous = getattr(opts, "asyncOp", True)
        member = self._member
        meeting.calls[member] = call
        meeting.arrived += 1
        work = None
        if asynchronous:
            call.async_op = True
            work = CollectiveWork(self._rank, call, meeting, member, inputs, outputs)
            inputs = work.hold()
        meeting.inputs[member] = inputs
        meeting.outputs[member] = outputs
        if meeting.arrived == group.size:
            self._complete(meeting, compute)
        elif not asynchronous:
            self._wait(meeting, call)
        if work is not None:
            return work
        assert meeting.results is not None
        call.done = True
        deliver(meeting.results[member], outputs)
        return None

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
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            problem: _Disagreement | None = None
            try:
                meeting.results = compute(meeting)
            except _Disagreement as error:
                problem = error
        finally:
            torch._C._set_grad_enabled(grad)
        if problem is not None:
            world.disagree_among(meeting, str(problem), problem.pairs)
        meeting.complete = True
        del self._group.meetings[meeting.sequence]
        world.scheduler.wake_all(meeting.waiters)
        meeting.waiters = []
        world.scheduler.interleave()

    # -- checks -------------------------------------------------------------------------------------------------

    def _check(self, operation: str, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if not tensor.is_contiguous():
                raise RefusedError(
                    f"{operation}: the tensor of shape {list(tensor.shape)} is not contiguous; nccl refuses it and gloo "
                    "gives wrong values: call .contiguous() first"
                )
            if tensor.device.type != "cpu":
                raise RefusedError(
                    f"{operation}: a tensor on {tensor.device}; simulated ranks keep all tensors on the CPU"
                )
            if self._profile.dtypes is not None and tensor.dtype not in self._profile.dtypes:
                raise RefusedError(f"{operation}: {tensor.dtype} is not supported by {self._backend_shown()}")

    def _backend_shown(self) -> str:
        return self._group.backend if self._profile.name == "strict" else self._profile.name

    def _op(self, opts: Any, tensors: Sequence[Tensor], operation: str) -> str:
        reduce_op = getattr(opts, "reduceOp", opts)
        name = _OP_NAMES.get(getattr(reduce_op, "op", reduce_op), "PREMUL_SUM")
        if name in self._profile.refused_ops or name == "PREMUL_SUM":
            raise RefusedError(f"{operation}: ReduceOp.{name} is not supported by {self._backend_shown()}")
        if name in _BITWISE or name == "AVG":
            for tensor in tensors:
                inexact = tensor.is_floating_point() or tensor.is_complex()
                if name in _BITWISE and inexact:
                    raise RefusedError(f"{operation}: ReduceOp.{name} needs integers, not {tensor.dtype}")
        return name

    def _reduction(self, op: str, sequence: int) -> Callable[[Sequence[Tensor]], Tensor]:
        order = self._world.numerics
        seed = 0 if order == "rank" else hash((self._world.seed, int(sequence)))
        return lambda tensors: collectives.reduce(tensors, op, order, seed)

    def _sizes(self, operation: str, what: str, expected: int, got: int) -> None:
        if expected != got:
            raise RefusedError(f"{operation}: {what} must have {expected} entries (the size of the group), got {got}")

    def _shape(self, shape: torch.Size) -> Any:
        return shape if self._profile.same_shape else (shape.numel(),)

    # -- collectives --------------------------------------------------------------------------------------------

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        """``all_reduce``: tensors are reduced in place."""
        tensors = _as_list(tensors)
        self._check("all_reduce", tensors)
        op = self._op(opts if opts is not None else dist.ReduceOp.SUM, tensors, "all_reduce")
        tensor = tensors[0]
        signature = Signature("all_reduce", tensor.dtype, self._shape(tensor.shape), op)
        return self._meet(
            signature,
            tensors,
            tensors,
            opts,
            lambda m: collectives.all_reduce(m.inputs, self._reduction(op, m.sequence)),
        )

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """``all_reduce`` of several tensors at once."""
        self._check("all_reduce_coalesced", tensors)
        op = self._op(opts if opts is not None else dist.ReduceOp.SUM, tensors, "all_reduce_coalesced")
        signature = Signature("all_reduce_coalesced", *_shapes(tensors), op)
        return self._meet(
            signature,
            tensors,
            tensors,
            opts,
            lambda m: collectives.all_reduce(m.inputs, self._reduction(op, m.sequence)),
        )

    def reduce(self, tensors: Any, opts: Any = None, *rest: Any) -> Any:
        """``reduce``: ``opts.rootRank`` gets the result; what the others hold afterwards is undefined."""
        tensors = _as_list(tensors)
        self._check("reduce", tensors)
        op, root = self._op(opts, tensors, "reduce"), opts.rootRank
        signature = Signature("reduce", tensors[0].dtype, self._shape(tensors[0].shape), op, self._group.ranks[root])
        work = self._meet(
            signature,
            tensors,
            tensors,
            opts,
            lambda m: collectives.reduce_to(m.inputs, self._reduction(op, m.sequence), root),
        )
        if work is None and self._member != root and self._profile.name != "nccl":
            with torch.no_grad():
                poison(tensors[0])  # gloo uses it as scratch space
        return work

    def broadcast(self, tensors: Any, opts: Any = None, *rest: Any) -> Any:
        """``broadcast`` from ``opts.rootRank``."""
        tensors = _as_list(tensors)
        self._check("broadcast", tensors)
        root = opts.rootRank
        dtype, shape = _shapes(tensors)
        signature = Signature(
            "broadcast", dtype, shape if len(tensors) > 1 else self._shape(shape), None, self._group.ranks[root]
        )
        outputs = [] if self._member == root else tensors
        return self._meet(signature, tensors, outputs, opts, lambda m: collectives.broadcast(m.inputs, root))

    def allgather(self, output_lists: Any, inputs: Any, opts: Any = None) -> Any:
        """``all_gather`` into a list; the sizes may differ from rank to rank where the backend allows it."""
        outputs = output_lists[0] if isinstance(output_lists[0], (list, tuple)) else output_lists
        inputs = _as_list(inputs)
        self._sizes("all_gather", "the output list", self._group.size, len(outputs))
        self._check("all_gather", (*inputs, *outputs))
        tensor = inputs[0]
        mine = outputs[self._member]
        if mine.numel() != tensor.numel() or mine.dtype != tensor.dtype:
            raise RefusedError(
                f"all_gather: output {self._member} is {mine.dtype}{list(mine.shape)} "
                f"but this rank contributes {tensor.dtype}{list(tensor.shape)}"
            )
        shapes = {t.shape for t in outputs}
        if len(shapes) > 1 and not self._profile.uneven:
            raise RefusedError(f"all_gather: tensors of different sizes are not supported by {self._backend_shown()}")
        shape: Any = tensor.shape if len(shapes) <= 1 else tuple(t.shape for t in outputs)
        signature = Signature("all_gather", tensor.dtype, shape)
        return self._meet(signature, inputs, outputs, opts, lambda m: collectives.all_gather(m.inputs))

    def allgather_coalesced(self, output_lists: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        """``all_gather`` of several tensors; ``output_lists[i]`` receives everybody's ``inputs[i]``."""
        for outputs in output_lists:
            self._sizes("all_gather_coalesced", "each output list", self._group.size, len(outputs))
        flat = [tensor for outputs in output_lists for tensor in outputs]
        self._check("all_gather_coalesced", (*inputs, *flat))
        signature = Signature("all_gather_coalesced", *_shapes(inputs))
        return self._meet(signature, inputs, flat, opts, lambda m: collectives.all_gather_lists(m.inputs))

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        """``all_gather_into_tensor``: everybody's tensor end to end."""
        self._check("all_gather_single", (output, tensor))
        self._fits("all_gather_single", "output", output, tensor.numel() * self._group.size)
        signature = Signature("all_gather_single", tensor.dtype, self._shape(tensor.shape))
        return self._meet(signature, [tensor], [output], opts, lambda m: collectives.all_gather_single(m.inputs))

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """``all_gather_into_tensor`` of several tensors."""
        self._check("all_gather_single_coalesced", (*inputs, *outputs))
        for output, tensor in zip(outputs, inputs, strict=True):
            self._fits("all_gather_single_coalesced", "output", output, tensor.numel() * self._group.size)
        signature = Signature("all_gather_single_coalesced", *_shapes(inputs))
        return self._meet(signature, inputs, outputs, opts, lambda m: collectives.all_gather_single(m.inputs))

    def gather(self, output_lists: Any, inputs: Any, opts: Any = None, *rest: Any) -> Any:
        """``gather`` to ``opts.rootRank``."""
        inputs = _as_list(inputs)
        root = opts.rootRank
        outputs = (
            list(output_lists[0]) if output_lists and isinstance(output_lists[0], (list, tuple)) else list(output_lists)
        )
        if self._member == root:
            self._sizes("gather", "the output list", self._group.size, len(outputs))
        self._check("gather", (*inputs, *outputs))
        signature = Signature("gather", inputs[0].dtype, self._shape(inputs[0].shape), None, self._group.ranks[root])
        return self._meet(signature, inputs, outputs, opts, lambda m: collectives.gather(m.inputs, root))

    def scatter(self, outputs: Any, input_lists: Any, opts: Any = None, *rest: Any) -> Any:
        """``scatter`` from ``opts.rootRank``."""
        outputs = _as_list(outputs)
        root = opts.rootRank
        inputs = (
            list(input_lists[0]) if input_lists and isinstance(input_lists[0], (list, tuple)) else list(input_lists)
        )
        if self._member == root:
            self._sizes("scatter", "the input list", self._group.size, len(inputs))
            for tensor in inputs:
                self._same("scatter", tensor, outputs[0])
        self._check("scatter", (*inputs, *outputs))
        signature = Signature("scatter", outputs[0].dtype, self._shape(outputs[0].shape), None, self._group.ranks[root])
        return self._meet(signature, inputs, outputs, opts, lambda m: collectives.scatter(m.inputs, root))

    def reduce_scatter(self, outputs: Any, input_lists: Any, opts: Any = None, *rest: Any) -> Any:
        """``reduce_scatter`` of a list: member ``m`` gets the reduction of everybody's ``m``-th tensor."""
        outputs = _as_list(outputs)
        inputs = list(input_lists[0]) if isinstance(input_lists[0], (list, tuple)) else list(input_lists)
        self._sizes("reduce_scatter", "the input list", self._group.size, len(inputs))
        self._check("reduce_scatter", (*inputs, *outputs))
        op = self._op(opts, inputs, "reduce_scatter")
        self._fits("reduce_scatter", "output", outputs[0], inputs[self._member].numel())
        signature = Signature("reduce_scatter", *_shapes(inputs), op)
        return self._meet(
            signature,
            inputs,
            outputs,
            opts,
            lambda m: collectives.reduce_scatter(m.inputs, self._reduction(op, m.sequence)),
        )

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        """``reduce_scatter_tensor``: member ``m`` gets the ``m``-th equal part of the reduction."""
        self._check("reduce_scatter_single", (output, tensor))
        op = self._op(opts, (tensor,), "reduce_scatter_single")
        self._fits("reduce_scatter_single", "input", tensor, output.numel() * self._group.size)
        signature = Signature("reduce_scatter_single", tensor.dtype, self._shape(tensor.shape), op)
        return self._meet(
            signature,
            [tensor],
            [output],
            opts,
            lambda m: collectives.reduce_scatter_single(m.inputs, self._reduction(op, m.sequence)),
        )

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """``reduce_scatter_tensor`` of several tensors."""
        self._check("reduce_scatter_single_coalesced", (*inputs, *outputs))
        op = self._op(opts, inputs, "reduce_scatter_single_coalesced")
        for output, tensor in zip(outputs, inputs, strict=True):
            self._fits("reduce_scatter_single_coalesced", "input", tensor, output.numel() * self._group.size)
        signature = Signature("reduce_scatter_single_coalesced", *_shapes(inputs), op)
        return self._meet(
            signature,
            inputs,
            outputs,
            opts,
            lambda m: collectives.reduce_scatter_single(m.inputs, self._reduction(op, m.sequence)),
        )

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """``all_to_all`` of lists."""
        self._sizes("all_to_all", "the output list", self._group.size, len(outputs))
        self._sizes("all_to_all", "the input list", self._group.size, len(inputs))
        self._check("all_to_all", (*inputs, *outputs))
        sizes = sum(t.numel() for t in inputs), sum(t.numel() for t in outputs)
        return self._meet(Signature("all_to_all", inputs[0].dtype), inputs, outputs, opts, self._all_to_all, sizes)

    def _all_to_all(self, meeting: Meeting) -> list[Sequence[Tensor]]:
        problems = []
        for sender, tensors in enumerate(meeting.inputs):
            for receiver, tensor in enumerate(tensors):
                expected = meeting.outputs[receiver][sender]
                if expected.numel() != tensor.numel() or expected.dtype != tensor.dtype:
                    sent, wanted = f"{tensor.dtype}{list(tensor.shape)}", f"{expected.dtype}{list(expected.shape)}"
                    problems.append((sender, receiver, sent, wanted))
        self._refuse_pairs("sizes", problems)
        return collectives.all_to_all(meeting.inputs)

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_splits: Any = None, input_splits: Any = None, opts: Any = None
    ) -> Any:
        """``all_to_all_single``; splits count along dimension 0, empty means equal parts."""
        self._check("all_to_all_single", (output, tensor))
        sending = self._splits("input", tensor, input_splits)
        receiving = self._splits("output", output, output_splits)
        even = not input_splits and not output_splits
        signature = Signature("all_to_all_single", tensor.dtype, tensor.shape if even else None)
        contributed: Any = [tensor, sending, receiving]
        sizes = tensor.numel(), output.numel()
        return self._meet(signature, contributed, [output], opts, self._all_to_all_single, sizes)

    def _all_to_all_single(self, meeting: Meeting) -> list[Sequence[Tensor]]:
        sending = [entry[1] for entry in meeting.inputs]
        receiving = [entry[2] for entry in meeting.inputs]
        problems = [
            (sender, receiver, str(size), str(receiving[receiver][sender]))
            for sender, sizes in enumerate(sending)
            for receiver, size in enumerate(sizes)
            if receiving[receiver][sender] != size
        ]
        self._refuse_pairs("split sizes", problems)
        return collectives.all_to_all_single([entry[:1] for entry in meeting.inputs], sending)

    def _refuse_pairs(self, what: str, problems: list[tuple[int, int, str, str]]) -> None:
        """Complain about pairs of members (sender, receiver, what is sent, what is expected), if there are any."""
        if problems:
            ranks = self._group.ranks
            sender, receiver, sent, expected = problems[0]
            raise _Disagreement(
                f"{what} differ: rank {ranks[sender]} sends {sent} to rank {ranks[receiver]}, which expects {expected}",
                [(ranks[problem[0]], ranks[problem[1]]) for problem in problems],
            )

    def _splits(self, what: str, tensor: Tensor, splits: Any) -> list[int]:
        size = self._group.size
        length = tensor.shape[0] if tensor.dim() else 0
        if not splits:
            if length % size:
                raise RefusedError(
                    f"all_to_all_single: dimension 0 of the {what} ({length}) is not divisible by the group size {size}"
                )
            return [length // size] * size
        self._sizes("all_to_all_single", f"{what}_split_sizes", size, len(splits))
        if sum(splits) != length:
            raise RefusedError(
                f"all_to_all_single: {what}_split_sizes add up to {sum(splits)}, dimension 0 of the {what} is {length}"
            )
        return list(splits)

    def barrier(self, opts: Any = None, *rest: Any) -> Any:
        """``barrier``."""
        return self._meet(_BARRIER, (), (), opts, _nothing)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """``monitored_barrier``: after ``timeout`` (virtual) the ranks that did not come are named.

        Raises:
            RuntimeError: some rank did not come in time.
        """
        call = self._call(Signature("monitored_barrier"))
        group = self._group
        meeting = group.meetings.get(call.sequence)
        if meeting is None:
            meeting = group.meetings[call.sequence] = Meeting(call.sequence, group.size, call)
        elif meeting.first.signature != call.signature:
            self._world.disagree(meeting, call, self._member)
        meeting.calls[self._member] = call
        meeting.arrived += 1
        if meeting.arrived == group.size:
            self._complete(meeting, _nothing)
            call.done = True
            return
        task = _local.task
        assert task is not None
        meeting.waiters.append(task)
        limit = group.timeout if timeout is None else round(timeout.total_seconds() * 1e9)
        # the first member monitors the others: it gives up first, and names them
        if task.scheduler.block(call, task.scheduler.now + limit + (0 if self._member == 0 else limit)):
            call.done = True
            return
        missing = [rank for rank, other in zip(group.ranks, meeting.calls, strict=True) if other is None]
        if self._member:
            raise RuntimeError(
                f"[Rank {self._rank.index}]: came to monitoredBarrier, but rank {group.ranks[0]}, which monitors it, has "
                "failed or never came"
            )
        shown = ", ".join(map(str, missing if wait_all_ranks else missing[:1]))
        plural = "s" if wait_all_ranks and len(missing) > 1 else ""
        raise RuntimeError(
            f"[Rank {self._rank.index}]: Rank{plural} {shown} failed to pass monitoredBarrier in {limit // 1_000_000} ms"
        )

    def meet_split(self, split: tuple[tuple[int, ...], ...]) -> int:
        """All members of the parent come together to split it; they must ask for the same split.

        Returns:
            how many splits the group has seen, this one included.
        """
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
        if not self._profile.any_source:
            raise RefusedError(f"recv without a source is not supported by {self._backend_shown()}: name the source")
        return self._post(post_receive, "recv", tensors, -1, tag)

    def _post(self, post: Any, operation: str, tensors: list[Tensor], peer: int, tag: int) -> Any:
        for tensor in tensors:
            if not tensor.is_contiguous():
                raise RefusedError(
                    f"{operation}: the tensor of shape {list(tensor.shape)} is not contiguous: call .contiguous() first"
                )
        call = self._call_point_to_point(operation, tensors, peer, tag)
        work = post(self, call, tensors, peer, tag)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _call_point_to_point(self, operation: str, tensors: list[Tensor], peer: int, tag: int) -> Call:
        sent = tensors if operation == "send" else ()
        other = self._group.ranks[peer] if peer >= 0 else -1
        return self._call(Signature(operation, *_shapes(tensors)), sent, other, tag)

    # -- coalescing ---------------------------------------------------------------------------------------------

    def _start_coalescing(self, device: Any = None) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: Any = None) -> Any:
        works, self._coalesced = self._coalesced or [], None
        return CoalescedWork(works) if works else DoneWork()

    # -- small checks -------------------------------------------------------------------------------------------

    def _fits(self, operation: str, what: str, tensor: Tensor, expected: int) -> None:
        if tensor.numel() != expected:
            raise RefusedError(
                f"{operation}: the {what} has {tensor.numel()} elements, expected {expected} for a group of {self._group.size}"
            )

    def _same(self, operation: str, left: Tensor, right: Tensor) -> None:
        if left.dtype != right.dtype or left.numel() != right.numel():
            raise RefusedError(
                f"{operation}: {left.dtype}{list(left.shape)} where {right.dtype}{list(right.shape)} is expected"
            )

    # -- names of other torch releases --------------------------------------------------------------------------

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


class _Disagreement(Exception):
    """Members agree on the operation but not on the sizes of what they exchange: the pairs of global ranks."""

    def __init__(self, message: str, pairs: list[tuple[int, int]]) -> None:
        super().__init__(message)
        self.pairs = pairs


class _Synchronous:
    asyncOp = False  # noqa: N815 - torch's name


_SYNCHRONOUS = _Synchronous()
_BARRIER = Signature("barrier")


def _nothing(meeting: Meeting) -> list[Sequence[Tensor]]:
    return [()] * len(meeting.calls)


def _as_list(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
