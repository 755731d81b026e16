"""One loss of many tokens: by hand, and the same however the tokens are spread over micro-batches and ranks."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import workload
from lightrft.strategy import get_strategy
from lightrft.trainer import names
from lightrft.trainer.aggregation import AGGREGATIONS, StepTotals, aggregate, step_totals
from lightrft.trainer.masking import inside

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]

LOSSES = torch.tensor([[1.0, 2.0, 4.0], [8.0, torch.nan, torch.nan], [torch.nan] * 3])
MASK = torch.tensor([[True, True, True], [True, False, False], [False] * 3])


def test_the_names_of_the_flag_are_those_of_the_registry():
    assert tuple(AGGREGATIONS) == names.AGGREGATIONS
    assert set(names.AGGREGATION_OF.values()) <= set(AGGREGATIONS)


@pytest.mark.parametrize(
    ("how", "expected"),
    [("token_mean", 15 / 4), ("sequence_mean", (7 / 3 + 8) / 2), ("constant", 15 / (2 * 10))],
)
def test_k23_an_aggregation_by_hand(how, expected):
    totals = StepTotals(tokens=4, sequences=2, shares=1)
    found = aggregate(LOSSES, MASK, how=how, totals=totals, longest=10)
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_k11_nothing_to_learn_gives_zero_with_a_gradient(how):
    losses = torch.full((2, 3), torch.nan, requires_grad=True)
    totals = StepTotals(tokens=0, sequences=0, shares=4)
    found = aggregate(losses, torch.zeros(2, 3, dtype=torch.bool), how=how, totals=totals, longest=10)
    found.backward()
    assert found.item() == 0
    assert losses.grad.eq(0).all()


def test_k08_an_unknown_aggregation_is_told_with_those_that_there_are():
    totals = StepTotals(tokens=1, sequences=1, shares=1)
    with pytest.raises(ConfigError, match="loss_aggregation='sum': expected one of token_mean"):
        aggregate(LOSSES, MASK, how="sum", totals=totals)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    how=st.sampled_from(list(AGGREGATIONS)),
)
def test_f13_the_mean_of_all_shares_is_the_mean_of_the_whole(lengths, how):
    """Micro-batches of any sizes: their mean, which a strategy computes, is the aggregate of all rows together."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.arange(4) < torch.tensor(each).reshape(-1, 1) for each in lengths]
    losses = [torch.randn(mask.shape, generator=generator) for mask in masks]
    whole, one = torch.cat(masks), sum(mask.any(1).sum().item() for mask in masks)
    totals = StepTotals(tokens=int(whole.sum()), sequences=one, shares=len(masks))
    parts = [aggregate(x, m, how=how, totals=totals, longest=7) for x, m in zip(losses, masks, strict=True)]
    alone = StepTotals(tokens=totals.tokens, sequences=one, shares=1)
    expected = aggregate(torch.cat(losses), whole, how=how, totals=alone, longest=7)
    torch.testing.assert_close(sum(parts) / len(parts), expected, atol=1e-6, rtol=1e-5)


# -- F13 with a strategy: every partition of a batch ends with the same weights ------------------------------------

SEQUENCES, LENGTH, STEPS, LONGEST = 8, 8, 2, 7
LENGTHS = [7, 1, 0, 5, 2, 7, 3, 0]
"""Generated tokens of each sequence: some have none."""


def data(step):
    """Token ids, and which of them were generated, as entries for all but the first."""
    ids = workload.batch(step, SEQUENCES)
    ends = torch.tensor(LENGTHS).roll(step).unsqueeze(1)
    return ids, torch.arange(LENGTH - 1) >= LENGTH - 1 - ends


def token_losses(logits, ids):
    return -logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)


def plain(how):
    """The weights after steps of one process, each with the whole batch and the formula written out."""
    model = workload.transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        ids, mask = data(step)
        losses = inside(token_losses(model(ids), ids), mask)
        rows = [losses[row].sum() / max(LENGTHS[row - step], 1) for row in range(SEQUENCES)]
        filled = sum(length > 0 for length in LENGTHS)
        loss = {
            "token_mean": losses.sum() / sum(LENGTHS),
            "sequence_mean": sum(rows) / filled,
            "constant": losses.sum() / (filled * LONGEST),
        }[how]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return dict(model.named_parameters())


def partitioned(how, size, micro, **backend):
    """The weights of one rank after the same steps, the batch spread over ranks and micro-batches."""

    def program():
        strategy = get_strategy(
            {"train_batch_size": SEQUENCES, "micro_train_batch_size": micro, "max_norm": 0.0, **backend}
        )
        model = workload.transformer()
        model, optimizer, _ = strategy.prepare((model, torch.optim.SGD(model.parameters(), lr=0.1), None))
        for step in range(STEPS):
            ids, mask = (each.chunk(strategy.groups.dp_size)[strategy.groups.dp_rank] for each in data(step))
            parts = list(zip(ids.split(micro), mask.split(micro), strict=True))
            (totals,) = step_totals(strategy, [[each for _, each in parts]])
            for tokens, generated in parts:
                losses = token_losses(model(tokens), tokens)
                loss = aggregate(losses, generated, how=how, totals=totals, longest=LONGEST)
                strategy.backward(loss, model, optimizer)
                strategy.optimizer_step(optimizer, model, None)
        found = {name: tensor.clone() for name, tensor in strategy.full_parameters(model)}
        if dist.is_initialized():
            dist.destroy_process_group()
        return found

    return SimWorld(size, stall_limit=15).run(program)[0]


def check_partition(how, size, micro, **backend):
    found = partitioned(how, size, micro, **backend)
    for name, expected in plain(how).items():
        torch.testing.assert_close(found[name], expected.detach(), atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize(("size", "micro"), [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2), (4, 1)])
def test_f13_every_partition_is_one_big_batch(how, size, micro):
    check_partition(how, size, micro, strategy="fake")


@pytest.mark.slow
@pytest.mark.parametrize("backend", [{"fsdp": True}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str)
@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize(("size", "micro"), [(1, 2), (2, 1), (4, 2)])
def test_f13_every_partition_is_one_big_batch_on_real_backends(how, size, micro, backend):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    check_partition(how, size, micro, **backend)


def test_f13_ranks_of_one_sequence_count_once():
    def program():
        strategy = get_strategy({"strategy": "fake", "train_batch_size": 4, "sp_size": 2})
        masks = [[torch.ones(1, 3 + strategy.groups.dp_rank, dtype=torch.bool)] * 2]
        found = step_totals(strategy, masks)
        dist.destroy_process_group()
        return found

    assert SimWorld(4).run(program) == [[StepTotals(tokens=2 * 3 + 2 * 4, sequences=4, shares=4)]] * 4
