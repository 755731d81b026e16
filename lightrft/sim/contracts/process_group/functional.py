"""PG601 and on: functional collectives, and those that autograd knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.nn.functional as dnn
from torch import Tensor

from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import Subject, everybodys, flat, last_rank, lists, mine, total


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


@contract.check(601)
def check_functional_all_reduce(subject: Subject) -> None:
    """The functional `all_reduce` returns the reduction and leaves its input alone."""

    def body() -> object:
        tensor = mine()
        found = [fc.all_reduce(tensor, op, _world()).tolist() for op in ("sum", "avg", "min", "max")]
        return found, tensor.equal(mine())

    def expected(_rank: int, size: int) -> object:
        rows, summed = everybodys(size), total(size)
        return [summed, [value / size for value in summed], rows[0], rows[-1]], True

    subject.expect(body, expected)


@contract.check(602)
def check_functional_broadcast(subject: Subject) -> None:
    """The functional `broadcast` returns the tensor of its root."""

    def body() -> object:
        return fc.broadcast(mine(), last_rank(), _world()).tolist()

    subject.expect(body, lambda _rank, size: everybodys(size)[-1])


@contract.check(603)
def check_functional_all_gather(subject: Subject) -> None:
    """`all_gather_tensor` puts everybody's tensors end to end along the dimension that it is given."""

    def body() -> object:
        rows = mine().reshape(1, 2)
        return [fc.all_gather_tensor(rows, dim, _world()).tolist() for dim in (0, 1)]

    subject.expect(body, lambda _rank, size: [everybodys(size), [flat(everybodys(size))]])


@contract.check(604)
def check_functional_reduce_scatter(subject: Subject) -> None:
    """`reduce_scatter_tensor` gives rank `r` the `r`-th part of the reduction along the dimension that it is given."""

    def body() -> object:
        size = dist.get_world_size()
        shapes = ((size, 1), (1, size))
        return [
            fc.reduce_scatter_tensor(mine(size).reshape(shape), "sum", dim, _world()).item()
            for dim, shape in enumerate(shapes)
        ]

    subject.expect(body, lambda rank, size: [total(size, size)[rank]] * 2)


@contract.check(605)
def check_functional_all_to_all(subject: Subject) -> None:
    """The functional `all_to_all_single` returns what the splits say, or equal parts."""

    def body() -> object:
        rank, size = dist.get_rank(), dist.get_world_size()
        even = fc.all_to_all_single(mine(size), None, None, _world())
        uneven = fc.all_to_all_single(
            torch.full((rank * size,), float(rank)), list(range(size)), [rank] * size, _world()
        )
        return even.tolist(), uneven.tolist()

    subject.expect(
        body,
        lambda rank, size: (
            [row[rank] for row in everybodys(size, size)],
            [float(sender) for sender in range(size) for _ in range(sender)],
        ),
    )


@contract.check(606)
def check_functional_coalesced(subject: Subject) -> None:
    """The coalesced functional collectives do to each tensor what the others do to one."""

    def body() -> object:
        size, world = dist.get_world_size(), _world()
        summed = fc.all_reduce_coalesced([mine(), mine(1)], "sum", world)
        gathered = fc.all_gather_into_tensor_coalesced([mine(), mine(1)], world)
        parts = fc.reduce_scatter_tensor_coalesced([mine(size), mine(2 * size)], "sum", [0, 0], world)
        return [lists(tensors) for tensors in (summed, gathered, parts)]

    subject.expect(
        body,
        lambda rank, size: [
            [total(size), total(size, 1)],
            [flat(everybodys(size)), flat(everybodys(size, 1))],
            [[total(size, size)[rank]], total(size, 2 * size)[2 * rank : 2 * rank + 2]],
        ],
    )


@contract.check(607)
def check_permute_tensor(subject: Subject) -> None:
    """`permute_tensor` sends everybody's tensor where the list says."""

    def body() -> object:
        size = dist.get_world_size()
        return fc.permute_tensor(mine(), [(rank + 1) % size for rank in range(size)], _world()).tolist()

    subject.expect(body, lambda rank, size: everybodys(size)[rank - 1])


@contract.check(608)
def check_functional_results_wait_when_used(subject: Subject) -> None:
    """The result of a functional collective is waited for when it is used, in any order."""

    def body() -> object:
        results = [fc.all_reduce(mine() + position, "sum", _world()) for position in range(3)]
        order = (0, 1, 2) if dist.get_rank() else (2, 0, 1)
        found = {position: (results[position] * 1).tolist() for position in order}
        return [found[position] for position in range(3)]

    subject.expect(
        body, lambda _rank, size: [[value + position * size for value in total(size)] for position in range(3)]
    )


@contract.check(609)
def check_functional_inputs_may_be_strided(subject: Subject) -> None:
    """Functional collectives take tensors that are not contiguous."""

    def body() -> object:
        return fc.all_reduce(mine(6).reshape(2, 3).t(), "sum", _world()).tolist()

    subject.expect(body, lambda _rank, size: [[total(size, 6)[n], total(size, 6)[n + 3]] for n in range(3)])


@contract.check(610)
def check_functional_results_go_on(subject: Subject) -> None:
    """The result of a functional collective may be the input of the next one."""

    def body() -> object:
        world = _world()
        return fc.all_gather_tensor(fc.all_reduce(mine(), "sum", world), 0, world).tolist()

    subject.expect(body, lambda _rank, size: total(size) * size)


# -- gradients --------------------------------------------------------------------------------------------------------

Call = Callable[[Tensor], Any]
Formula = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def _weighted(rank: int, output: Tensor) -> Tensor:
    """A loss in which every element of every rank counts differently."""
    flat_output = output.reshape(-1)
    return (flat_output * (torch.arange(1.0, flat_output.numel() + 1) + rank)).sum()


def _differentiates(subject: Subject, call: Call, formula: Formula, count: int = 6) -> None:
    """Outputs and gradients of ``call`` are those of ``formula``, which maps everybody's tensors to all outputs."""

    def body() -> object:
        tensor = mine(count).requires_grad_()
        output = call(tensor)
        output = torch.cat(tuple(output)) if isinstance(output, (list, tuple)) else output
        _weighted(dist.get_rank(), output).backward()
        assert tensor.grad is not None
        return output.tolist(), tensor.grad.tolist()

    found = subject.run(body)
    tensors = [torch.tensor(row, requires_grad=True) for row in everybodys(len(found), count)]
    outputs = formula(tensors)
    torch.stack([_weighted(rank, output) for rank, output in enumerate(outputs)]).sum().backward()
    for rank, (output, tensor) in enumerate(zip(outputs, tensors, strict=True)):
        assert tensor.grad is not None
        wanted = output.tolist(), tensor.grad.tolist()
        assert found[rank] == wanted, f"rank {rank} has {found[rank]} and should have {wanted}"


def _to_all(part: Tensor, size: int) -> list[Tensor]:
    return [part] * size


def _summed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def _exchanged(tensors: Sequence[Tensor]) -> list[Tensor]:
    size = len(tensors)
    return [torch.cat([tensor.chunk(size)[rank] for tensor in tensors]) for rank in range(size)]


@contract.check(621)
def check_gradient_of_all_gather(subject: Subject) -> None:
    """Gradients flow through `nn.functional.all_gather`."""
    _differentiates(subject, dnn.all_gather, lambda xs: _to_all(torch.cat(list(xs)), len(xs)))


@contract.check(622)
def check_gradient_of_all_reduce(subject: Subject) -> None:
    """Gradients flow through `nn.functional.all_reduce`."""
    _differentiates(subject, dnn.all_reduce, lambda xs: _to_all(_summed(xs), len(xs)))


@contract.check(623)
def check_gradient_of_broadcast(subject: Subject) -> None:
    """Gradients flow through `nn.functional.broadcast`, to its root."""
    _differentiates(
        subject, lambda x: dnn.broadcast(x, last_rank()), lambda xs: _to_all(xs[-1] + 0 * _summed(xs), len(xs))
    )


@contract.check(624)
def check_gradient_of_reduce_scatter(subject: Subject) -> None:
    """Gradients flow through `nn.functional.reduce_scatter`."""

    def call(tensor: Tensor) -> Any:
        parts = list(tensor.chunk(dist.get_world_size()))
        return dnn.reduce_scatter(torch.empty_like(parts[0]), parts)

    _differentiates(subject, call, lambda xs: _summed(xs).chunk(len(xs)))


@contract.check(625)
def check_gradient_of_all_to_all(subject: Subject) -> None:
    """Gradients flow through `nn.functional.all_to_all`."""

    def call(tensor: Tensor) -> Any:
        parts = list(tensor.chunk(dist.get_world_size()))
        return dnn.all_to_all([torch.empty_like(part) for part in parts], parts)

    _differentiates(subject, call, _exchanged)


@contract.check(626)
def check_gradient_of_all_to_all_single(subject: Subject) -> None:
    """Gradients flow through `nn.functional.all_to_all_single`."""
    _differentiates(subject, lambda x: dnn.all_to_all_single(torch.empty_like(x), x), _exchanged)


@contract.check(627)
def check_gradient_of_scatter(subject: Subject) -> None:
    """Gradients flow through `nn.functional.scatter`, to its root."""
    _differentiates(
        subject,
        lambda x: dnn.scatter(list(x.chunk(dist.get_world_size())), last_rank()),
        lambda xs: [part + 0 * _summed(xs).sum() for part in xs[-1].chunk(len(xs))],
    )


@contract.check(628)
def check_gradient_of_functional_all_gather(subject: Subject) -> None:
    """Gradients flow through `all_gather_tensor_autograd`."""
    _differentiates(
        subject,
        lambda x: fc.all_gather_tensor_autograd(x, 0, _world()),
        lambda xs: _to_all(torch.cat(list(xs)), len(xs)),
    )


@contract.check(629)
def check_gradient_of_functional_reduce_scatter(subject: Subject) -> None:
    """Gradients flow through `reduce_scatter_tensor_autograd`."""
    _differentiates(
        subject,
        lambda x: fc.reduce_scatter_tensor_autograd(x, "sum", 0, _world()),
        lambda xs: _summed(xs).chunk(len(xs)),
    )


@contract.check(630)
def check_gradient_of_functional_all_to_all(subject: Subject) -> None:
    """Gradients flow through `all_to_all_single_autograd`."""
    _differentiates(subject, lambda x: fc.all_to_all_single_autograd(x, None, None, _world()), _exchanged)


@contract.check(631)
def check_parameters_are_written_to(subject: Subject) -> None:
    """`all_reduce` and `broadcast` write to a parameter, of which autograd sees nothing."""

    def body() -> object:
        parameter = torch.nn.Parameter(mine())
        dist.broadcast(parameter, last_rank())
        dist.all_reduce(parameter)
        return parameter.tolist(), parameter.grad_fn is None

    subject.expect(body, lambda _rank, size: ([value * size for value in everybodys(size)[-1]], True))


@contract.check(632)
def check_hooks_reduce_gradients(subject: Subject) -> None:
    """Hooks may reduce gradients during the backward pass, asynchronously."""

    def body() -> object:
        weights = [torch.ones(2, requires_grad=True) for _ in range(2)]
        works: list[Any] = []
        for weight in weights:
            weight.register_post_accumulate_grad_hook(
                lambda tensor: works.append(dist.all_reduce(tensor.grad, async_op=True))
            )
        (weights[0] * weights[1] * (dist.get_rank() + 1)).sum().backward()
        for work in works:
            work.wait()
        return len(works), [weight.grad is not None and weight.grad.tolist() for weight in weights]

    subject.expect(body, lambda _rank, size: (2, [[size * (size + 1) / 2] * 2] * 2))
