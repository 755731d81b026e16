"""EN101 and on: what comes back for requests."""

from __future__ import annotations

import math
import pickle
from typing import Any

import torch

from lightrft.errors import ConfigError
from lightrft.sim.contracts.engine import reference
from lightrft.sim.contracts.engine.capabilities import contract
from lightrft.sim.contracts.engine.subject import GREEDY, TOKENS, Subject
from lightrft.sim.contracts.findings import expect, refused
from lightrft.strategy.engine import EngineStatus
from lightrft.strategy.requests import Completion, Request

__all__: list[str] = []


@contract.check(101, "language_model")
def check_greedy_tokens_are_those_of_the_model(subject: Subject) -> None:
    """At temperature 0 the tokens are the likeliest ones of the model, and the prompt comes back with them."""
    subject.fresh()
    for prompt, one in zip(subject.prompts, subject.generate(ignore_eos=True), strict=True):
        best = subject.best(0, prompt)
        alike = list(one.output_token_ids) == best
        if not alike and not reference.is_tied(subject.models[0], prompt, best, subject.within):
            raise AssertionError(f"{prompt} was completed by {one.output_token_ids}, and the model says {best}")
        expect(one.prompt_token_ids == prompt, f"the prompt {prompt} came back as {one.prompt_token_ids}")


@contract.check(102, "language_model")
def check_log_probs_are_those_of_the_model(subject: Subject) -> None:
    """Log-probs are those of the model: of its logits where the mode is "raw", of logits / temperature where it is "processed", at temperature 1 and others (F16)."""  # noqa: E501
    subject.fresh()
    for temperature in (0, 0.5, 1.0, 1.5):
        for one in subject.generate(temperature=temperature, logprobs=0, ignore_eos=True):
            scale = temperature if temperature and one.log_probs_mode == "processed" else 1.0
            told = reference.log_probs(subject.models[0], one.prompt_token_ids, one.output_token_ids, scale)
            worst = float((torch.tensor(one.log_probs) - told).abs().max())
            if not worst <= subject.within:
                raise AssertionError(
                    f"at temperature {temperature} {one.log_probs_mode} log-probs are {worst} off those of the model"
                )


@contract.check(103)
def check_completions_come_in_the_order_of_the_requests(subject: Subject) -> None:
    """Completions come in the order of the requests, those of one request next to each other, however many are sent at once (F12, K05)."""  # noqa: E501
    subject.fresh()
    first, room = subject.first_token, subject.vocabulary - subject.first_token
    many = [(first + place % room, first + place // room % room, *subject.prompts[place % 4]) for place in range(150)]
    calls: list[tuple[list[tuple[int, ...]], int, dict[str, Any]]] = [
        (subject.prompts, 3, {"n": 3, "temperature": 1.0}),
        (many, 1, {"max_tokens": 4}),
    ]
    for prompts, samples, params in calls:
        found = subject.generate(prompts, **params)
        expected = [prompt for prompt in prompts for _ in range(samples)]
        got = [one.prompt_token_ids for one in found]
        expect(got == expected, f"completions are of {len(got)} prompts in another order: {got[:8]}, ...")
    alone = [subject.generate([many[place]], max_tokens=4)[0].output_token_ids for place in (0, 77, 149)]
    together = [found[place].output_token_ids for place in (0, 77, 149)]
    expect(alone == together, f"sent with others, prompts were completed by {together}, and alone by {alone}")


@contract.check(104)
def check_log_probs_come_if_they_are_asked_for(subject: Subject) -> None:
    """There is a log-prob for each token, 0 at most, if `logprobs` asks for them, by a number or True; else there are none."""  # noqa: E501
    subject.fresh()
    for asked in (0, 1, True):
        for one in subject.generate(logprobs=asked):
            wrong = one.log_probs is None or len(one.log_probs) != len(one.output_token_ids)
            if wrong or not all(-math.inf < value <= 1e-6 for value in one.log_probs or ()):
                raise AssertionError(f"logprobs={asked!r} gave {one.log_probs} for {len(one.output_token_ids)} tokens")
            expect(one.log_probs_mode in ("raw", "processed"), f"log_probs_mode is {one.log_probs_mode!r}")
    for nothing in (None, False):
        found = [one.log_probs for one in subject.generate(logprobs=nothing)]
        expect(found == [None] * len(found), f"logprobs={nothing!r} gave {found}")


@contract.check(105)
def check_a_completion_ends_for_the_reason_that_it_gives(subject: Subject) -> None:
    """A completion ends with "length" at `max_tokens`, and with "stop" at a token of `stop_token_ids`, which is its last."""  # noqa: E501
    subject.fresh()
    for prompt in subject.prompts:
        (whole,) = subject.generate([prompt], ignore_eos=True)
        expect(
            (whole.finish_reason, len(whole.output_token_ids)) == ("length", TOKENS),
            f"{len(whole.output_token_ids)} tokens and {whole.finish_reason!r}, expected {TOKENS} and 'length'",
        )
        (plain,) = subject.generate([prompt])
        ended = plain.output_token_ids[-1] == subject.end
        expect(plain.finish_reason == ("stop" if ended else "length"), f"{plain} does not end for its reason")
        place = min(2, len(plain.output_token_ids) - 1)
        stop = plain.output_token_ids[place]
        (stopped,) = subject.generate([prompt], stop_token_ids=[stop])
        expect(
            stopped.finish_reason == "stop" and stopped.output_token_ids[-1] in (stop, subject.end),
            f"stop_token_ids=[{stop}] ended it by {stopped.finish_reason!r} after {stopped.output_token_ids}",
        )


@contract.check(106, "language_model", probed=False)
def check_tokens_before_the_end_are_the_same(subject: Subject) -> None:
    """A completion that is ended, by a token or its limit, begins as one that goes on; nothing comes after the first such token."""  # noqa: E501
    subject.fresh()
    for prompt in subject.prompts:
        (whole,) = subject.generate([prompt], ignore_eos=True)
        (plain,) = subject.generate([prompt])
        tokens = whole.output_token_ids
        length = tokens.index(subject.end) + 1 if subject.end in tokens else len(tokens)
        expect(plain.output_token_ids == tokens[:length], f"{plain.output_token_ids}, expected {tokens[:length]}")
        stop = plain.output_token_ids[min(3, length - 1)]
        (stopped,) = subject.generate([prompt], stop_token_ids=[stop])
        expected = tokens[: tokens.index(stop) + 1]
        expect(stopped.output_token_ids == expected, f"{stopped.output_token_ids}, expected {expected}")
        (short,) = subject.generate([prompt], max_tokens=3, ignore_eos=True)
        expect(short.output_token_ids == tokens[:3], f"max_tokens=3 gave {short.output_token_ids} of {tokens}")


@contract.check(107, "stops_beyond_the_end")
def check_stop_tokens_count_where_the_end_does_not(subject: Subject) -> None:
    """With `ignore_eos`, a token of `stop_token_ids` ends a completion."""
    subject.fresh()
    (whole,) = subject.generate(subject.prompts[:1], ignore_eos=True)
    stop = whole.output_token_ids[3]
    (stopped,) = subject.generate(subject.prompts[:1], ignore_eos=True, stop_token_ids=[stop])
    expect(stopped.finish_reason == "stop", f"it ended by {stopped.finish_reason!r}")
    expect(
        stopped.output_token_ids[-1] == stop, f"it ended with {stopped.output_token_ids}, expected {stop} at the end"
    )


@contract.check(108, "language_model")
def check_the_end_token_ends_a_completion(subject: Subject) -> None:
    """The end token of the model ends a completion and is its last, unless `ignore_eos` passes over it or `min_tokens` forbids it."""  # noqa: E501
    subject.fresh()
    pushed = {"logit_bias": {subject.end: 100.0}, "max_tokens": 5}
    (ended,) = subject.generate(subject.prompts[:1], **pushed)
    expect(
        (ended.output_token_ids, ended.finish_reason) == ((subject.end,), "stop"),
        f"the end alone was likely, and it ended by {ended.finish_reason!r} after {ended.output_token_ids}",
    )
    (later,) = subject.generate(subject.prompts[:1], **pushed, min_tokens=3)
    tokens = later.output_token_ids
    expect(len(tokens) == 4 and subject.end not in tokens[:3], f"min_tokens=3 ended after {tokens}")
    (passed,) = subject.generate(subject.prompts[:1], **pushed, ignore_eos=True)
    expect(len(passed.output_token_ids) == 5, f"ignore_eos ended after {passed.output_token_ids}")


@contract.check(109)
def check_lengths_are_those_of_the_settings(subject: Subject) -> None:
    """Without `max_tokens` a completion has as many tokens as the settings say; prompt and completion may fill the length of the model exactly, and never more."""  # noqa: E501
    engine = subject.fresh()
    request = {"prompt_token_ids": subject.prompts[0]}
    (plain,) = engine.generate([request], {"temperature": 0, "ignore_eos": True})
    got = len(plain.output_token_ids)
    expect(got == subject.max_tokens, f"max_tokens=None gave {got} tokens, expected {subject.max_tokens}")
    for length in (16, 1):
        prompt = tuple([subject.first_token] * (subject.max_model_len - length))
        (full,) = subject.generate([prompt], max_tokens=length, ignore_eos=True)
        got = len(full.output_token_ids)
        expect(got == length, f"{got} tokens after a prompt that leaves room for {length}")
        try:
            (cut,) = subject.generate([prompt], max_tokens=length + 1, ignore_eos=True)
        except ConfigError as error:
            expect(str(subject.max_model_len) in str(error), f"no word of {subject.max_model_len}: {error}")
        else:
            expect(len(cut.output_token_ids) == length, f"{len(cut.output_token_ids)} tokens where {length} fit")


@contract.check(110)
def check_requests_have_several_forms(subject: Subject) -> None:
    """A request is a `Request`, or a mapping of token ids in a list, a tuple or a tensor; anything else is refused."""
    engine = subject.fresh()
    tokens = subject.prompts[0]
    given: list[Any] = [Request(prompt_token_ids=tokens)]
    given += [{"prompt_token_ids": form} for form in (tokens, list(tokens), torch.tensor(tokens))]
    found = engine.generate(given, GREEDY)
    expect(len({one.output_token_ids for one in found}) == 1, f"{len(given)} forms of one prompt: {found}")
    expect({one.prompt_token_ids for one in found} == {tokens}, f"{found} are not all of {tokens}")
    for wrong in ("a text", tokens, {"tokens": tokens}, {"prompt_token_ids": tokens, "prompt": "both"}):
        refused(lambda wrong=wrong: engine.generate([wrong], GREEDY), ConfigError)  # type: ignore[misc]


@contract.check(111)
def check_nothing_is_generated_for_no_requests(subject: Subject) -> None:
    """No requests give no completions."""
    expect(subject.fresh().generate([], GREEDY) == [], "completions came of no requests")


@contract.check(112)
def check_completions_are_plain(subject: Subject) -> None:
    """A completion is a `Completion` of Python's own numbers, the same after being pickled, with the version of the weights that made it."""  # noqa: E501
    engine = subject.fresh()
    for one in subject.generate(logprobs=0):
        expect(isinstance(one, Completion), f"a {type(one).__name__}, expected a Completion")
        kinds = {type(token) for token in (*one.prompt_token_ids, *one.output_token_ids)}
        expect(kinds == {int}, f"token ids of {kinds}, expected int")
        expect({type(value) for value in one.log_probs or ()} == {float}, f"log-probs are no floats: {one.log_probs}")
        expect(pickle.loads(pickle.dumps(one)) == one, f"{one} is another one after being pickled")
        version = engine.weight_version
        expect(one.weight_version == version, f"of version {one.weight_version}, by an engine of {version}")


@contract.check(113, "text")
def check_texts_and_tokens_mix(subject: Subject) -> None:
    """Texts are read by the tokenizer, also beside token ids in one call, and completions have the text of their tokens (K06)."""  # noqa: E501
    engine = subject.fresh()
    assert subject.decode is not None
    assert subject.encode is not None
    text = subject.decode(subject.prompts[0])
    tokens = tuple(subject.encode(text))
    requests = [{"prompt": text}, {"prompt_token_ids": subject.prompts[1]}, {"prompt": text}]
    found = engine.generate(requests, GREEDY)
    got = [one.prompt_token_ids for one in found]
    expect(got == [tokens, subject.prompts[1], tokens], f"the prompts came back as {got}")
    told = [one.output_token_ids for one in subject.generate([tokens, subject.prompts[1], tokens])]
    expect([one.output_token_ids for one in found] == told, f"{found}, and as tokens {told}")
    for one in found:
        expected = subject.decode(one.output_token_ids)
        expect(one.text == expected, f"the text is {one.text!r}, and that of its tokens {expected!r}")


@contract.check(114, "text")
def check_texts_end_completions(subject: Subject) -> None:
    """A text of `stop` ends a completion with "stop" as soon as it has come."""
    subject.fresh()
    assert subject.decode is not None
    (whole,) = subject.generate(subject.prompts[:1], ignore_eos=True)
    texts = [subject.decode([token]) for token in whole.output_token_ids]
    stop = next(text for text in texts[1:] if text)  # special tokens have none
    (stopped,) = subject.generate(subject.prompts[:1], ignore_eos=True, stop=[stop])
    expected = whole.output_token_ids[: texts.index(stop) + 1]
    expect(
        (stopped.finish_reason, stopped.output_token_ids) == ("stop", expected),
        f"stop=[{stop!r}] ended {stopped.output_token_ids} by {stopped.finish_reason!r}, expected {expected}",
    )


@contract.check(115)
def check_prompts_that_cannot_be_completed_are_refused(subject: Subject) -> None:
    """A prompt that is empty, too long, or has a token id that there is not, is a ConfigError that says so; the other prompts of the call are not completed, and the engine goes on as before (K11)."""  # noqa: E501
    engine = subject.fresh()
    tokens = subject.prompts[0]
    for prompt, said in (
        ((), "empty"),
        ((tokens[0], subject.vocabulary), str(subject.vocabulary)),
        ((tokens[0], -1), "-1"),
        ((subject.first_token,) * (subject.max_model_len + 1), str(subject.max_model_len)),
    ):
        for others in ([], [tokens]):
            several = [*others, prompt]
            message = refused(lambda several=several: subject.generate(several), ConfigError)  # type: ignore[misc]
            expect(said in message, f"the prompt {prompt[:3]} of {len(prompt)} tokens was refused by {message!r}")
    image = [{"prompt_token_ids": tokens, "multi_modal_data": {"image": "a.png"}}]
    message = refused(lambda: engine.generate(image, GREEDY), ConfigError)
    expect("image" in message or "modal" in message, f"an image was refused by {message!r}")
    expect(engine.status is EngineStatus.AWAKE, f"afterwards the engine is {engine.status}")
    subject.holds(0, "after prompts that were refused")
