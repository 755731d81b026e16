"""Estimators of advantages, by hand and against loops over tokens."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError
from lightrft.trainer import names
from lightrft.trainer.advantages import ADVANTAGES, AdvantageInputs, estimate, token_rewards, whiten

ONE_ROW = torch.tensor([[True, True, True]])


def inputs(rewards, mask, **more):
    return AdvantageInputs(rewards=torch.tensor(rewards), mask=torch.as_tensor(mask), **more)


def grouped(name, rewards, **more):
    """What an estimator gives the only token of each of some samples of one prompt."""
    mask = torch.ones(len(rewards), 1, dtype=torch.bool)
    return estimate(name, inputs(rewards, mask, group_size=len(rewards), **more)).advantages[:, 0].tolist()


def test_the_names_of_the_flag_are_those_of_the_registry():
    assert tuple(ADVANTAGES) == names.ADVANTAGES
    assert set(names.GROUPED) < set(ADVANTAGES)


# -- by hand -------------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    values = torch.tensor([[0.5, 0.25, 0.125]])
    found = estimate("gae", inputs([1.0], ONE_ROW, values=values, gamma=0.5, lambd=0.5))
    # deltas: 0.5 * 0.25 - 0.5, 0.5 * 0.125 - 0.25, 1 - 0.125
    assert found.advantages.tolist() == [[-0.375 + 0.25 * (-0.1875 + 0.25 * 0.875), -0.1875 + 0.25 * 0.875, 0.875]]
    assert torch.equal(found.returns, found.advantages + values)


def test_gae_takes_penalties_from_the_rewards_of_tokens():
    found = estimate("gae", inputs([1.0], ONE_ROW, values=torch.zeros(1, 3), penalties=torch.tensor([[0.5, 0.0, 2.0]])))
    assert found.advantages.tolist() == [[-1.5, -1.0, -1.0]]


def test_reinforce_by_hand():
    found = estimate("reinforce", inputs([4.0], ONE_ROW, gamma=0.5, penalties=torch.tensor([[1.0, 0.0, 0.0]])))
    assert found.advantages.tolist() == [[0.0, 2.0, 4.0]]
    assert torch.equal(found.returns, found.advantages)


def test_reinforce_plus_plus_by_hand():
    found = estimate("reinforce++", inputs([1.0, 3.0], [[True, True], [True, False]]))
    # Returns 1, 1 and 3: mean 5/3, variance (2 * (2/3)**2 + (4/3)**2) / 3 = 8/9.
    spread = (8 / 9) ** 0.5
    expected = torch.tensor([[-2 / 3, -2 / 3], [4 / 3, 0.0]]) / spread
    torch.testing.assert_close(found.advantages, expected, atol=1e-5, rtol=0)
    assert found.returns.tolist() == [[1.0, 1.0], [3.0, 0.0]]


def test_rloo_by_hand():
    assert grouped("rloo", [1.0, 2.0, 6.0]) == [1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5]


def test_reinforce_baseline_by_hand():
    # Less their mean: -1, 1 and -3, 3. Their variance is 5.
    mask = torch.ones(4, 1, dtype=torch.bool)
    found = estimate("reinforce_baseline", inputs([0.0, 2.0, 4.0, 10.0], mask, group_size=2)).advantages[:, 0]
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -3.0, 3.0]) / 5**0.5, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["group_norm", "grpo"])
def test_group_norm_by_hand(name):
    # Mean 2, deviation 2 with k - 1 = 2 in the denominator.
    assert grouped(name, [0.0, 2.0, 4.0]) == pytest.approx([-1.0, 0.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("name", ["dr_grpo", "cpgd"])
def test_rewards_less_their_mean_by_hand(name):
    assert grouped(name, [0.0, 2.0, 7.0]) == [-3.0, -1.0, 4.0]


# -- against a loop over tokens ------------------------------------------------------------------------------------


@st.composite
def batches(draw, group_sizes=(1, 2, 3)):
    group = draw(st.sampled_from(group_sizes))
    rows, length = group * draw(st.integers(0, 3)), draw(st.integers(0, 5))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return AdvantageInputs(
        rewards=torch.randint(-2, 3, (rows,), generator=generator).float(),
        mask=mask,
        penalties=torch.randn(rows, length, generator=generator) if draw(st.booleans()) else None,
        values=torch.randn(rows, length, generator=generator),
        group_size=group,
        gamma=draw(st.sampled_from([1.0, 0.5, 0.0])),
        lambd=draw(st.sampled_from([1.0, 0.7, 0.0])),
    )


def slow_token_rewards(given, row, reward):
    """Of the tokens of a row that are in the mask, in order."""
    places = [place for place in range(given.mask.shape[1]) if given.mask[row, place]]
    penalties = [0.0 if given.penalties is None else given.penalties[row, place].item() for place in places]
    rewards = [-penalty for penalty in penalties]
    if places:
        rewards[-1] += reward
    return places, rewards


def slow_gae(given):
    found = torch.zeros(given.mask.shape, dtype=torch.float64)
    for row, reward in enumerate(given.rewards.tolist()):
        places, rewards = slow_token_rewards(given, row, reward)
        values = [given.values[row, place].item() for place in places] + [0.0]
        deltas = [r + given.gamma * values[i + 1] - values[i] for i, r in enumerate(rewards)]
        for i, place in enumerate(places):
            found[row, place] = sum((given.gamma * given.lambd) ** k * d for k, d in enumerate(deltas[i:]))
    return found


def slow_baselines(name, rewards):
    """Rewards of one prompt, changed by its baseline."""
    mean = statistics.fmean(rewards)
    if name == "rloo" and len(rewards) > 1:
        return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    if name in ("group_norm", "grpo"):
        spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        return [(r - mean) / (spread + 1e-6) for r in rewards]
    return [r - mean for r in rewards] if name in names.GROUPED else rewards


def slow_returns(name, given):
    found = torch.zeros(given.mask.shape, dtype=torch.float64)
    several = given.rewards.tolist()
    changed = []
    for first in range(0, len(several), given.group_size):
        changed += slow_baselines(name, several[first : first + given.group_size])
    for row, reward in enumerate(changed):
        places, rewards = slow_token_rewards(given, row, reward)
        for i, place in enumerate(places):
            found[row, place] = sum(given.gamma**k * r for k, r in enumerate(rewards[i:]))
    return found


def slow_whitened(values, mask):
    chosen = [values[row, place].item() for row in range(mask.shape[0]) for place in range(mask.shape[1])
              if mask[row, place]]  # fmt: skip
    if not chosen:
        return torch.zeros_like(values)
    mean, spread = statistics.fmean(chosen), statistics.pstdev(chosen)
    return torch.where(mask, (values - mean) / (spread + 1e-6), torch.zeros_like(values))


@settings(deadline=None, max_examples=50)
@given(batches())
def test_gae_is_the_sum_of_its_equation(given_):
    found = estimate("gae", given_)
    expected = slow_gae(given_)
    torch.testing.assert_close(found.advantages.double(), expected, atol=1e-5, rtol=1e-5)
    values = torch.where(given_.mask, given_.values, torch.zeros(()))
    torch.testing.assert_close(found.returns.double(), expected + values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "gae"])
@settings(deadline=None, max_examples=50)
@given(given_=batches())
def test_k22_an_estimator_is_its_equation(name, given_):
    found = estimate(name, given_)
    expected = slow_returns(name, given_)
    torch.testing.assert_close(found.returns.double(), expected, atol=1e-4, rtol=1e-4)
    if name in ("reinforce++", "reinforce_baseline"):
        expected = slow_whitened(expected, given_.mask)
        if given_.mask.any() and found.returns[given_.mask].std(correction=0) < 1e-3:
            return  # rounding, divided by a spread of next to nothing
    torch.testing.assert_close(found.advantages.double(), expected, atol=1e-3, rtol=1e-3)


# -- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADVANTAGES)
def test_k23_rows_without_tokens_give_zero(name):
    mask = torch.tensor([[False, False], [True, True], [False, False], [True, False]])
    broken = torch.where(mask, 0.25, torch.nan)
    given_ = inputs([1.0, 2.0, 3.0, 5.0], mask, values=broken, penalties=broken, group_size=2, whitened=True)
    found = estimate(name, given_)
    assert found.advantages[mask].isfinite().all()
    assert found.advantages[~mask].eq(0).all()
    assert found.returns[~mask].eq(0).all()


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (2, 0)])
def test_k11_a_batch_of_nothing_gives_nothing(name, shape):
    mask = torch.ones(shape, dtype=torch.bool)
    found = estimate(name, inputs([1.0] * shape[0], mask, values=torch.zeros(shape), group_size=2, whitened=True))
    assert found.advantages.shape == found.returns.shape == shape


@pytest.mark.parametrize("name", names.GROUPED)
def test_samples_that_are_all_alike_give_exactly_zero(name):
    for count in (2, 3, 7, 11):
        assert grouped(name, [0.1] * count) == [0.0] * count


def test_whitening_is_over_all_ranks():
    mine, others = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 10.0, 4.0]])
    masks = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    both = whiten(torch.cat([mine, others], 1), torch.cat(masks, 1))
    sums = iter([torch.tensor([3.0, 17.0]), torch.tensor([((others - 4) ** 2).sum()])])
    torch.testing.assert_close(whiten(mine, masks[0], lambda each: each + next(sums)), both[:, :2])
    assert both.mean().item() == pytest.approx(0, abs=1e-6)
    assert both.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_the_reward_comes_at_the_last_token_of_the_mask():
    given_ = inputs([5.0, 7.0], [[True, False, True, False], [False, False, False, False]])
    assert token_rewards(given_, given_.rewards).tolist() == [[0, 0, 5, 0], [0, 0, 0, 0]]


def test_k08_what_does_not_fit_is_told():
    with pytest.raises(ConfigError, match=r"advantage_estimator='best': expected one of gae, reinforce"):
        estimate("best", inputs([1.0], ONE_ROW))
    with pytest.raises(ConfigError, match="needs the values of a critic"):
        estimate("gae", inputs([1.0], ONE_ROW))
    with pytest.raises(ConfigError, match="3 sequences in groups of 2"):
        inputs([1.0] * 3, torch.ones(3, 1, dtype=torch.bool), group_size=2)
    with pytest.raises(ConfigError, match="expected \\(batch,\\) and \\(batch, length\\)"):
        inputs([1.0, 2.0], ONE_ROW)
