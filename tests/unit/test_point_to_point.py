"""Messages between two ranks: what arrives, in which order, and what is an error."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import on_ranks

from lightrft.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    DeadlockError,
    RankFailedError,
    RefusedError,
    SimWarning,
    UnfinishedError,
)

SEEDS = range(6)


def number(value):
    return torch.tensor([float(value)])


@pytest.mark.parametrize("first", [0, 1], ids=["the sender comes first", "the receiver comes first"])
def test_a_message_arrives_whoever_comes_first(first):
    def body():
        rank = dist.get_rank()
        if rank != first:
            time.sleep(1)
        tensor = torch.arange(3.0) if rank == 0 else torch.zeros(3)
        if rank == 0:
            dist.send(tensor, 1)
            return None
        return dist.recv(tensor, 0), tensor.tolist()

    assert on_ranks(2, body)[1] == (0, [0.0, 1.0, 2.0])


def test_messages_between_two_ranks_arrive_in_the_order_they_were_sent():
    def body():
        if dist.get_rank() == 0:
            works = [dist.isend(number(value), 1) for value in range(5)]
            for work in reversed(works):
                work.wait()
            return None
        received = [torch.zeros(1) for _ in range(5)]
        works = [dist.irecv(tensor, 0) for tensor in received]
        for work in works[2:] + works[:2]:
            work.wait()
        return torch.cat(received).tolist()

    for seed in SEEDS:
        assert on_ranks(2, body, schedule="random", seed=seed)[1] == [0, 1, 2, 3, 4]


def test_groups_do_not_mix_up_their_messages():
    def body():
        rank = dist.get_rank()
        one, two = dist.new_group([0, 1]), dist.new_group([1, 0])
        if rank == 0:
            works = [dist.isend(number(1), 1, group=one), dist.isend(number(2), 1, group=two)]
            for work in works:
                work.wait()
            return None
        first, second = torch.zeros(1), torch.zeros(1)
        dist.recv(second, 0, group=two)
        dist.recv(first, 0, group=one)
        return first.item(), second.item()

    assert on_ranks(2, body)[1] == (1, 2)


def test_in_a_group_ranks_are_global_unless_said_otherwise():
    def body():
        rank = dist.get_rank()
        group = dist.new_group([1, 3])
        received = torch.zeros(1)
        if rank == 1:
            dist.send(number(5), 3, group=group)
            dist.send(number(6), group=group, group_dst=1)
        if rank == 3:
            source = dist.recv(received, 1, group=group)
            other = torch.zeros(1)
            dist.recv(other, group=group, group_src=0)
            return source, received.item(), other.item()
        return None

    assert on_ranks(4, body)[3] == (1, 5, 6)


def test_a_batch_does_not_depend_on_the_order_of_its_operations():
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        received = [torch.zeros(1), torch.zeros(1)]
        operations = [
            dist.P2POp(dist.irecv, received[0], (rank - 1) % size),
            dist.P2POp(dist.isend, number(rank), (rank + 1) % size),
            dist.P2POp(dist.isend, number(10 + rank), (rank - 1) % size),
            dist.P2POp(dist.irecv, received[1], (rank + 1) % size),
        ]
        if rank % 2:
            operations.reverse()
        works = dist.batch_isend_irecv(operations)
        assert len(works) == 4
        for work in works:
            work.wait()
        return [tensor.item() for tensor in received]

    for seed in SEEDS:
        results = on_ranks(4, body, backend="nccl", schedule="random", seed=seed)
        assert results == [[(rank - 1) % 4, 10 + (rank + 1) % 4] for rank in range(4)]


def test_complex_and_scalar_messages_arrive():
    def body():
        wave, scalar = torch.tensor([1 + 2j, 3j]), torch.tensor(7.0)
        if dist.get_rank() == 0:
            dist.send(wave, 1)
            dist.send(scalar, 1)
            return None
        received, one = torch.zeros(2, dtype=torch.complex64), torch.tensor(0.0)
        dist.recv(received, 0)
        dist.recv(one, 0)
        return received.tolist(), one.item()

    assert on_ranks(2, body)[1] == ([1 + 2j, 3j], 7.0)


def test_what_is_sent_is_a_copy():
    def body():
        tensor = number(1)
        if dist.get_rank() == 0:
            dist.send(tensor, 1)
            tensor.fill_(-1)
            dist.barrier()
            return None
        dist.recv(tensor, 0)
        tensor.add_(1)
        dist.barrier()
        return tensor.item()

    assert on_ranks(2, body)[1] == 2


# -- from anybody -----------------------------------------------------------------------------------------------------


def test_a_message_from_anybody_says_from_whom():
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        if rank:
            dist.send(number(rank * 10), 0)
            return None
        received = {}
        for _ in range(size - 1):
            tensor = torch.zeros(1)
            source = dist.recv(tensor)
            received[source] = tensor.item()
        return received

    for seed in SEEDS:
        assert on_ranks(4, body, schedule="random", seed=seed)[0] == {1: 10, 2: 20, 3: 30}


def test_the_schedule_decides_who_is_heard_first():
    def body():
        if dist.get_rank():
            dist.send(number(dist.get_rank()), 0)
            return None
        return tuple(dist.recv(torch.zeros(1)) for _ in range(3))

    orders = {on_ranks(4, body, schedule="random", seed=seed)[0] for seed in range(12)}
    assert len(orders) > 2


def test_whoever_sent_first_is_heard_first():
    def body():
        rank = dist.get_rank()
        time.sleep(10 - rank)  # the highest rank sends first, and all before rank 0 listens
        if rank:
            dist.send(number(rank), 0)
            return None
        return [dist.recv(torch.zeros(1)) for _ in range(3)]

    assert on_ranks(4, body)[0] == [3, 2, 1]


def test_whoever_sent_first_is_heard_first_in_a_second_round_too():
    def body():
        rank = dist.get_rank()
        heard = []
        for order in ([1, 2, 3], [3, 1, 2]):
            time.sleep(order.index(rank) + 1 if rank else 10)
            if rank:
                dist.send(number(rank), 0)
            else:
                heard.append([dist.recv(torch.zeros(1)) for _ in order])
            dist.barrier()
        return heard

    assert on_ranks(4, body)[0] == [[1, 2, 3], [3, 1, 2]]


def test_a_receive_under_another_tag_is_named_beside_the_send_that_waits():
    def body():
        rank = dist.get_rank()
        if rank == 0:
            dist.send(number(1), 3, tag=1)
        if rank == 3:
            dist.irecv(torch.zeros(1), 0, tag=2)
        dist.barrier()

    with pytest.raises(DeadlockError) as caught:
        on_ranks(4, body, profile="gloo")
    assert {(c.rank, c.place.source.partition("(")[0]) for c in caught.value.report.culprits} == {
        (0, "dist.send"),
        (3, "dist.irecv"),
    }


def test_nothing_cannot_be_received_from_anybody():
    with pytest.raises(RankFailedError, match="recv: a tensor of no elements from any source is refused by gloo"):
        on_ranks(2, lambda: dist.irecv(torch.zeros(0)))


def test_in_a_group_the_source_is_a_global_rank_and_the_work_knows_the_one_in_the_group():
    def body():
        rank = dist.get_rank()
        group = dist.new_group([0, 2])
        if rank == 2:
            dist.send(number(1), 0, group=group)
            dist.send(number(2), 0, group=group)
        if rank == 0:
            tensor = torch.zeros(1)
            work = dist.irecv(tensor, group=group)
            work.wait()
            return work.source_rank(), work._source_rank(), dist.recv(tensor, group=group)
        return None

    assert on_ranks(3, body)[0] == (1, 1, 2)


def test_tags_choose_among_messages_from_anybody():
    def body():
        if dist.get_rank():
            dist.isend(number(dist.get_rank()), 0, tag=dist.get_rank()).wait()
            return None
        return [dist.recv(torch.zeros(1), tag=tag) for tag in (3, 1, 2)]

    assert on_ranks(4, body, profile="gloo")[0] == [3, 1, 2]


def test_of_two_receives_the_one_posted_first_gets_the_message():
    def body(named_first):
        if dist.get_rank():
            dist.barrier()
            dist.send(number(1), 0)
            dist.send(number(2), 0)
            return None
        named, anybody = torch.zeros(1), torch.zeros(1)
        order = [(named, 1), (anybody, None)]
        works = [dist.irecv(tensor, source) for tensor, source in (order if named_first else reversed(order))]
        dist.barrier()
        for work in works:
            work.wait()
        return named.item(), anybody.item()

    assert on_ranks(2, lambda: body(named_first=True))[0] == (1, 2)
    assert on_ranks(2, lambda: body(named_first=False))[0] == (2, 1)


# -- under way --------------------------------------------------------------------------------------------------------


def test_a_message_under_way_is_poison():
    def body():
        if dist.get_rank():
            dist.barrier()
            dist.send(number(3), 0)
            return None
        tensor = number(0)
        work = dist.irecv(tensor, 1)
        assert not work.is_completed()
        before = tensor.isnan().item()
        dist.barrier()
        while not work.is_completed():
            pass
        return before, tensor.item()

    assert on_ranks(2, body)[0] == (True, 3)


def test_a_send_is_complete_when_its_receive_is_posted():
    def body():
        if dist.get_rank():
            dist.barrier()
            dist.recv(torch.zeros(1), 0)
            return None
        work = dist.isend(number(3), 1)
        before = work.is_completed()
        dist.barrier()
        work.wait()
        return before, work.is_completed()

    assert on_ranks(2, body)[0] == (False, True)


@pytest.mark.parametrize("culprit", ["sender", "receiver"])
def test_writing_to_a_tensor_under_way_is_an_error(culprit):
    def body():
        tensor = number(3)
        work = dist.irecv(tensor, 1) if dist.get_rank() == 0 else dist.isend(tensor, 0)
        if (culprit == "receiver") == (dist.get_rank() == 0):
            tensor.add_(1)
            tensor.fill_(8)
        work.wait()

    named = "recv" if culprit == "receiver" else "send"
    with pytest.raises(RankFailedError, match=rf"the tensor of the {named}.* was written to before wait") as caught:
        on_ranks(2, body)
    assert isinstance(caught.value.__cause__, RefusedError)


def test_a_wait_may_give_up():
    def body():
        if dist.get_rank():
            dist.barrier()
            dist.send(number(3), 0)
            return None
        tensor = torch.zeros(1)
        work = dist.irecv(tensor, 1)
        with pytest.raises(CollectiveTimeoutError, match="gave up after 250 ms"):
            work.wait(timedelta(milliseconds=250))
        dist.barrier()
        work.wait()
        return tensor.item()

    assert on_ranks(2, body)[0] == 3


def test_a_message_that_is_never_received_is_reported_at_the_end():
    def body():
        if dist.get_rank() == 1:
            dist.isend(number(1), 0)

    with pytest.warns(SimWarning, match="send"):
        on_ranks(2, body)
    with pytest.raises(UnfinishedError, match="send"):
        on_ranks(2, body, strict=True)


# -- disagreement -----------------------------------------------------------------------------------------------------


def meeting(sent, received, **options):
    def body():
        if dist.get_rank() == 0:
            dist.send(sent, 1, **options)
        else:
            dist.recv(received, 0)

    return body


@pytest.mark.parametrize(
    ("sent", "received", "what"),
    [
        (torch.ones(3), torch.ones(4), r"shapes differ: \[3\] sent, \[4\] expected"),
        (torch.ones(3), torch.ones(3).int(), "dtypes differ: torch.float32 sent, torch.int32 expected"),
        (torch.ones(2, 3), torch.ones(6), r"shapes differ: \[2, 3\] sent, \[6\] expected"),
    ],
    ids=["size", "dtype", "shape"],
)
def test_a_message_that_does_not_fit_is_a_mismatch(sent, received, what):
    for seed in SEEDS:
        with pytest.raises(CollectiveMismatchError, match=what):
            on_ranks(2, meeting(sent.clone(), received.clone()), schedule="random", seed=seed)


def test_a_message_with_another_tag_is_a_mismatch():
    with pytest.raises(CollectiveMismatchError, match="tags differ: sent with tag 4, received with tag 0"):
        on_ranks(2, meeting(torch.ones(1), torch.ones(1), tag=4))


def test_under_gloo_a_message_with_another_tag_is_waited_for_in_vain():
    with pytest.raises(DeadlockError, match=r"send.*tag 4"):
        on_ranks(2, meeting(torch.ones(1), torch.ones(1), tag=4), profile="gloo")


def test_a_message_to_oneself_or_to_nobody_is_refused():
    def to_myself():
        dist.send(number(1), dist.get_rank())

    with pytest.raises(RankFailedError, match="destination rank should not be the same"):
        on_ranks(2, to_myself)
    with pytest.raises(RankFailedError, match="a send from a rank to itself is not supported by gloo"):
        on_ranks(2, lambda: dist.isend(number(1), dist.get_rank()))


def test_a_receive_from_a_rank_that_never_sends_is_a_deadlock():
    with pytest.raises(DeadlockError, match=r"recv\(float32\[1\], from rank 1\)"):
        on_ranks(2, lambda: dist.recv(number(1), 1) if dist.get_rank() == 0 else None)


# -- a wrong peer -----------------------------------------------------------------------------------------------------


def blamed(body, size):
    """Ranks and lines, counted from the first of ``body``, that a deadlock is blamed on."""
    with pytest.raises(DeadlockError) as caught:
        on_ranks(size, body, stall_limit=20)
    first = body.__code__.co_firstlineno
    culprits = caught.value.report.culprits
    return {(culprit.rank, culprit.place.line - first) for culprit in culprits if culprit.place.file == __file__}


def test_who_sends_to_a_wrong_rank_is_blamed():
    def body():
        rank = dist.get_rank()
        if rank == 0:
            dist.send(number(1), 1)  # to 2, it should be
        elif rank == 2:
            dist.recv(number(0), 0)

    assert (0, 3) in blamed(body, 3)


def test_who_receives_from_a_wrong_rank_is_blamed_also_before_it_waits():
    def body():
        rank = dist.get_rank()
        if rank == 0:
            dist.send(number(1), 2)
        elif rank == 2:
            work = dist.irecv(number(0), 1)  # from 0, it should be
        dist.barrier()
        if rank == 2:
            work.wait()

    assert (2, 5) in blamed(body, 3)


def test_who_sends_to_a_wrong_rank_is_blamed_where_somebody_waits_for_any_rank():
    def body():
        rank = dist.get_rank()
        if rank == 0:
            dist.send(number(1), 1)  # to 2, it should be
        elif rank == 2:
            dist.recv(number(0))

    assert (0, 3) in blamed(body, 3)


def test_a_pipeline_that_stands_still_is_not_blamed_on_all_its_stages():
    """Every stage sends to the next and waits for what comes back; the last one has left."""

    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        if rank == size - 1:
            return
        work = dist.isend(number(1), rank + 1)
        dist.recv(number(0), rank + 1)
        work.wait()

    with pytest.raises(DeadlockError) as caught:
        on_ranks(6, body)
    assert [culprit.rank for culprit in caught.value.report.culprits] == [5]
