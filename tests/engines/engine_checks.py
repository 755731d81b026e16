"""What every engine has to do, as checks of one that runs: ``CHECKS`` lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightrft.errors import ConfigError, EngineStateError, StaleWeightsError, WeightSyncError
from lightrft.strategy.engine import EngineStatus
from lightrft.strategy.weight_sync import in_buckets, send

PROMPTS = [(10, 11, 12), (20,), tuple(range(30, 50)), (10, 11, 13)]


@dataclass
class Subject:
    """An engine, and two models of its architecture; it starts with the weights of the first one.

    Attributes:
        max_model_len: that it was set up for.
        vocabulary: token ids that it has.
        end: the token id at which its completions end.
    """

    engine: Any
    models: tuple[torch.nn.Module, torch.nn.Module]
    max_model_len: int
    vocabulary: int
    end: int

    def generate(self, prompts=PROMPTS, **params):
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.engine.generate(requests, {"temperature": 0, "max_tokens": 8, **params})

    def send(self, model, *, bucket_bytes=1 << 16, **named):
        weights = {**model.state_dict(), **named}
        kept = ((name, tensor) for name, tensor in weights.items() if tensor is not None)
        return send(self.engine, kept, bucket_bytes=bucket_bytes, poison=True)

    def start_over(self):
        """Awake, with the weights of the first model."""
        self.engine.wake_up()
        self.send(self.models[0])

    def holds(self, model):
        """The engine generates as ``model`` does."""
        found = self.generate(logprobs=0)
        for prompt, completion in zip(PROMPTS, found, strict=True):
            assert list(completion.output_token_ids) == greedy(model, prompt)
            expected = log_probs(model, prompt, completion.output_token_ids)
            torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-4, rtol=0)
        return True


@torch.no_grad()
def greedy(model, prompt, tokens=8):
    inputs = torch.tensor([prompt])
    return model.generate(inputs, max_new_tokens=tokens, do_sample=False)[0, len(prompt) :].tolist()


@torch.no_grad()
def log_probs(model, prompt, output, temperature=1.0):
    """Of each token of ``output``, after ``prompt``."""
    logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits.float(), -1)[range(len(output)), list(output)]


def check_greedy_tokens_are_those_of_transformers(subject):
    found = subject.generate()
    assert [list(one.output_token_ids) for one in found] == [greedy(subject.models[0], prompt) for prompt in PROMPTS]
    assert [one.prompt_token_ids for one in found] == PROMPTS
    assert all(one.log_probs is None for one in found)


def check_f16_log_probs_are_those_of_transformers(subject):
    for temperature in (1.0, 0.5):
        found = subject.generate(temperature=temperature, logprobs=0, ignore_eos=True)
        for prompt, one in zip(PROMPTS, found, strict=True):
            scale = temperature if one.log_probs_mode == "processed" else 1.0
            expected = log_probs(subject.models[0], prompt, one.output_token_ids, scale)
            torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-4, rtol=0)
            assert len(one.output_token_ids) == 8
    assert subject.generate(logprobs=0)[0].log_probs_mode == "raw"


def check_samples_of_a_prompt_follow_each_other(subject):
    found = subject.generate(n=3, temperature=1.0, logprobs=0)
    assert [one.prompt_token_ids for one in found] == [prompt for prompt in PROMPTS for _ in range(3)]
    for one in found:
        expected = log_probs(subject.models[0], one.prompt_token_ids, one.output_token_ids)
        torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-4, rtol=0)
    assert len({one.output_token_ids for one in found}) > len(PROMPTS)


def check_finish_reasons(subject):
    for prompt in PROMPTS:
        (plain,) = subject.generate([prompt])
        ended = plain.output_token_ids[-1] == subject.end
        assert plain.finish_reason == ("stop" if ended else "length")
        (longer,) = subject.generate([prompt], ignore_eos=True)
        assert (longer.finish_reason, len(longer.output_token_ids)) == ("length", 8)
        assert longer.output_token_ids[: len(plain.output_token_ids)] == plain.output_token_ids
        second = plain.output_token_ids[1]
        (stopped,) = subject.generate([prompt], stop_token_ids=[second])
        first = plain.output_token_ids.index(second)
        assert (stopped.finish_reason, stopped.output_token_ids) == ("stop", plain.output_token_ids[: first + 1])


def check_completions_are_as_long_as_was_asked_for(subject):
    prompt = tuple(range(10, 10 + subject.max_model_len - 16))
    (one,) = subject.generate([prompt], max_tokens=16, ignore_eos=True)
    assert len(one.output_token_ids) == 16


def check_nothing_is_generated_for_no_prompts(subject):
    assert subject.generate([]) == []


def check_f20_updates_in_turn(subject):
    first, second = subject.models
    version = subject.engine.weight_version
    for count, model in enumerate((second, first, second, first), 1):
        subject.send(model)
        assert subject.holds(model)
        assert subject.engine.weight_version == version + count
        assert subject.generate()[0].weight_version == version + count


def check_f07_any_size_of_bucket(subject):
    for size in (1, 5_000, 1 << 30):
        subject.send(subject.models[1], bucket_bytes=size)
        assert subject.holds(subject.models[1])
        subject.send(subject.models[0], bucket_bytes=size)
        assert subject.holds(subject.models[0])


def check_f05_caches_do_not_survive_an_update(subject):
    prompt = tuple(range(10, 50))
    for model in (subject.models[0], subject.models[1]):
        subject.send(model)
        for _ in range(2):  # the second time out of the cache
            (one,) = subject.generate([prompt], logprobs=0)
            assert list(one.output_token_ids) == greedy(model, prompt)


def check_f06_weights_that_do_not_fit_are_named(subject):
    name, weight = next(iter(subject.models[1].state_dict().items()))
    for wrong, said in (
        ({name: None}, f"missing: {name}"),
        ({"extra.weight": torch.zeros(3)}, "unexpected: extra.weight"),
        ({name: weight[:-1]}, f"of another shape: {name} "),
    ):
        version = subject.engine.weight_version
        with pytest.raises(WeightSyncError, match=said):
            subject.send(subject.models[1], **wrong)
        assert (subject.engine.status, subject.engine.weight_version) == (EngineStatus.STALE, version)
        with pytest.raises(StaleWeightsError, match="holds a part of new weights"):
            subject.generate()
        subject.send(subject.models[1])
        assert subject.holds(subject.models[1])


def check_f06_a_weight_that_comes_twice_is_named(subject):
    weights = list(subject.models[0].state_dict().items())
    with pytest.raises(WeightSyncError, match=f"twice: {weights[0][0]}"):
        subject.engine.update_weights(in_buckets([*weights, weights[0]], 1 << 20), subject.engine.weight_version + 1)
    subject.send(subject.models[0])


def check_f17_a_failing_source_of_weights_is_survived(subject):
    def failing():
        yield from list(in_buckets(list(subject.models[1].state_dict().items())[:3], 1 << 20))
        raise OSError("the disk is gone")

    with pytest.raises(WeightSyncError, match="OSError: the disk is gone"):
        subject.engine.update_weights(failing(), subject.engine.weight_version + 1)
    assert subject.engine.status is EngineStatus.STALE
    subject.send(subject.models[0])
    assert subject.holds(subject.models[0])


def check_sleep_at_level_1_keeps_the_weights(subject):
    subject.engine.sleep(1)
    assert subject.engine.status is EngineStatus.ASLEEP
    with pytest.raises(EngineStateError, match="is asleep, at level 1"):
        subject.generate()
    subject.engine.wake_up()
    assert subject.engine.status is EngineStatus.AWAKE
    assert subject.holds(subject.models[0])


def check_f01_sleep_at_level_2_wants_new_weights(subject):
    subject.engine.sleep(2)
    subject.engine.wake_up()
    assert subject.engine.status is EngineStatus.STALE
    with pytest.raises(StaleWeightsError, match="has dropped its weights"):
        subject.generate()
    subject.send(subject.models[1])
    assert subject.holds(subject.models[1])


def check_f02_no_update_in_sleep(subject):
    subject.engine.sleep(1)
    with pytest.raises(EngineStateError, match="wake its weights up first"):
        subject.send(subject.models[1])
    subject.engine.wake_up()
    assert subject.holds(subject.models[0])


def check_weights_wake_first_for_an_update(subject):
    for level in (1, 2):
        subject.engine.sleep(level)
        subject.engine.wake_up(["weights"])
        subject.send(subject.models[1])
        with pytest.raises(EngineStateError, match="kv_cache still"):
            subject.generate()
        subject.engine.wake_up(["kv_cache"])
        assert subject.holds(subject.models[1])


def check_k27_sleeping_and_waking_twice(subject):
    subject.engine.wake_up()
    for level in (1, 2):
        subject.engine.sleep(level)
        subject.engine.sleep(level)
        subject.engine.wake_up()
        subject.engine.wake_up()
        subject.send(subject.models[0])
        assert subject.holds(subject.models[0])


def check_bad_input_is_refused_and_survived(subject):
    long = tuple(range(10, 10 + subject.max_model_len))
    for prompts, params, said in (
        ([PROMPTS[0], ()], {}, "request 1: the prompt is empty"),
        ([(10, subject.vocabulary)], {}, f"token id {subject.vocabulary}"),
        ([(10, -1)], {}, "token id -1"),
        ([long], {}, "tokens and max_tokens=8"),
        (PROMPTS, {"n": 2}, "n=2 with temperature=0"),
        (PROMPTS, {"not_an_option": 1}, "not_an_option"),
    ):
        with pytest.raises(ConfigError, match=said):
            subject.generate(prompts, **params)
    with pytest.raises(ConfigError, match="image"):
        subject.engine.generate([{"prompt_token_ids": PROMPTS[0], "multi_modal_data": {"image": "a.png"}}], {})
    assert subject.engine.status is EngineStatus.AWAKE
    assert subject.holds(subject.models[0])


def check_caches_are_emptied_when_asked(subject):
    subject.generate()
    subject.engine.reset_caches()
    assert subject.holds(subject.models[0])


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]
