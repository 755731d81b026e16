"""EN201 and on: what sampling parameters mean, in every form, and which are refused."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightrft.errors import ConfigError
from lightrft.sim.contracts.engine import reference
from lightrft.sim.contracts.engine.capabilities import contract
from lightrft.sim.contracts.findings import expect, refused
from lightrft.strategy.engine import EngineStatus
from lightrft.strategy.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightrft.sim.contracts.engine.subject import Subject

__all__: list[str] = []

DRAWS = 200

FORMS: Mapping[str, Any] = {
    "our class": SamplingParams(temperature=0, max_tokens=6, min_tokens=2, logprobs=True, stop_token_ids=(5,)),
    "a mapping, as vLLM calls them": {
        "temperature": 0, "max_tokens": 6, "min_tokens": 2, "logprobs": 0, "stop_token_ids": [5],
    },
    "a mapping, as SGLang calls them": {
        "temperature": 0, "max_new_tokens": 6, "min_new_tokens": 2, "logprobs": True, "stop_token_ids": {5},
    },
}  # fmt: skip


@contract.check(201)
def check_parameters_have_several_forms(subject: Subject) -> None:
    """Our class, mappings with the names of either engine, None, and objects of the engine's own library mean the same."""  # noqa: E501
    engine = subject.fresh()
    requests = [{"prompt_token_ids": prompt} for prompt in subject.prompts]
    forms = dict(FORMS)
    if subject.native is not None:
        forms["an object of the engine"] = subject.native(FORMS["our class"])
    found = {name: engine.generate(requests, params) for name, params in forms.items()}
    expected = found["our class"]
    plain = [dataclasses.replace(one, log_probs=None) for one in expected]
    for name, completions in found.items():
        of_the_engine = name not in FORMS  # and may have no word for log-probs
        got = [dataclasses.replace(one, log_probs=None) for one in completions] if of_the_engine else completions
        wanted = plain if of_the_engine else expected
        expect(subject.alike(got, wanted), f"{name} gave {got}, and our class {wanted}")
    expect(
        all(2 <= len(one.output_token_ids) <= 6 and one.log_probs is not None for one in expected),
        f"min_tokens=2, max_tokens=6 and logprobs gave {expected}",
    )
    lengths = [len(one.output_token_ids) for one in engine.generate(requests, None)]
    expect(max(lengths) <= subject.max_tokens, f"None gave {lengths} tokens, expected {subject.max_tokens} at most")


def _not_allowed(subject: Subject) -> Sequence[dict[str, Any]]:
    return (
        {"n": 0}, {"temperature": -1.0}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_p": 0.0},
        {"top_p": 1.5}, {"top_k": -2}, {"min_p": 1.5}, {"max_tokens": 0}, {"min_tokens": 9},
        {"repetition_penalty": 0.0}, {"presence_penalty": 3.0}, {"frequency_penalty": -3.0},
        {"logit_bias": {subject.vocabulary: 1.0}}, {"n": 2}, {"not_an_option": 1}, {"options": {"nor_this": 1}},
    )  # fmt: skip


@contract.check(202)
def check_values_that_are_not_allowed_are_refused(subject: Subject) -> None:
    """A value that is not allowed, and an option that the engine does not have, is a ConfigError that names it; the engine goes on as before (K08)."""  # noqa: E501
    engine = subject.fresh()
    for wrong in _not_allowed(subject):
        name = next(iter(wrong.get("options") or wrong))
        message = refused(functools.partial(subject.generate, **wrong), ConfigError)
        if name not in message and not (name == "logit_bias" and str(subject.vocabulary) in message):
            raise AssertionError(f"{wrong} was refused without a word of {name}: {message}")
    message = refused(lambda: engine.generate([{"prompt_token_ids": subject.prompts[0]}], 3), ConfigError)
    expect("int" in message, f"3 as parameters was refused by {message!r}")
    both = {"max_tokens": 3, "max_new_tokens": 4}
    message = refused(lambda: engine.generate([{"prompt_token_ids": subject.prompts[0]}], both), ConfigError)
    expect("max_new_tokens" in message, f"{both} was refused by {message!r}")
    expect(engine.status is EngineStatus.AWAKE, f"afterwards the engine is {engine.status}")
    subject.holds(0, "after parameters that were refused")


@contract.check(203, "language_model")
def check_tokens_are_drawn_from_the_distribution(subject: Subject) -> None:
    """Tokens are drawn as the model at that temperature has it: the mean of their log-probs is what it should be, within five standard deviations."""  # noqa: E501
    subject.fresh()
    prompt = subject.prompts[2]
    for temperature in (0.5, 1.0, 2.0):
        told = reference.next_token(subject.models[0], prompt, temperature)
        mean, deviation = reference.entropy_of(told)
        drawn = _first_tokens(subject, prompt, temperature=temperature)
        found = float(told[drawn].mean())
        if not abs(found - mean) <= 5 * deviation / DRAWS**0.5:
            raise AssertionError(
                f"at temperature {temperature} tokens have a log-prob of {found} in the mean, expected {mean}"
            )


@contract.check(204, "language_model")
def check_cuts_leave_what_they_should(subject: Subject) -> None:
    """`top_k`, `top_p` and `min_p` leave the likeliest tokens that they should, and more than one of them is drawn; with `top_k=1` the likeliest alone (K08)."""  # noqa: E501
    subject.fresh()
    prompt = subject.prompts[2]
    told = reference.next_token(subject.models[0], prompt, 2.0)
    ordered, order = told.exp().sort(descending=True)
    before = ordered.cumsum(0) - ordered
    for params, kept in (
        ({"top_k": 2}, torch.arange(len(order)) < 2),
        ({"top_p": 0.5}, before < 0.5),
        ({"min_p": 0.3}, ordered >= 0.3 * ordered[0]),
        ({"top_k": 1}, torch.arange(len(order)) < 1),
    ):
        allowed = set(order[kept].tolist())
        drawn = set(_first_tokens(subject, prompt, temperature=2.0, **params).tolist())
        if not drawn <= allowed or (len(allowed) > 1) != (len(drawn) > 1):
            raise AssertionError(f"{params} drew {sorted(drawn)}, expected some of {sorted(allowed)}")


@contract.check(205, "log_probs_after_cuts")
def check_log_probs_are_of_what_is_left(subject: Subject) -> None:
    """With `top_k=2` the probabilities of the two tokens add up to 1 where log-probs are processed."""
    subject.fresh()
    found = subject.generate(
        [subject.prompts[2]] * 64, temperature=2.0, max_tokens=1, ignore_eos=True, top_k=2, logprobs=0
    )
    chance = {one.output_token_ids: math.exp((one.log_probs or (math.nan,))[0]) for one in found}
    expect({one.log_probs_mode for one in found} == {"processed"}, "the log-probs are raw")
    expect(len(chance) == 2 and abs(sum(chance.values()) - 1) < 1e-3, f"tokens have the probabilities {chance}")


@contract.check(206, "language_model")
def check_biases_and_penalties_count(subject: Subject) -> None:
    """`logit_bias` pushes tokens, penalties for presence and frequency push back what came two tokens before, or one, and log-probs say that they are processed."""  # noqa: E501  # noqa: E501
    subject.fresh()
    token = subject.first_token + 1
    (pushed,) = subject.generate(subject.prompts[:1], logit_bias={token: 100.0}, logprobs=0)
    expect(set(pushed.output_token_ids) == {token}, f"a bias of 100 on {token} gave {pushed.output_token_ids}")
    expect(pushed.log_probs_mode == "processed", f"log-probs with a bias are said to be {pushed.log_probs_mode}")
    prompt = subject.prompts[0]
    bias = _nearly_equal(subject, prompt)
    (plain,) = subject.generate([prompt], logit_bias=bias, max_tokens=3)
    expect(len(set(plain.output_token_ids)) == 1, f"without penalty {plain.output_token_ids}, expected one token")
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        (found,) = subject.generate([prompt], logit_bias=bias, **penalty, max_tokens=3, logprobs=0)
        expect(set(found.output_token_ids) == set(bias), f"{penalty} gave {found.output_token_ids} of {set(bias)}")
        expect(found.log_probs_mode == "processed", f"log-probs with a penalty are said to be {found.log_probs_mode}")


def _nearly_equal(subject: Subject, prompt: tuple[int, ...]) -> dict[int, float]:
    """Biases by which one of two tokens comes three times, and is ahead by less than 2 the second and third time."""
    first = subject.first_token + 1
    for ahead in range(first, first + 8):
        told = [reference.next_token(subject.models[0], (*prompt, *[ahead] * times)) for times in range(3)]
        for behind in range(first, first + 8):
            gaps = [float(each[ahead] - each[behind]) for each in told]
            if behind != ahead and max(gaps[1:]) - min(gaps) < 1.5:
                return {ahead: 100.0, behind: 100.0 + min(gaps) - 0.2}
    raise AssertionError("no bias makes one of two tokens come three times")


def _first_tokens(subject: Subject, prompt: tuple[int, ...], **params: Any) -> Tensor:
    """The first tokens of many completions."""
    found = subject.samples([prompt], n=DRAWS, max_tokens=1, **params)
    expect(len(found) == DRAWS, f"n={DRAWS} gave {len(found)} completions")
    return torch.tensor([one[0] for one in found])
