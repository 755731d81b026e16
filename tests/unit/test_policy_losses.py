"""Losses of the policy and of the critic, divergence and entropy: by hand and against loops over tokens."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError
from lightrft.trainer import names
from lightrft.trainer.correction import importance_weights, mismatch
from lightrft.trainer.entropy import entropy_loss, high_entropy
from lightrft.trainer.kl import KL_ESTIMATORS, kl_controller, kl_estimate, policy_drift
from lightrft.trainer.policy_losses import POLICY_LOSSES, PolicyInputs, policy_loss
from lightrft.trainer.value_loss import value_loss

ALL = torch.ones(1, 2, dtype=torch.bool)


def of_ratios(name, ratios, advantages, **more):
    """The loss of one sequence, by token, and its gradient with respect to the log-probs."""
    log_probs = torch.tensor([ratios]).log().requires_grad_()
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    given_ = PolicyInputs(
        log_probs=log_probs, old_log_probs=torch.zeros(1, len(ratios)), advantages=torch.tensor([advantages]),
        mask=mask, **more,
    )  # fmt: skip
    loss = policy_loss(name, given_)
    (gradient,) = torch.autograd.grad(loss.per_token.sum(), log_probs)
    return loss.per_token[0].tolist(), gradient[0].tolist(), loss.clipped[0].tolist()


def close(found, expected):
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_names_of_the_flags_are_those_of_the_registries():
    assert tuple(POLICY_LOSSES) == names.POLICY_LOSSES
    assert tuple(KL_ESTIMATORS) == names.KL_ESTIMATORS


# -- by hand -------------------------------------------------------------------------------------------------------


def test_ppo_by_hand():
    loss, gradient, clipped = of_ratios("ppo", [1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0])
    close(loss, [-1.2, 1.5, -0.5, 0.8])
    close(gradient, [0.0, 1.5, -0.5, 0.0])
    assert clipped == [True, False, False, True]


def test_clip_higher_leaves_more_room_above():
    loss, gradient, clipped = of_ratios("ppo", [1.25, 1.25, 0.7], [1.0, -1.0, -1.0], eps_high=0.28)
    close(loss, [-1.25, 1.25, 0.8])
    close(gradient, [-1.25, 1.25, 0.0])
    assert clipped == [False, False, True]


def test_gspo_by_hand():
    # The geometric mean of 4 and 0.25 is 1: nothing is clipped, though each token is far off.
    loss, gradient, _ = of_ratios("gspo", [4.0, 0.25], [2.0, 2.0])
    close(loss, [-2.0, -2.0])
    close(gradient, [-2.0, -2.0])
    loss, gradient, clipped = of_ratios("gspo", [2.0, 2.0], [1.0, 1.0])
    close(loss, [-1.2, -1.2])
    close(gradient, [0.0, 0.0])
    assert clipped == [True, True]


def test_gmpo_by_hand():
    # 4 is bounded to 1.2 before the mean is taken, 0.25 is not.
    loss, gradient, clipped = of_ratios("gmpo", [4.0, 0.25], [2.0, 2.0])
    mean = math.sqrt(1.2 * 0.25)
    close(loss, [-2 * mean, -2 * mean])
    close(gradient, [0.0, -2 * mean])  # half of each of the two losses
    assert clipped == [True, False]
    loss, gradient, clipped = of_ratios("gmpo", [4.0, 0.25], [-1.0, -1.0])
    close(loss, [math.sqrt(4 * 0.8)] * 2)
    assert clipped == [False, True]


def test_cispo_by_hand():
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-1.0 - math.log(3.0), -2.0]])
    given_ = PolicyInputs(log_probs=log_probs, old_log_probs=old, advantages=torch.tensor([[1.0, -1.0]]), mask=ALL)
    loss = policy_loss("cispo", given_)
    close(loss.per_token[0].tolist(), [1.2, -2.0])
    loss.per_token.sum().backward()
    close(log_probs.grad[0].tolist(), [-1.2, 1.0])  # the clipped token has a gradient too
    assert loss.clipped.tolist() == [[True, False]]


def test_cpgd_by_hand():
    loss, gradient, clipped = of_ratios("cpgd", [1.5, 1.1, 0.5, 0.5], [1.0, 2.0, 1.0, -1.0])
    close(loss, [-math.log(1.2), -2 * math.log(1.1), -math.log(0.5), math.log(0.8)])
    close(gradient, [0.0, -2.0, -1.0, 0.0])
    assert clipped == [True, False, False, True]


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 1.0, 5.0]], requires_grad=True)
    old, returns = torch.tensor([[1.0, 0.5, 1.0]]), torch.tensor([[3.0, 2.0, 9.0]])
    loss, clipped = value_loss(values, old, returns, torch.tensor([[True, True, False]]), 0.2)
    # The second value has moved by 0.5; near its old one it is 0.7, which is further from 2.
    close(loss[0].tolist(), [2.0, 0.5 * 1.3**2, 0.0])
    assert clipped.tolist() == [[False, True, False]]
    loss.sum().backward()
    close(values.grad[0].tolist(), [-2.0, 0.0, 0.0])
    free, _ = value_loss(values.detach(), old, returns, torch.ones(1, 3, dtype=torch.bool))
    close(free[0].tolist(), [2.0, 0.5, 8.0])


def test_divergence_by_hand():
    log_probs, other = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    found = {name: kl_estimate(name, log_probs, other, ALL)[0].tolist() for name in KL_ESTIMATORS}
    close(found["k1"], [0.5, -1.0])
    close(found["k2"], [0.125, 0.5])
    close(found["k3"], [math.exp(-0.5) - 1 + 0.5, math.exp(1) - 1 - 1])


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_an_unbiased_estimator_is_the_divergence_on_average(name):
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    exact = (p * (p / q).log()).sum()
    each = kl_estimate(name, p.log().unsqueeze(0), q.log().unsqueeze(0), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close((p * each[0]).sum(), exact)


def test_the_drift_is_the_divergence_of_the_old_policy_from_the_new_one():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    each = policy_drift(q.log().unsqueeze(0), p.log().unsqueeze(0), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close((p * each[0]).sum(), (p * (p / q).log()).sum())


def test_k22_a_divergence_as_a_loss_has_gradient():
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    for name in ("k2", "k3"):
        (gradient,) = torch.autograd.grad(kl_estimate(name, log_probs, log_probs.detach() - 0.5, ALL).sum(), log_probs)
        assert (gradient > 0.1).all()


def test_k3_never_drives_a_policy_further_from_the_other_one():
    log_probs = torch.tensor([[-19.0, -60.0]], requires_grad=True)
    found = kl_estimate("k3", log_probs, torch.zeros(1, 2), ALL)
    assert found[0].tolist() == pytest.approx([math.exp(19) - 20, math.exp(20) - 21])
    (gradient,) = torch.autograd.grad(found.sum(), log_probs)
    assert gradient[0].tolist() == pytest.approx([1 - math.exp(19), 0.0])


def test_a_large_iteration_makes_no_adaptive_weight_negative():
    controller = kl_controller(0.1, 2.0, 10)
    controller.update(0.0, 1000)
    assert controller.value == pytest.approx(0.1 * 0.8)


def test_the_adaptive_weight_by_hand():
    controller = kl_controller(0.1, 2.0, 1000)
    controller.update(3.0, 100)  # 0.5 above, clipped to 0.2
    assert controller.value == pytest.approx(0.1 * 1.02)
    controller.update(1.9, 1000)
    assert controller.value == pytest.approx(0.1 * 1.02 * 0.95)
    controller.update(math.nan, 1000)
    another = kl_controller(0.5, 2.0, 1000)
    another.load_state_dict(controller.state_dict())
    assert another.value == controller.value == pytest.approx(0.1 * 1.02 * 0.95)


def test_a_fixed_weight_stays():
    controller = kl_controller(0.1, 0.0, 1000)
    controller.update(100.0, 1000)
    controller.load_state_dict({"value": 7.0})
    assert controller.value == 0.1


def test_entropy_by_hand():
    entropy = torch.tensor([[0.1, 3.0, 0.2, 2.0, 9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    close(entropy_loss(entropy, mask)[0].tolist(), [-0.1, -3.0, -0.2, -2.0, 0.0])
    assert high_entropy(entropy, mask, 0.5).tolist() == [[False, True, False, True, False]]
    assert high_entropy(entropy, mask, 0.51).sum() == 3
    assert torch.equal(high_entropy(entropy, mask, 1.0), mask)
    assert high_entropy(entropy, mask, 0.01).tolist() == [[False, True, False, False, False]]
    assert torch.equal(high_entropy(torch.ones(1, 5), mask, 0.25), mask), "none is above another"
    assert torch.equal(high_entropy(torch.tensor([[0.0, -0.0, -1e-9, 0.0, 1.0]]), mask, 0.25), mask)
    two = torch.tensor([[5.0, 4.0], [0.2, 0.1]])
    assert high_entropy(two, two > 0, 0.5).tolist() == [[True, True], [False, False]], "the share is of the batch"


def test_truncated_importance_sampling_by_hand():
    mine, engine = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    close(importance_weights(mine, engine, ALL, 1.2)[0].tolist(), [1.2, math.exp(-1)])
    found = {name: (total / count).item() for name, (total, count) in mismatch(mine, engine, ALL).items()}
    assert found == pytest.approx({
        "mismatch/log_prob": 0.75,
        "mismatch/ratio": (math.exp(0.5) + math.exp(-1)) / 2,
        "mismatch/kl": (math.exp(0.5) - 1 - 0.5 + math.exp(-1) - 1 + 1) / 2,
    })  # fmt: skip


# -- against loops over tokens -------------------------------------------------------------------------------------


def clip(x, low, high):
    return min(max(x, low), high)


def slow_token(name, ratio, mean, advantage, low, high):
    """The loss of one token, of its own ratio or of that of its sequence."""
    if name == "cispo":
        raise AssertionError("needs the log-prob")
    if name == "gmpo":
        return -mean * advantage
    of = {"ppo": ratio, "gspo": mean, "cpgd": math.log(ratio)}[name]
    low, high = (math.log(low), math.log(high)) if name == "cpgd" else (low, high)
    return -min(of * advantage, clip(of, low, high) * advantage)


def slow_loss(name, log_probs, old, advantages, mask, low, high):
    found = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(mask.shape[0]):
        places = [place for place in range(mask.shape[1]) if mask[row, place]]
        ratios = {place: math.exp(log_probs[row, place].item() - old[row, place].item()) for place in places}
        gains = {place: advantages[row, place].item() for place in places}
        product = 1.0
        for place in places:
            bounded = ratios[place]
            if name == "gmpo":
                bounded = min(bounded, high) if gains[place] > 0 else max(bounded, low)
            product *= bounded
        mean = product ** (1 / max(len(places), 1))
        for place in places:
            if name == "cispo":
                found[row, place] = -clip(ratios[place], low, high) * gains[place] * log_probs[row, place].item()
            else:
                found[row, place] = slow_token(name, ratios[place], mean, gains[place], low, high)
    return found


@st.composite
def batches(draw):
    rows, length = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    mask = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    several = [torch.randn(rows, length, generator=generator) * 0.5 for _ in range(3)]
    return *several, mask


@pytest.mark.parametrize("name", POLICY_LOSSES)
@settings(deadline=None, max_examples=50)
@given(batch=batches(), eps_low=st.sampled_from([0.0, 0.2]), eps_high=st.sampled_from([0.2, 0.5]))
def test_k22_a_policy_loss_is_its_equation(name, batch, eps_low, eps_high):
    log_probs, old, advantages, mask = batch
    given_ = PolicyInputs(
        log_probs=log_probs, old_log_probs=old, advantages=advantages, mask=mask, eps_low=eps_low, eps_high=eps_high
    )
    expected = slow_loss(name, log_probs, old, advantages, mask, 1 - eps_low, 1 + eps_high)
    found = policy_loss(name, given_)
    torch.testing.assert_close(found.per_token.double(), expected, atol=1e-5, rtol=1e-5)
    assert not (found.clipped & ~mask).any()


@settings(deadline=None, max_examples=50)
@given(batch=batches(), limit=st.sampled_from([0.0, 0.1, 1.0]))
def test_the_value_loss_is_its_equation(batch, limit):
    values, old, returns, mask = batch
    expected = torch.zeros(mask.shape)
    for row in range(mask.shape[0]):
        for place in range(mask.shape[1]):
            if mask[row, place]:
                v, o, r = (each[row, place].item() for each in (values, old, returns))
                near = clip(v, o - limit, o + limit) if limit else v
                expected[row, place] = 0.5 * max((v - r) ** 2, (near - r) ** 2)
    torch.testing.assert_close(value_loss(values, old, returns, mask, limit)[0], expected)


@settings(deadline=None, max_examples=50)
@given(batch=batches(), share=st.sampled_from([0.2, 0.5, 1.0]))
def test_tokens_of_high_entropy_are_the_largest_ones(batch, share):
    entropy, _, _, mask = batch
    entropy = entropy.abs()
    found = high_entropy(entropy, mask, share)
    values = sorted(entropy[mask].tolist(), reverse=True)
    wanted = math.ceil(share * len(values) - 1e-6)
    assert not (found & ~mask).any()
    assert sorted(entropy[found].tolist(), reverse=True) == values[: int(found.sum())]
    assert found.sum() >= wanted
    assert all(value >= values[wanted - 1] * (1 - 1e-3) for value in entropy[found].tolist())


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_f13_tokens_of_high_entropy_are_those_of_all_ranks(cut):
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(8, 50, generator=generator) ** 4
    mask = torch.rand(8, 50, generator=generator) < 0.7
    whole = high_entropy(entropy, mask, 0.2)
    assert whole.sum() == pytest.approx(0.2 * mask.sum(), abs=2)
    parts = [(entropy[:cut], mask[:cut]), (entropy[cut:], mask[cut:])]
    meeting = threading.Barrier(2)
    sums = [None, None]

    def on_rank(rank):
        def total(mine):
            sums[rank] = mine
            meeting.wait()
            both = sums[0] + sums[1]
            meeting.wait()
            return both

        return high_entropy(*parts[rank], 0.2, total)

    with ThreadPoolExecutor(2) as ranks:
        assert torch.equal(torch.cat(list(ranks.map(on_rank, range(2)))), whole)


# -- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_k23_rows_without_tokens_give_zero_and_no_gradient(name):
    mask = torch.tensor([[False, False], [True, False]])
    log_probs = torch.where(mask, -1.0, torch.nan).requires_grad_()
    broken = torch.where(mask, -1.2, torch.inf)
    loss = policy_loss(name, PolicyInputs(log_probs=log_probs, old_log_probs=broken, advantages=broken, mask=mask))
    loss.per_token.sum().backward()
    assert loss.per_token[~mask].eq(0).all()
    assert log_probs.grad[~mask].eq(0).all()
    assert log_probs.grad.isfinite().all()


def test_k23_divergence_entropy_and_values_outside_the_mask_are_zero():
    mask = torch.tensor([[False, False], [True, False]])
    broken = torch.where(mask, -1.0, torch.nan)
    for name in KL_ESTIMATORS:
        assert kl_estimate(name, broken, broken, mask).eq(0).all()
    assert entropy_loss(broken, mask).tolist() == [[0, 0], [1, 0]]
    assert value_loss(broken, broken, broken, mask, 0.2)[0].eq(0).all()
    assert importance_weights(broken, broken, mask, 2.0).tolist() == [[0, 0], [1, 0]]
    assert all(total.isfinite() for total, _ in mismatch(broken, broken, mask).values())
    assert high_entropy(broken, mask, 0.5).tolist() == [[False, False], [True, False]]
    assert not high_entropy(broken, torch.zeros_like(mask), 0.5).any()
    assert high_entropy(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool), 0.5).shape == (0, 2)


def test_k08_unknown_names_are_told_with_those_that_there_are():
    given_ = PolicyInputs(log_probs=ALL.float(), old_log_probs=ALL.float(), advantages=ALL.float(), mask=ALL)
    with pytest.raises(ConfigError, match="policy_loss='best': expected one of ppo, gspo, gmpo, cispo, cpgd"):
        policy_loss("best", given_)
    with pytest.raises(ConfigError, match="kl_estimator='k9': expected one of k1, k2, k3"):
        kl_estimate("k9", ALL.float(), ALL.float(), ALL)
