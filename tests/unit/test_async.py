"""``async_op=True``: the result arrives at ``wait()``, and nobody may touch what is under way."""

import threading
import time
from datetime import timedelta
from types import FunctionType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import all_gather_single, on_ranks, reduce_scatter_single
from torch.distributed import distributed_c10d

from lightrft.errors import CollectiveTimeoutError, DeadlockError, RankFailedError, RefusedError, UnfinishedError
from lightrft.sim import SimWorld, works

SEEDS = range(6)


class Issued(NamedTuple):
    """A collective under way: its work, an input that it reads, if any, and the outputs that it writes."""

    work: Any
    given: torch.Tensor | None
    outputs: list[torch.Tensor]


def tensor(count=2):
    return torch.full((count,), 2.0)


def tensors():
    return [tensor() for _ in range(dist.get_world_size())]


def in_place(call):
    output = tensor()
    return Issued(call(output), None, [output])


def broadcast():
    output = tensor()
    return Issued(dist.broadcast(output, 0, async_op=True), None, [output] if dist.get_rank() else [])


def all_gather():
    given, outputs = tensor(), tensors()
    return Issued(dist.all_gather(outputs, given, async_op=True), given, outputs)


def gather():
    given, outputs = tensor(), None if dist.get_rank() else tensors()
    return Issued(dist.gather(given, outputs, async_op=True), given, outputs or [])


def scatter():
    output, inputs = tensor(), None if dist.get_rank() else tensors()
    return Issued(dist.scatter(output, inputs, async_op=True), inputs and inputs[-1], [output])


def from_list(call):
    output, inputs = tensor(), tensors()
    return Issued(call(output, inputs, async_op=True), inputs[-1], [output])


def all_to_all():
    outputs, inputs = tensors(), tensors()
    return Issued(dist.all_to_all(outputs, inputs, async_op=True), inputs[-1], outputs)


def single(call, output, given):
    return Issued(call(output, given, async_op=True), given, [output])


COLLECTIVES = {
    "all_reduce": lambda: in_place(lambda t: dist.all_reduce(t, async_op=True)),
    "broadcast": broadcast,
    "reduce": lambda: in_place(lambda t: dist.reduce(t, 0, async_op=True)),
    "all_gather": all_gather,
    "all_gather_single": lambda: single(all_gather_single, tensor(2 * dist.get_world_size()), tensor()),
    "gather": gather,
    "scatter": scatter,
    "reduce_scatter": lambda: from_list(dist.reduce_scatter),
    "reduce_scatter_single": lambda: single(reduce_scatter_single, tensor(), tensor(2 * dist.get_world_size())),
    "all_to_all": all_to_all,
    "all_to_all_single": lambda: single(dist.all_to_all_single, *(tensor(dist.get_world_size()) for _ in range(2))),
}
every_collective = pytest.mark.parametrize("name", COLLECTIVES)


@every_collective
def test_outputs_are_poison_until_wait(name):
    def body():
        work, _, outputs = COLLECTIVES[name]()
        dist.barrier()  # everybody has issued it: it is complete, but nobody has waited
        before = all(output.isnan().all() for output in outputs)
        work.wait()
        after = [output.isnan().any().item() for output in outputs]
        assert before
        assert not any(after) or (name == "reduce" and dist.get_rank() > 0)

    on_ranks(3, body)


@pytest.mark.parametrize(
    ("dtype", "poison"),
    [
        (torch.int64, -(2**63)),
        (torch.int8, -128),
        (torch.uint8, 255),
        (torch.bool, True),
        (torch.bfloat16, None),
        (torch.float8_e4m3fn, None),
        (torch.float8_e5m2, None),
    ],
    ids=str,
)
def test_every_dtype_has_a_poison(dtype, poison):
    def body():
        tensor = torch.ones(3).to(dtype)
        if dist.get_rank():
            dist.broadcast(tensor, 0)
            return None
        work = dist.broadcast(tensor, 0, async_op=True)
        work.wait()
        received = torch.zeros(3).to(dtype)
        pending = dist.irecv(received, 1)
        return received.float().isnan().all().item() if poison is None else received.tolist(), pending

    def main():
        dist.init_process_group("nccl")
        result = body()
        if dist.get_rank():
            dist.send(torch.ones(3).to(dtype), 0)
        else:
            result, pending = result
            pending.wait()
        dist.destroy_process_group()
        return result

    assert SimWorld(2).run(main)[0] == (True if poison is None else [poison] * 3)


@pytest.mark.parametrize("name", [name for name in COLLECTIVES if name not in ("all_reduce", "broadcast", "reduce")])
def test_an_input_that_is_changed_under_way_is_an_error(name):
    def body():
        work, given, _ = COLLECTIVES[name]()
        if given is not None:
            given.add_(1)
        work.wait()

    with pytest.raises(RankFailedError, match=r"an input of the asynchronous .* was written to before wait") as caught:
        on_ranks(2, body)
    assert isinstance(caught.value.__cause__, RefusedError)


@every_collective
def test_an_output_that_is_written_to_under_way_is_an_error(name):
    def body():
        work, _, outputs = COLLECTIVES[name]()
        for output in outputs:
            output.fill_(0)
        work.wait()

    with pytest.raises(RankFailedError, match=r"the output of the asynchronous .* was written to before wait"):
        on_ranks(2, body)


def test_an_input_beside_the_output_in_one_buffer_is_watched_too():
    def body():
        buffer = torch.zeros(6)
        work = all_gather_single(buffer[:4], buffer[4:], async_op=True)
        buffer[5] = 1
        work.wait()

    with pytest.raises(RankFailedError, match="an input of the asynchronous"):
        on_ranks(2, body)


def test_what_is_sent_is_what_the_input_held_when_the_call_was_issued():
    def body():
        rank = dist.get_rank()
        mine, gathered = torch.tensor([float(rank)]), torch.empty(2)
        work = all_gather_single(gathered, mine, async_op=True)
        work.wait()
        mine.fill_(-1)
        dist.barrier()
        return gathered.tolist()

    for seed in SEEDS:
        assert on_ranks(2, body, schedule="random", seed=seed) == [[0.0, 1.0]] * 2


# -- order ------------------------------------------------------------------------------------------------------------


def test_works_may_be_waited_for_in_any_order_and_more_than_once():
    def body():
        tensors = [torch.full((2,), float(value)) for value in range(5)]
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        order = [3, 0, 4, 1, 2] if dist.get_rank() else [2, 1, 0, 4, 3]
        for position in order:
            assert works[position].wait()
            assert tensors[position].tolist() == [3.0 * position] * 2
        assert all(work.wait() for work in works)
        return [tensor[0].item() for tensor in tensors]

    for seed in SEEDS:
        assert on_ranks(3, body, schedule="random", seed=seed) == [[0, 3, 6, 9, 12]] * 3


def test_two_groups_may_be_crossed_asynchronously():
    def body():
        one, two = dist.new_group(), dist.new_group()
        tensors = {one: torch.tensor([1.0]), two: torch.tensor([10.0])}
        order = [one, two] if dist.get_rank() % 2 else [two, one]
        works = [dist.all_reduce(tensors[group], group=group, async_op=True) for group in order]
        for work in works:
            work.wait()
        return tensors[one].item(), tensors[two].item()

    for seed in SEEDS:
        assert on_ranks(4, body, schedule="random", seed=seed) == [(4, 40)] * 4


def test_two_groups_must_not_be_crossed_otherwise():
    def body():
        one, two = dist.new_group(), dist.new_group()
        for group in [one, two] if dist.get_rank() % 2 else [two, one]:
            dist.all_reduce(torch.ones(1), group=group)

    with pytest.raises(DeadlockError):
        on_ranks(4, body)


def test_synchronous_calls_between_issue_and_wait_are_no_trouble():
    def body():
        tensor, other = torch.ones(2), torch.full((2,), 5.0)
        work = dist.all_reduce(tensor, async_op=True)
        dist.all_reduce(other)
        dist.barrier()
        work.wait()
        return tensor.tolist(), other.tolist()

    assert on_ranks(3, body) == [([3.0, 3.0], [15.0, 15.0])] * 3


def test_parts_of_one_tensor_may_be_reduced_at_the_same_time():
    def body():
        tensor = torch.arange(6.0)
        works = [dist.all_reduce(part, async_op=True) for part in tensor.split(2)]
        for work in works:
            work.wait()
        return tensor.tolist()

    assert on_ranks(2, body) == [[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]] * 2


# -- asking -----------------------------------------------------------------------------------------------------------


def test_polling_lets_the_others_come():
    def body():
        time.sleep(dist.get_rank() * 0.1)
        tensor = torch.ones(1)
        work = dist.all_reduce(tensor, async_op=True)
        polls = 0
        while not work.is_completed():
            polls += 1
        return tensor.item(), polls > 0

    results = on_ranks(3, body)
    assert [result[0] for result in results] == [3.0] * 3
    assert [result[1] for result in results] == [True, True, False]


def test_several_operations_are_polled_as_one():
    def body():
        rank = dist.get_rank()
        time.sleep(rank * 0.1)
        tensor = torch.zeros(2)
        with distributed_c10d._coalescing_manager(device=torch.device("cuda", 0), async_ops=True) as coalesced:
            dist.isend(torch.full((2,), float(rank)), 1 - rank)
            dist.irecv(tensor, 1 - rank)
        polls = 0
        while not coalesced.works[0].is_completed():
            polls += 1
        return tensor.tolist(), polls > 0

    assert on_ranks(2, body, profile="nccl") == [([1.0, 1.0], True), ([0.0, 0.0], False)]


def kinds(base):
    return {base} | {kind for one in base.__subclasses__() for kind in kinds(one)}


def unfilled(kind):
    """The methods that ``kind`` has only as its bases leave them to it."""
    methods = {name: one for name in dir(kind) if isinstance(one := getattr(kind, name), FunctionType)}
    return {name for name, one in methods.items() if one.__code__.co_names == ("NotImplementedError",)}


def test_every_kind_of_work_says_how_to_wait_and_whether_it_is_done():
    """Abstract methods would say it, but not in subclasses of torch's class, which has a metaclass of its own."""
    assert unfilled(works.SimWork) == {"_wait", "_done"}
    concrete = {kind for kind in kinds(works.SimWork) if kind.__name__ in works.__all__} - {works.SimWork}
    assert len(concrete) >= 4
    for kind in concrete:
        waits_otherwise = kind.wait is not works.SimWork.wait
        assert unfilled(kind) <= ({"_wait"} if waits_otherwise else set()), kind


def test_a_work_tells_its_result():
    def body():
        work, _, outputs = all_gather()
        assert work.exception() is None
        assert work.result() == outputs
        assert work.is_success()
        work.synchronize()
        work.block_current_stream()
        barrier = dist.barrier(async_op=True)
        assert barrier.wait()
        assert barrier.result() == []

    on_ranks(2, body)


@every_collective
def test_a_future_holds_the_outputs(name):
    def body():
        work, _, outputs = COLLECTIVES[name]()
        future = work.get_future()
        value = future.wait()
        assert future.done()
        assert [id(tensor) for tensor in value] == [id(tensor) for tensor in outputs]
        assert future.value() is not None
        assert work.is_completed()

    on_ranks(2, body, backend="nccl")


def test_asking_for_a_future_does_not_wait():
    def body():
        one, two = dist.new_group(), dist.new_group()
        tensors = {one: torch.tensor([1.0]), two: torch.tensor([10.0])}
        order = [one, two] if dist.get_rank() % 2 else [two, one]
        futures = {}
        for group in order:  # crossed: whoever waits here never comes to the second
            futures[group] = dist.all_reduce(tensors[group], group=group, async_op=True).get_future()
        return [futures[group].wait()[0].item() for group in (one, two)]

    assert on_ranks(2, body) == [[2.0, 20.0]] * 2


def test_callbacks_run_on_the_rank_that_waits():
    def body():
        seen = []
        work = dist.all_reduce(torch.tensor([dist.get_rank() + 1.0]), async_op=True)
        future = work.get_future()
        doubled = future.then(lambda done: done.value()[0] * 2).then(lambda done: done.value() + 1)
        future.add_done_callback(lambda done: seen.append((dist.get_rank(), threading.current_thread().name)))
        work.wait()
        assert seen == [(dist.get_rank(), threading.current_thread().name)]
        assert doubled.done()
        return doubled.wait().item()

    assert on_ranks(3, body) == [13.0] * 3


def test_waiting_for_what_follows_waits_for_the_operation():
    def body():
        future = dist.all_reduce(torch.tensor([2.0]), async_op=True).get_future()
        following = future.then(lambda done: done.wait()[0] + 1).then(lambda done: done.value() * 10)
        return following.wait().item()

    assert on_ranks(3, body) == [70.0] * 3


def test_an_error_in_a_callback_belongs_to_its_future():
    def body():
        work = dist.all_reduce(torch.ones(1), async_op=True)
        future = work.get_future().then(lambda done: 1 / 0)
        work.wait()
        with pytest.raises(ZeroDivisionError):
            future.wait()

    on_ranks(2, body)


def test_a_future_is_done_when_the_others_have_come():
    def body():
        time.sleep(dist.get_rank())
        future = dist.all_reduce(torch.ones(1), async_op=True).get_future()
        polls = 0
        while not future.done():
            polls += 1
        return polls > 0, future.value()[0].item()

    assert on_ranks(2, body) == [(True, 2.0), (False, 2.0)]


def test_a_wait_may_give_up_in_virtual_time():
    def body():
        tensor = torch.ones(1)
        if dist.get_rank() == 1:
            time.sleep(100)
        work = dist.all_reduce(tensor, async_op=True)
        started = time.monotonic()
        if dist.get_rank() == 0:
            with pytest.raises(CollectiveTimeoutError, match="gave up after 3000 ms"):
                work.wait(timedelta(seconds=3))
            assert time.monotonic() - started == pytest.approx(3, abs=0.1)
        work.wait()
        return tensor.item()

    assert on_ranks(2, body) == [2.0, 2.0]


# -- forgotten --------------------------------------------------------------------------------------------------------


def test_a_work_nobody_waits_for_is_reported():
    def body():
        dist.all_reduce(torch.ones(1), async_op=True)

    with pytest.raises(UnfinishedError, match="never waited for"):
        on_ranks(2, body, strict=True)


def test_a_work_belongs_to_the_rank_that_issued_it():
    works = {}

    def body():
        rank = dist.get_rank()
        works[rank] = dist.all_reduce(torch.ones(1), async_op=True)
        dist.barrier()
        works[1 - rank].wait()

    with pytest.raises(RankFailedError, match="from a thread that is not this rank's"):
        on_ranks(2, body)


def test_a_thread_of_the_rank_may_wait():
    def body():
        tensor = torch.ones(1)
        work = dist.all_reduce(tensor, async_op=True)
        thread = threading.Thread(target=work.wait)
        thread.start()
        thread.join()
        return tensor.item()

    assert on_ranks(3, body) == [3.0] * 3
