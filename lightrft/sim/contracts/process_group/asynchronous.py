"""PG501 and on: calls that return at once, barriers, and the coalescing manager."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightrft.errors import CollectiveTimeoutError, RankFailedError
from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import (
    Subject,
    all_gather_single,
    everybodys,
    flat,
    last_rank,
    lists,
    mine,
    reduce_scatter_single,
    total,
)


@contract.check(501)
def check_results_are_there_after_wait(subject: Subject) -> None:
    """With `async_op=True` the results of every collective are in the outputs after `wait`."""

    def body() -> object:
        size, root = dist.get_world_size(), last_rank()
        at_root = dist.get_rank() == root
        reduced, shared, single, exchanged, part, piece, own = (
            mine(),
            mine(),
            torch.empty(2 * size),
            torch.empty(size),
            torch.empty(1),
            torch.empty(1),
            torch.empty(2),
        )
        gathered, collected = [torch.empty(2) for _ in range(size)], [torch.empty(2) for _ in range(size)]
        works = [
            dist.all_reduce(reduced, async_op=True),
            dist.broadcast(shared, root, async_op=True),
            dist.all_gather(gathered, mine(), async_op=True),
            all_gather_single(single, mine(), async_op=True),
            dist.all_to_all_single(exchanged, mine(size), async_op=True),
            reduce_scatter_single(part, mine(size), async_op=True),
            dist.reduce_scatter(piece, list(mine(size).split(1)), async_op=True),
            dist.gather(mine(), collected if at_root else None, root, async_op=True),
            dist.scatter(own, [mine() for _ in range(size)] if at_root else None, root, async_op=True),
        ]
        for work in works:
            work.wait()
        found = [reduced, shared, *gathered, single, exchanged, part, piece, own, *(collected if at_root else [])]
        return lists(found)

    def expected(rank: int, size: int) -> object:
        rows, part = everybodys(size), [total(size, size)[rank]]
        exchanged = [row[rank] for row in everybodys(size, size)]
        found = [total(size), rows[-1], *rows, flat(rows), exchanged, part, part, rows[-1]]
        return [*found, *(rows if rank == size - 1 else [])]

    subject.expect(body, expected)


@contract.check(502)
def check_waits_in_any_order(subject: Subject) -> None:
    """Handles may be waited for in any order, another one on each rank, and more than once."""

    def body() -> object:
        tensors = [mine() + position for position in range(4)]
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for position in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0))[dist.get_rank()]:
            works[position].wait()
        for work in works:
            work.wait()
        return lists(tensors)

    subject.expect(
        body, lambda _rank, size: [[value + position * size for value in total(size)] for position in range(4)]
    )


@contract.check(503)
def check_the_order_of_issue_decides(subject: Subject) -> None:
    """Which calls belong together is decided by the order in which each rank issued them on the group."""

    def body() -> object:
        first, second = torch.ones(1), torch.full((1,), 10.0)
        one, two = dist.all_reduce(first, async_op=True), dist.all_reduce(second, async_op=True)
        for work in (one, two) if dist.get_rank() else (two, one):
            work.wait()
        return first.item(), second.item()

    subject.expect(body, lambda _rank, size: (1.0 * size, 10.0 * size))


@contract.check(504)
def check_crossed_groups(subject: Subject) -> None:
    """Two groups may be entered in another order on each rank, if nobody waits in between."""

    def body() -> object:
        groups, tensors = [dist.new_group(), dist.new_group()], [torch.ones(1), torch.full((1,), 10.0)]
        order = (0, 1) if dist.get_rank() % 2 else (1, 0)
        works = [dist.all_reduce(tensors[n], group=groups[n], async_op=True) for n in order]
        for work in works:
            work.wait()
        return lists(tensors)

    subject.expect(body, lambda _rank, size: [[1.0 * size], [10.0 * size]], ranks=4)


@contract.check(505)
def check_a_handle_knows_when_it_is_complete(subject: Subject) -> None:
    """After `wait`, `is_completed` is true."""

    def body() -> object:
        tensor = mine()
        work = dist.all_reduce(tensor, async_op=True)
        work.wait()
        tensor.tolist()
        return work.is_completed()

    subject.expect(body, lambda _rank, _size: True)


@contract.check(506)
def check_synchronous_calls_in_between(subject: Subject) -> None:
    """Between issue and wait, other calls may be made on the same group."""

    def body() -> object:
        early, late = mine(), mine(1)
        work = dist.all_reduce(early, async_op=True)
        dist.all_reduce(late)
        dist.barrier()
        work.wait()
        return early.tolist(), late.tolist()

    subject.expect(body, lambda _rank, size: (total(size), total(size, 1)))


@contract.check(507)
def check_futures(subject: Subject) -> None:
    """`get_future` of an `all_reduce` and of an `all_gather` gives the outputs."""

    def body() -> object:
        tensor, outputs = mine(), [torch.empty(2) for _ in range(dist.get_world_size())]
        reduced = dist.all_reduce(tensor, async_op=True).get_future().wait()
        gathered = dist.all_gather(outputs, mine(), async_op=True).get_future().wait()
        return lists(reduced), lists(gathered[0] if isinstance(gathered[0], list) else gathered)

    subject.expect(body, lambda _rank, size: ([total(size)], everybodys(size)))


@contract.check(508)
def check_then(subject: Subject) -> None:
    """What is chained to a future with `then` sees the result."""

    def body() -> object:
        future = dist.all_reduce(mine(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] * 2).wait().tolist()

    subject.expect(body, lambda _rank, size: [2 * value for value in total(size)])


@contract.check(509, "more_futures")
def check_futures_of_reduce_scatter(subject: Subject) -> None:
    """`get_future` of a `reduce_scatter_tensor` gives the output."""

    def body() -> object:
        size, output = dist.get_world_size(), torch.empty(1)
        reduce_scatter_single(output, mine(size), async_op=True).get_future().wait()
        return output.tolist()

    subject.expect(body, lambda rank, size: [total(size, size)[rank]])


@contract.check(510, "hides_results", probed=False)
def check_outputs_are_poison_before_wait(subject: Subject) -> None:
    """Before `wait` an output of floating point is NaN, also when everybody has come."""

    def body() -> object:
        tensor, gathered = mine(), torch.zeros(2 * dist.get_world_size())
        works = [dist.all_reduce(tensor, async_op=True), all_gather_single(gathered, mine(), async_op=True)]
        dist.barrier()
        hidden = tensor.isnan().all().item(), gathered.isnan().all().item()
        for work in works:
            work.wait()
        return hidden

    subject.expect(body, lambda _rank, _size: (True, True), least=2)


@contract.check(511, "hides_results", probed=False)
def check_inputs_under_way_stay(subject: Subject) -> None:
    """An input that is changed before `wait` is an error that names the call."""

    def body() -> object:
        size, tensor = dist.get_world_size(), mine()
        work = all_gather_single(torch.empty(2 * size), tensor, async_op=True)
        tensor += 1
        work.wait()
        return tensor.tolist()

    error = subject.fails(body)
    assert "all_gather" in str(error), error


@contract.check(512, "hides_results", probed=False)
def check_handles_are_waited_for(subject: Subject) -> None:
    """A handle that nobody waits for is reported at the end, with its call and line."""

    def body() -> None:
        dist.all_reduce(mine(), async_op=True)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        subject.run(body)
    assert any("never waited for" in str(warning.message) for warning in seen), seen


@contract.check(513)
def check_barrier(subject: Subject) -> None:
    """Nobody leaves a `barrier` before everybody has come."""

    def body() -> object:
        store = distributed_c10d._get_default_store()
        time.sleep(0.01 * dist.get_rank())
        store.set(f"came {dist.get_rank()}", "yes")
        dist.barrier()
        return [store.check([f"came {rank}"]) for rank in range(dist.get_world_size())]

    subject.expect(body, lambda _rank, size: [True] * size)


@contract.check(514)
def check_barriers_of_every_kind(subject: Subject) -> None:
    """`barrier` may be asynchronous."""

    def body() -> object:
        work = dist.barrier(async_op=True)
        work.wait()
        dist.barrier()
        tensor = mine()
        dist.all_reduce(tensor)
        return tensor.tolist()

    subject.expect(body, lambda _rank, size: total(size))


@contract.check(515, "monitored_barrier")
def check_monitored_barrier(subject: Subject) -> None:
    """`monitored_barrier` passes when everybody comes."""

    def body() -> object:
        dist.monitored_barrier(timeout=timedelta(seconds=30))
        return True

    subject.expect(body, lambda _rank, _size: True)


@contract.check(516, "monitored_barrier")
def check_monitored_barrier_names_who_is_missing(subject: Subject) -> None:
    """`monitored_barrier` names, on rank 0, a rank that did not come in time."""

    def body() -> object:
        group, message = dist.new_group(), ""
        if dist.get_rank() != 1:
            try:
                dist.monitored_barrier(group, timeout=timedelta(seconds=0.3))
            except RuntimeError as error:
                message = str(error)
        else:
            time.sleep(0.6)
        dist.barrier()
        return dist.get_rank() > 0 or "Rank 1 failed" in message or message

    subject.expect(body, lambda _rank, _size: True, least=2)


@contract.check(517)
def check_timeouts(subject: Subject) -> None:
    """A collective that outlasts the timeout of its group ends the run with an error."""

    def body() -> object:
        group, tensor = dist.new_group(timeout=timedelta(seconds=1)), torch.ones(1)
        dist.barrier()
        if dist.get_rank() == 1:
            time.sleep(10)
        dist.all_reduce(tensor, group=group)
        return tensor.tolist()

    started = time.monotonic()
    error = subject.fails(body, ranks=2)
    took = time.monotonic() - started
    assert took < 8, f"the run took {took:.1f} s"
    assert isinstance(error, (CollectiveTimeoutError, RankFailedError)), repr(error)


@contract.check(518)
def check_coalescing_manager(subject: Subject) -> None:
    """`_coalescing_manager()` batches calls of one kind, and their results are there behind it."""

    def body() -> object:
        size = dist.get_world_size()
        one, two, gathered, part = mine(), mine(1), torch.empty(size), torch.empty(1)
        with distributed_c10d._coalescing_manager():
            dist.all_reduce(one)
            dist.all_reduce(two)
        with distributed_c10d._coalescing_manager():
            all_gather_single(gathered, mine(1))
        with distributed_c10d._coalescing_manager(async_ops=True) as manager:
            reduce_scatter_single(part, mine(size))
        manager.wait()
        return lists([one, two, gathered, part])

    subject.expect(
        body,
        lambda rank, size: [total(size), total(size, 1), flat(everybodys(size, 1)), [total(size, size)[rank]]],
    )


@contract.check(519, "device_coalescing")
def check_coalescing_manager_with_a_device(subject: Subject) -> None:
    """`_coalescing_manager(device=...)` batches calls of any kind."""
    device = torch.device(subject.device)

    def body() -> object:
        shared, reduced = mine(), mine()
        with distributed_c10d._coalescing_manager(device=device):
            dist.broadcast(shared, 0)
            dist.all_reduce(reduced)
        return lists([shared, reduced])

    subject.expect(body, lambda _rank, size: [[0.0, 1.0], total(size)])
