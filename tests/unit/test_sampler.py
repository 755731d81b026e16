"""K16: which samples a data parallel rank sees, and where a run goes on."""

import bisect
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError
from lightrft.strategy.utils.data import DistributedSampler, setup_dataloader


def epochs(count, length, ranks, **options):
    """What the ranks see together, in order, by epoch; the ranks have equally many samples."""
    samplers = [DistributedSampler(length, ranks, rank, **options) for rank in range(ranks)]
    seen = []
    for epoch in range(count):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        columns = [list(sampler) for sampler in samplers]
        assert [len(column) for column in columns] == [len(sampler) for sampler in samplers]
        assert len({len(column) for column in columns}) == 1
        seen.append([index for row in zip(*columns, strict=True) for index in row])
    return seen


def stream(count, length, **options):
    """The first ``count`` epochs of the endless sequence: what a single rank sees."""
    return list(itertools.chain(*epochs(count, length, 1, **options)))


# -- one epoch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_k16_ranks_share_an_epoch_without_overlap(ranks, drop_last):
    for seen in epochs(3, 12, ranks, drop_last=drop_last):
        assert sorted(seen) == list(range(12))


def test_k16_each_epoch_has_another_order_and_each_seed_too():
    orders = [tuple(seen) for seed in (0, 1) for seen in epochs(3, 50, 2, seed=seed)]
    assert len(set(orders)) == 6


def test_k16_the_order_is_the_same_in_every_run():
    assert epochs(2, 20, 2, seed=5) == epochs(2, 20, 2, seed=5)
    assert DistributedSampler(range(20), 2, 0, seed=5).length == 20


def test_k16_without_shuffling_samples_come_in_order():
    assert epochs(2, 6, 2, shuffle=False) == [list(range(6))] * 2


def test_k16_a_second_iteration_of_an_epoch_is_the_same():
    sampler = DistributedSampler(9, 2, 1, consumed_samples=3)
    assert list(sampler) == list(sampler)


def test_k16_what_does_not_come_out_even_is_filled_from_the_next_epoch_or_left_to_it():
    filled = epochs(5, 10, 4, drop_last=False)
    assert [len(seen) for seen in filled] == [12, 8, 12, 8, 12]
    assert set(filled[0]) == set(range(10))
    left = epochs(5, 10, 4, drop_last=True)
    assert [len(seen) for seen in left] == [8, 12, 8, 12, 8]
    assert len(set(left[0])) == 8
    for seen in (filled, left):
        whole = list(itertools.chain(*seen))
        assert whole == stream(6, 10)[: len(whole)]


def test_k16_an_epoch_holds_whole_batches_of_all_ranks():
    assert [len(seen) for seen in epochs(3, 26, 2, drop_last=True, batch_size=3)] == [24, 24, 30]


def test_k16_a_data_set_smaller_than_the_ranks_is_repeated_so_that_each_has_a_sample():
    assert [len(seen) for seen in epochs(1, 2, 8)] == [8]


# -- resuming ---------------------------------------------------------------------------------------------------------


def resumed(consumed, length, ranks, count, **options):
    """What the ranks see together after they resume at ``consumed``, up to ``count`` epochs from the first."""
    first = DistributedSampler(length, ranks, 0, consumed_samples=consumed, **options).epoch
    seen = epochs(count, length, ranks, consumed_samples=consumed, **options)
    assert seen[:first] == [[]] * first
    assert seen[first]
    return list(itertools.chain(*seen))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 90),
    st.integers(1, 5),
    st.booleans(),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 3),
)
def test_k16_a_run_resumes_at_the_very_next_sample(length, consumed, ranks, drop_last, batch_size, shuffle, seed):
    if drop_last and length < ranks * batch_size:
        return
    last = consumed // length + 5
    rest = resumed(
        consumed, length, ranks, last, drop_last=drop_last, batch_size=batch_size, shuffle=shuffle, seed=seed
    )
    whole = stream(last + ranks * batch_size, length, shuffle=shuffle, seed=seed)
    assert rest == whole[consumed : consumed + len(rest)]
    assert abs(consumed + len(rest) - last * length) < ranks * batch_size


@settings(max_examples=100, deadline=None)
@given(st.integers(6, 40), st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=1, max_size=6))
def test_k16_no_sample_is_lost_or_repeated_when_the_number_of_ranks_changes(length, phases):
    consumed, seen = 0, []
    for ranks, steps in phases:  # each phase takes some steps on some ranks, and is then killed
        samplers = [
            DistributedSampler(length, ranks, rank, drop_last=True, consumed_samples=consumed) for rank in range(ranks)
        ]
        rows = []
        while len(rows) < steps:
            rows += zip(*samplers, strict=True)
            for sampler in samplers:
                sampler.set_epoch(sampler.epoch + 1)
        seen += itertools.chain(*rows[:steps])
        consumed += steps * ranks
    assert seen == stream(len(seen) // length + 1, length)[: len(seen)]
    counts = np.bincount(seen, minlength=length)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (1, 4), (4, 1)])
def test_k16_a_run_goes_on_in_a_later_epoch_at_another_world_size(before, after):
    whole = list(itertools.chain(*epochs(4, 24, before, seed=3)))
    rest = resumed(40, 24, after, 4, seed=3)
    assert rest == whole[40:]
    assert DistributedSampler(24, after, 0, consumed_samples=40).epoch == 1


def test_k16_a_run_that_ended_with_an_epoch_goes_on_with_the_next():
    assert DistributedSampler(24, 2, 0, consumed_samples=24).epoch == 1
    assert DistributedSampler(10, 4, 0, consumed_samples=12).epoch == 1
    assert DistributedSampler(10, 4, 0, drop_last=True, consumed_samples=8).epoch == 1


# -- loaders ----------------------------------------------------------------------------------------------------------


def test_k16_ranks_of_one_sequence_parallel_group_get_the_same_batches():
    sp_size, world = 2, 8

    def batches(rank):
        loader = setup_dataloader(range(64), 4, dp_rank=rank // sp_size, dp_size=world // sp_size, seed=1)
        return [batch.tolist() for batch in loader]

    by_rank = [batches(rank) for rank in range(world)]
    assert all(by_rank[rank] == by_rank[rank - rank % sp_size] for rank in range(world))
    seen = list(itertools.chain(*itertools.chain(*by_rank[::sp_size])))
    assert sorted(seen) == list(range(64))


def test_k16_a_loader_resumes_at_the_next_batch_and_says_in_which_epoch():
    def batches(consumed, dp_size):
        loaders = [
            setup_dataloader(range(22), 2, dp_rank=rank, dp_size=dp_size, consumed_samples=consumed)
            for rank in range(dp_size)
        ]
        first, found = loaders[0].sampler.epoch, []
        for epoch in range(first, 4):
            for loader in loaders:
                loader.sampler.set_epoch(epoch)
            found += [sorted(itertools.chain(*(b.tolist() for b in row))) for row in zip(*loaders, strict=True)]
        return first, found

    first, whole = batches(0, 4)
    assert (first, len(whole)) == (0, 88 // 8)
    for step in range(len(whole)):
        assert batches(step * 8, 4) == (bisect.bisect([16, 40, 64], step * 8), whole[step:])
    halves = batches(3 * 8, 2)[1]
    assert [sorted(left + right) for left, right in zip(halves[::2], halves[1::2], strict=True)] == whole[3:]


def test_a_loader_drops_or_keeps_the_last_batch():
    sizes = {drop: [len(b) for b in setup_dataloader(range(7), 3, drop_last=drop)] for drop in (True, False)}
    assert sizes == {True: [3, 3], False: [3, 3, 1]}


def test_a_loader_passes_its_arguments_on():
    loader = setup_dataloader(range(6), 2, shuffle=False, collate_fn=tuple, pin_memory=False, num_workers=0)
    assert list(loader) == [(0, 1), (2, 3), (4, 5)]
    assert list(setup_dataloader(range(4), 2, sampler=[3, 2, 1, 0], collate_fn=list)) == [[3, 2], [1, 0]]


def test_pinned_memory_is_left_out_without_cuda():
    assert setup_dataloader(range(6), 2, pin_memory=True).pin_memory is torch.cuda.is_available()


def test_k14_a_loader_takes_nothing_from_the_global_random_generators():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(setup_dataloader(range(20), 2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_workers_are_seeded_by_seed_rank_epoch_and_number_and_by_nothing_else():
    def draws(worker, *, epoch=0, **options):
        loader = setup_dataloader(range(20), 2, dp_size=2, **options)
        loader.sampler.set_epoch(epoch)
        pickle.loads(pickle.dumps(loader.worker_init_fn))(worker)
        return random.random(), np.random.random(), torch.rand(()).item()

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        variants = [draws(0), draws(1), draws(0, epoch=1), draws(0, seed=1), draws(0, dp_rank=1)]
        for position in range(3):
            assert len({variant[position] for variant in variants}) == 5
        assert draws(0, epoch=1, seed=1) == draws(0, epoch=1, seed=1, shuffle=False)
    random.setstate(states[0])
    np.random.set_state(states[1])


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0, 0), "num_replicas=0: expected a number of at least 1"),
        ((10, 2, 2), "rank=2 with num_replicas=2: expected 0 to num_replicas - 1"),
        ((10, 2, -1), "rank=-1: expected a number of at least 0"),
        ((10, 2, 0, True, 0, False, -4), "consumed_samples=-4: expected a number of at least 0"),
        ((10, 2, 0, True, 0, False, 1.5), "consumed_samples=1.5: expected"),
        ((0, 2, 0), "the data set is empty"),
        ((3, 4, 0, True, 0, True), "holds 3 samples, less than one batch of 1 for 4 data parallel ranks"),
    ],
)
def test_arguments_that_cannot_work_are_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DistributedSampler(*arguments)


def test_a_loader_refuses_what_cannot_work():
    with pytest.raises(ConfigError, match="batch_size=0: expected"):
        setup_dataloader(range(4), 0)
    with pytest.raises(ConfigError, match="consumed_samples=2 with a sampler of your own"):
        setup_dataloader(range(4), 2, sampler=[0, 1], consumed_samples=2)
    with pytest.raises(ConfigError, match="generator has no length"):
        setup_dataloader((i for i in range(4)), 2)
    with pytest.raises(ConfigError, match="epoch=-1: expected"):
        DistributedSampler(4, 1, 0).set_epoch(-1)
