"""PG901 and on: one rank's own mistakes, refused on the rank that made them, and failures that reach the caller."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import (
    Again,
    Subject,
    all_gather_single,
    mine,
    reduce_scatter_single,
)


@contract.check(901)
def check_a_root_outside_the_group(subject: Subject) -> None:
    """A root that is no rank of the group is refused."""

    def body() -> None:
        dist.broadcast(mine(), dist.get_world_size())

    subject.refuses(body)


@contract.check(902)
def check_a_list_too_long(subject: Subject) -> None:
    """`all_gather` refuses a list with more entries than the group has ranks."""

    def body() -> None:
        dist.all_gather([torch.empty(2) for _ in range(dist.get_world_size() + 1)], mine())

    subject.refuses(body)


@contract.check(903)
def check_a_list_too_short(subject: Subject) -> None:
    """`reduce_scatter` refuses a list with fewer entries than the group has ranks."""

    def body() -> None:
        dist.reduce_scatter(torch.empty(2), [mine()] * (dist.get_world_size() - 1))

    subject.refuses(body, least=2)


@contract.check(904)
def check_lists_of_several_dtypes(subject: Subject) -> None:
    """`all_gather` refuses a list with tensors of another dtype."""

    def body() -> None:
        dist.all_gather([torch.empty(2, dtype=torch.float64) for _ in range(dist.get_world_size())], mine())

    subject.refuses(body)


@contract.check(905)
def check_an_output_of_another_size(subject: Subject) -> None:
    """`all_gather_into_tensor` refuses an output that the parts do not fill exactly."""

    def body() -> None:
        all_gather_single(torch.empty(2 * dist.get_world_size() + 1), mine())

    subject.refuses(body)


@contract.check(906)
def check_an_output_of_another_dtype(subject: Subject) -> None:
    """`all_gather_into_tensor` and `reduce_scatter_tensor` refuse an output of another dtype."""

    def gather() -> None:
        all_gather_single(torch.empty(2 * dist.get_world_size(), dtype=torch.float64), mine())

    def scatter() -> None:
        reduce_scatter_single(torch.empty(2, dtype=torch.float64), mine(2 * dist.get_world_size()))

    subject.refuses(gather, scatter)


@contract.check(907)
def check_an_input_of_another_size(subject: Subject) -> None:
    """`reduce_scatter_tensor` refuses an input that is not as large as all outputs together."""

    def body() -> None:
        reduce_scatter_single(torch.empty(2), mine(2 * dist.get_world_size() + 1))

    subject.refuses(body)


@contract.check(908)
def check_splits_that_do_not_add_up(subject: Subject) -> None:
    """`all_to_all_single` refuses splits that do not add up to the tensor."""

    def body() -> None:
        size = dist.get_world_size()
        dist.all_to_all_single(torch.empty(size), mine(size), [1] * size, [2] * size)

    subject.refuses(body)


@contract.check(909)
def check_splits_of_another_number(subject: Subject) -> None:
    """`all_to_all_single` refuses a number of splits that is not the size of the group."""

    def body() -> None:
        size = dist.get_world_size()
        dist.all_to_all_single(torch.empty(size + 1), mine(size + 1), [1] * (size + 1), [1] * (size + 1))

    subject.refuses(body)


@contract.check(910, "refuses_indivisible", probed=False)
def check_a_tensor_that_cannot_be_split(subject: Subject) -> None:
    """`all_to_all_single` without splits refuses a dimension that the group size does not divide."""

    def body() -> None:
        size = dist.get_world_size()
        dist.all_to_all_single(torch.empty(size + 1), mine(size + 1))

    subject.refuses(body, least=2)


@contract.check(911)
def check_strided_messages(subject: Subject) -> None:
    """Messages of tensors that are not contiguous are refused."""

    def send() -> None:
        dist.isend(mine(4)[::2], (dist.get_rank() + 1) % dist.get_world_size())

    def receive() -> None:
        dist.irecv(mine(4)[::2], (dist.get_rank() + 1) % dist.get_world_size())

    subject.refuses(send, receive, least=2)


@contract.check(912, "refuses_strided")
def check_strided_all_reduce(subject: Subject) -> None:
    """`all_reduce` refuses a tensor that is not contiguous."""
    subject.refuses(lambda: dist.all_reduce(mine(4)[::2]))


@contract.check(913, "refuses_strided")
def check_strided_broadcast(subject: Subject) -> None:
    """`broadcast` refuses a tensor that is not contiguous."""
    subject.refuses(lambda: dist.broadcast(mine(4)[::2], 0))


@contract.check(914)
def check_strided_all_to_all_single(subject: Subject) -> None:
    """`all_to_all_single` refuses an input that is not contiguous."""

    def body() -> None:
        size = dist.get_world_size()
        dist.all_to_all_single(torch.empty(size), mine(2 * size)[::2])

    subject.refuses(body, least=2)


@contract.check(915)
def check_bits_of_floats(subject: Subject) -> None:
    """Bitwise reductions of floating point are refused."""
    subject.refuses(lambda: dist.all_reduce(mine(), dist.ReduceOp.BAND))


@contract.check(916)
def check_an_average_of_booleans(subject: Subject) -> None:
    """AVG of bool is refused."""
    subject.refuses(lambda: dist.all_reduce(torch.ones(2, dtype=torch.bool), dist.ReduceOp.AVG))


@contract.check(917)
def check_the_smallest_complex_number(subject: Subject) -> None:
    """MIN, MAX and PRODUCT of complex numbers are refused."""
    subject.refuses(
        lambda: dist.all_reduce(mine(dtype=torch.complex64), dist.ReduceOp.MIN),
        lambda: dist.all_reduce(mine(dtype=torch.complex64), dist.ReduceOp.MAX),
        lambda: dist.all_reduce(mine(dtype=torch.complex64), dist.ReduceOp.PRODUCT),
    )


@contract.check(918)
def check_outputs_of_gather(subject: Subject) -> None:
    """`gather` refuses a root without outputs, and outputs on another rank."""

    def body() -> None:
        at_root = dist.get_rank() == 0
        dist.gather(mine(), None if at_root else [torch.empty(2) for _ in range(dist.get_world_size())], 0)

    subject.refuses(body)


@contract.check(919)
def check_inputs_of_scatter(subject: Subject) -> None:
    """`scatter` refuses a root without inputs, and inputs on another rank."""

    def body() -> None:
        at_root = dist.get_rank() == 0
        dist.scatter(torch.empty(2), None if at_root else [mine() for _ in range(dist.get_world_size())], 0)

    subject.refuses(body)


@contract.check(920)
def check_messages_to_oneself(subject: Subject) -> None:
    """`send` refuses the own rank."""
    subject.refuses(lambda: dist.send(mine(), dist.get_rank()))


@contract.check(921)
def check_impossible_ranks(subject: Subject) -> None:
    """`new_group` refuses ranks that do not exist, or come twice."""
    subject.refuses(lambda: dist.new_group([0, dist.get_world_size()]), lambda: dist.new_group([0, 0]))


@contract.check(922)
def check_no_group_before_the_first(subject: Subject) -> None:
    """A collective without a default group is refused."""
    backend = subject.backend

    def body() -> object:
        again = Again(backend)
        dist.destroy_process_group()
        try:
            dist.all_reduce(torch.ones(1))
        except (RuntimeError, ValueError):
            outcome = "refused"
        else:
            outcome = "accepted"
        again.init()
        return outcome

    subject.expect(body, lambda _rank, _size: "refused")


@contract.check(923)
def check_one_default_group(subject: Subject) -> None:
    """A second default group is refused."""
    backend = subject.backend
    subject.refuses(lambda: dist.init_process_group(backend))


@contract.check(924, "refuses_destroyed")
def check_a_group_that_is_destroyed(subject: Subject) -> None:
    """`torch.distributed` refuses a group that has been destroyed."""

    def body() -> None:
        group = dist.new_group()
        dist.destroy_process_group(group)
        dist.all_reduce(torch.ones(1), group=group)

    subject.refuses(body)


@contract.check(925, "refuses_destroyed")
def check_a_handle_that_is_destroyed(subject: Subject) -> None:
    """The handle of a group that has been destroyed refuses all calls."""

    def body() -> None:
        group = dist.new_group()
        dist.destroy_process_group(group)
        group.allreduce([torch.ones(1)]).wait()

    subject.refuses(body, least=2)


@contract.check(926, "refuses_leaf_outputs")
def check_outputs_that_require_grad(subject: Subject) -> None:
    """While autograd records, `all_gather_into_tensor` refuses an output that requires grad."""

    def body() -> None:
        all_gather_single(torch.zeros(2 * dist.get_world_size(), requires_grad=True), mine())

    subject.refuses(body)


@contract.check(927)
def check_outputs_of_another_shape(subject: Subject) -> None:
    """`gather` and `scatter` refuse a list of tensors of another size."""

    def gather() -> None:
        outputs = [torch.empty(3) for _ in range(dist.get_world_size())]
        dist.gather(mine(), outputs if dist.get_rank() == 0 else None, 0)
        if dist.get_rank():
            raise ValueError("the other ranks have no outputs to refuse")

    def alone() -> None:
        if dist.get_world_size() > 1:
            group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            dist.gather(mine(), [torch.empty(3)], dist.get_rank(), group=group)
        else:
            gather()

    subject.refuses(alone)


@contract.check(928)
def check_exceptions_reach_the_caller(subject: Subject) -> None:
    """An exception of one rank ends the run, though others wait for that rank, and is the cause of the error."""

    def body() -> None:
        if dist.get_rank() == 1:
            raise KeyError("the reward model")
        dist.all_reduce(mine())

    error = subject.fails(body)
    assert isinstance(error.__cause__, KeyError), repr(error.__cause__)
    assert error.__cause__.args == ("the reward model",), error.__cause__
    assert "rank 1" in str(error), error


@contract.check(929)
def check_refusals_reach_the_caller(subject: Subject) -> None:
    """A refused call that nobody catches ends the run with its error as the cause."""

    def body() -> None:
        all_gather_single(torch.empty(2 * dist.get_world_size() + 1), mine())

    error = subject.fails(body, ranks=1)
    assert isinstance(error.__cause__, (RuntimeError, ValueError)), repr(error.__cause__)


@contract.check(930, "refuses_missing_peers", probed=False)
def check_messages_to_nobody(subject: Subject) -> None:
    """`send` and `recv` refuse a rank that does not exist."""
    subject.refuses(
        lambda: dist.send(mine(), dist.get_world_size()),
        lambda: dist.recv(mine(), dist.get_world_size()),
        least=2,
    )
