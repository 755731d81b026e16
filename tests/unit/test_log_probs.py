"""Log-probs and entropy of given tokens, from logits and fused with the output layer, against the plainest formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_batches import Shapes

from lightrft.errors import ConfigError
from lightrft.models import fused_linear_log_probs, token_log_probs
from lightrft.models import log_probs as module

TOKENS, WIDTH, VOCABULARY = 4, 3, 13


def inputs(dtype=torch.float64, tokens=TOKENS, vocabulary=VOCABULARY, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    return *(one.to(dtype).requires_grad_() for one in (hidden, weight, bias)), ids


def plain(logits, ids, temperature):
    logs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    return logs.gather(-1, ids[..., None]).squeeze(-1), -(logs.exp() * logs).sum(-1)


def from_logits(hidden, weight, bias, ids, **others):
    return token_log_probs(hidden @ weight.T + bias, ids, **others)


def fused(hidden, weight, bias, ids, **others):
    return fused_linear_log_probs(hidden, weight, ids, bias=bias, chunk_size=6, **others)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("compute", [from_logits, fused])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_are_those_of_finite_differences(compute, temperature, entropy):
    *tensors, ids = inputs()

    def function(*given):
        found = compute(*given, ids, temperature=temperature, entropy=entropy)
        assert (found.entropy is not None) is entropy
        return tuple(one for one in found if one is not None)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("compute", [from_logits, fused])
@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(0, 9),
    vocabulary=st.integers(1, 30),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_the_plain_formula(compute, tokens, vocabulary, temperature, seed):
    hidden, weight, bias, ids = inputs(torch.float32, tokens, vocabulary, seed)
    log_probs, entropy = compute(hidden, weight, bias, ids, temperature=temperature, entropy=True)
    expected = plain(hidden @ weight.T + bias, ids, temperature)
    torch.testing.assert_close((log_probs, entropy), expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 2, tokens)
    found, wanted = (
        gradients((weights * one).sum() + (two**2).sum(), hidden, weight, bias)
        for one, two in ((log_probs, entropy), expected)
    )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compute", [from_logits, fused])
def test_what_is_in_16_bits_is_computed_in_32(compute):
    hidden, weight, bias, ids = inputs(torch.bfloat16)
    log_probs, entropy = compute(hidden, weight, bias, ids, temperature=0.5, entropy=True)
    assert log_probs.dtype == entropy.dtype == torch.float32
    logits = torch.addmm(bias, hidden, weight.T)
    torch.testing.assert_close((log_probs, entropy), plain(logits, ids, 0.5), atol=0.1, rtol=0.02)
    found = gradients(log_probs.sum(), hidden, weight, bias)
    wanted = gradients(plain(logits, ids, 0.5)[0].sum(), hidden, weight, bias)
    assert all(one.dtype == torch.bfloat16 for one in found)
    torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("compute", [from_logits, fused])
def test_logits_far_from_zero_and_tokens_that_cannot_be_do_no_harm(compute):
    hidden, weight, bias, ids = inputs(torch.float32)
    with torch.no_grad():
        bias += 1e4
        bias[3], bias[4] = -torch.inf, -3e4
    ids[0] = 3
    log_probs, entropy = compute(hidden, weight, bias, ids, entropy=True)
    assert log_probs[0] == -torch.inf
    torch.testing.assert_close(log_probs[1:], plain(hidden @ weight.T + bias, ids, 1.0)[0][1:], atol=1e-2, rtol=0)
    assert entropy.isfinite().all()
    for one in gradients(log_probs[1:].sum() + entropy.sum(), hidden, weight):
        assert one.isfinite().all()


def test_many_rows_are_computed_a_few_at_a_time(monkeypatch):
    hidden, weight, bias, ids = inputs()
    whole = from_logits(hidden, weight, bias, ids, entropy=True)
    monkeypatch.setattr(module, "_ELEMENTS", 2 * VOCABULARY)
    parts = from_logits(hidden, weight, bias, ids, entropy=True)
    torch.testing.assert_close(parts, whole, atol=0, rtol=0)
    found = (gradients(one.log_probs.sum(), hidden, weight) for one in (parts, whole))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(2, 3), (6,), ()])
def test_shapes_are_those_of_the_tokens(shape):
    hidden, ids = torch.randn(*shape, WIDTH), torch.randint(VOCABULARY, shape)
    weight = torch.randn(VOCABULARY, WIDTH)
    for found in (fused_linear_log_probs(hidden, weight, ids), token_log_probs(hidden @ weight.T, ids)):
        assert found.log_probs.shape == shape
        assert found.entropy is None


def test_only_gradients_that_are_asked_for_are_computed():
    hidden, weight, bias, ids = inputs()
    frozen = fused(hidden, weight.detach(), bias.detach(), ids).log_probs.sum()
    torch.testing.assert_close(gradients(frozen, hidden), gradients(fused(hidden, weight, bias, ids)[0].sum(), hidden))
    of_weight = gradients(fused(hidden.detach(), weight, None, ids).log_probs.sum(), weight)
    logits = hidden.detach() @ weight.T
    torch.testing.assert_close(of_weight, gradients(plain(logits, ids, 1.0)[0].sum(), weight))


def test_a_token_outside_of_the_vocabulary_has_no_log_prob():
    hidden, weight, bias, ids = inputs()
    ids[2] = VOCABULARY
    found = fused(hidden, weight, bias, ids).log_probs
    assert found.isnan().tolist() == [place == 2 for place in range(TOKENS)]


@pytest.mark.parametrize("entropy", [False, True])
def test_all_logits_never_exist_at_once(entropy):
    hidden, weight, bias, ids = inputs(tokens=40, vocabulary=60)
    with Shapes() as shapes:
        scores = fused(hidden, weight, bias, ids, entropy=entropy)
        gradients(sum(one.sum() for one in scores if one is not None), hidden, weight, bias)
    assert max(math.prod(shape) for shape in shapes.seen) == max(40 * WIDTH, 60 * WIDTH, 40 * 6) < 40 * 60


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_cannot_be_divided_by_is_refused(temperature):
    hidden, weight, bias, ids = inputs()
    for compute in (from_logits, fused):
        with pytest.raises(ConfigError, match="expected a positive number.*for tokens of greedy decoding pass 1.0"):
            compute(hidden, weight, bias, ids, temperature=temperature)


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, _, ids = inputs()
    with pytest.raises(ConfigError, match=r"logits of shape \(4, 3\) for tokens of shape \(3,\)"):
        token_log_probs(hidden, ids[:3])
    with pytest.raises(ConfigError, match=r"weight of shape \(3, 13\), tokens of shape \(4,\): expected"):
        fused_linear_log_probs(hidden, weight.T, ids)
    with pytest.raises(ConfigError, match="chunk_size=0: expected 1 at least"):
        fused_linear_log_probs(hidden, weight, ids, chunk_size=0)
