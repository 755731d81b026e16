"""ST501 and on: what a strategy does with inference engines, whatever they are."""

from __future__ import annotations

from typing import Any

import torch

from lightrft.errors import ConfigError, EngineStateError, StaleWeightsError, WeightSyncError
from lightrft.sim.contracts.strategy import workload
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.recorder import Recorder
from lightrft.sim.contracts.strategy.subject import Make, Subject, refused
from lightrft.sim.contracts.strategy.training import accumulating
from lightrft.sim.contracts.strategy.workload import Recipe, Transformer
from lightrft.strategy.engine import is_engine
from lightrft.strategy.requests import Request
from lightrft.strategy.utils.fingerprints import fingerprint

__all__ = ["Recorder"]


def _before(make: Make) -> list[str]:
    strategy = make()
    strategy.wakeup_inference_engine()
    strategy.maybe_sleep_inference_engine()
    strategy.engines_sleep([None])
    return [
        str(strategy.inference_engine_status),
        refused(lambda: strategy.setup_inference_engine(engine_type="llama"), ConfigError),
        refused(lambda: strategy.gather_and_generate(None, all_prompt_token_ids=[[1]]), EngineStateError),
        refused(lambda: strategy.update_engine_weights(None), EngineStateError),  # type: ignore[arg-type]
        refused(lambda: strategy.engines_sleep([object()]), ConfigError),
    ]


@contract.check(501)
def check_there_is_no_engine_at_first(subject: Subject) -> None:
    """Sleep and wake are safe without an engine; whatever needs one says how to get it; an unknown type is refused (K08, K27)."""  # noqa: E501
    for status, unknown, *needing, strange in subject.run(_before):
        told = status == "absent" and "vllm" in unknown and "sglang" in unknown and "object" in strange
        if not told or not all("setup_inference_engine" in message for message in needing):
            raise AssertionError(f"{status!r}, {unknown!r}, {needing!r}, {strange!r}")


def _sleeps(make: Make) -> list[Any]:
    strategy, stubborn = make(), make(enable_engine_sleep=False)
    engine, other = Recorder(), Recorder()
    strategy.inference_engine, strategy.inference_engine_type = engine, "vllm"
    stubborn.inference_engine = other
    strategy.maybe_sleep_inference_engine()
    strategy.maybe_sleep_inference_engine()
    asleep = str(strategy.inference_engine_status)
    strategy.wakeup_inference_engine()
    strategy.wakeup_inference_engine()
    stubborn.maybe_sleep_inference_engine()
    strategy.engines_sleep([engine, None, other])
    strategy.engines_wake_up([engine, other])
    outputs = strategy.engine_generate_local({"n": 1}, prompt_token_ids=[[1], [2]])
    twice = refused(strategy.setup_inference_engine, EngineStateError)
    assert is_engine(engine)
    assert not is_engine(strategy)
    return [engine.asked, other.asked, asleep, len(outputs), "already" in twice]


@contract.check(502)
def check_engines_sleep_once(subject: Subject) -> None:
    """Sleep and wake reach an engine only if they change its state, and not at all where sleep is disabled (K27)."""
    both = ["sleep 1", "wake"]
    for found in subject.run(_sleeps):
        if found != [[*both, *both, "generate"], both, "asleep", 2, True]:
            raise AssertionError(f"found {found}")


def _sends(make: Make, settings: dict[str, Any], tied: bool) -> list[Any]:
    strategy = make(max_norm=0.0, **settings)
    strategy.inference_engine = engine = Recorder()
    actors, optimizers = [], []
    for seed in (0, 1):
        model = _actor(seed, tied)
        optimizer = Recipe().make([one for one in model.parameters() if one.requires_grad])
        actor, optimizer, _ = strategy.prepare((model, optimizer, None))
        actors.append(actor)
        optimizers.append(optimizer)
    strategy.maybe_sleep_inference_engine()
    for actor in (actors[0], actors[1], actors[0]):
        strategy.update_engine_weights(actor)
    micro_batches = list(workload.micro_batches(strategy, 0))
    for ids in (micro_batches[0], None, *micro_batches):
        if ids is None:  # in the middle of an accumulation, which ends here
            strategy.update_engine_weights(actors[0])
            continue
        strategy.backward(workload.loss_of(actors[0](ids), ids), actors[0], optimizers[0])
        strategy.optimizer_step(optimizers[0], actors[0], None)
    strategy.maybe_sleep_inference_engine()
    strategy.update_engine_weights(actors[0])
    return [engine.asked, engine.received, engine.weights]


def _actor(seed: int, tied: bool) -> Transformer:
    """The second one is partly frozen."""
    model = workload.transformer(seed, tied=tied)
    model.blocks[0].requires_grad_(seed == 0)
    return model


@contract.check(503)
def check_the_engine_gets_all_weights_of_the_actor(subject: Subject) -> None:
    """`update_engine_weights` wakes the weights of the engine and nothing else, sends the present weights of the actor that it is given, trained and frozen, each whole and once under its own name, and resets the caches (F02, F03, F05, F06, K07, K18)."""  # noqa: E501
    sent = [word for version in (1, 2, 3, 4, 5) for word in (f"update {version}", "reset")]
    calls = ["sleep 1", "wake weights", *sent[:8], "wake", "sleep 1", "wake weights", *sent[8:]]
    for tied in (False, True):
        first, second = (_told(_actor(seed, tied)) for seed in (0, 1))
        trained = workload.plain(Recipe(steps=1, tied=tied)).weights
        for asked, received, weights in subject.run(_sends, accumulating(subject.size, 2), tied):
            if asked != calls:
                raise AssertionError(f"the engine was asked {asked}, expected {calls}")
            for number, (found, expected) in enumerate(zip(received, (first, second, first, first), strict=False)):
                _are_those_of_the_actor(sorted(found), sorted(expected), f"update {number + 1}, tied={tied}")
            if len(received[-1]) != len(weights):
                raise AssertionError(f"sent twice: {[name for name, *_ in received[-1]]}")
            stale = sorted(name for name, *rest in received[-1] if (name, *rest) in first)
            if stale:
                raise AssertionError(f"after a step the engine still has the former {', '.join(stale)}")
            workload.same(weights, trained, what=f"sent after a step, tied={tied}")


def _told(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, tuple(one.shape), fingerprint(one)) for name, one in model.named_parameters()]


def _are_those_of_the_actor(found: list[Any], expected: list[Any], what: str) -> None:
    if found != expected:
        odd = sorted({name for name, *_ in set(found) ^ set(expected)}) or [name for name, *_ in found]
        raise AssertionError(f"{what}: missing, unexpected, sent twice or other than the actor's: {', '.join(odd)}")


def _large(make: Make) -> tuple[list[int], dict[str, torch.Tensor]]:
    strategy = make(engine_update_bucket_mb=1)
    strategy.inference_engine = engine = Recorder()
    strategy.update_engine_weights(strategy.prepare_model(_wide(), is_training=True))
    return engine.buckets, engine.weights


def _wide() -> torch.nn.Module:
    """Three weights of 0.61 MiB each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(*(torch.nn.Linear(400, 400, bias=False) for _ in range(3)))


@contract.check(504)
def check_weights_travel_in_buckets(subject: Subject) -> None:
    """No bucket of weights is larger than `engine_update_bucket_mb`, and what arrives is the same (K09)."""
    expected = {name: weight.detach() for name, weight in _wide().named_parameters()}
    for buckets, weights in subject.run(_large):
        if buckets != [400 * 400 * 4] * 3:
            raise AssertionError(f"buckets of {buckets} bytes: expected one weight of 640000 bytes in each")
        workload.same(weights, expected, what="sent in buckets", within=0.0)


def _generates(make: Make) -> list[Any]:
    strategy = make(engine_tp_size=_shared_by(make.world_size))
    strategy.inference_engine = engine = Recorder()
    strategy.maybe_sleep_inference_engine()
    prompts = _prompts(strategy.get_rank())
    ids = strategy.gather_and_generate({"n": 2}, all_prompt_token_ids=prompts)
    asleep = str(strategy.inference_engine_status)
    texts = strategy.gather_and_generate(
        {}, all_prompts=[f"{prompt}" for prompt in prompts], all_images=["image"] * len(prompts), sleep_engine=False
    )
    outputs = [[(request.prompt_token_ids or request.prompt, request.images) for request, _ in ids + texts]]
    return [*outputs, asleep, str(strategy.inference_engine_status), engine.asked, engine.requests]


def _shared_by(size: int) -> int:
    """Ranks of one engine."""
    return min(size, 2)


def _prompts(rank: int) -> list[list[int]]:
    """One prompt, two, none, and again."""
    return [[rank, number, 7] for number in range((rank + 1) % 3)]


@contract.check(505)
def check_every_rank_gets_its_own_completions(subject: Subject) -> None:
    """The engine gets the prompts of its ranks together, and each rank the completions of its own, any number and none, in their order; the engine is woken for it and sleeps afterwards if it shall (F12, K05, K06)."""  # noqa: E501
    tp = _shared_by(subject.size)
    for rank, (outputs, asleep, awake, asked, requests) in enumerate(subject.run(_generates)):
        mine: list[Any] = [(tuple(prompt), ()) for prompt in _prompts(rank) for _ in range(2)]
        mine += [(f"{prompt}", ("image",)) for prompt in _prompts(rank)]
        if outputs != mine:
            raise AssertionError(f"rank {rank} got {outputs}, expected {mine}")
        ours = [prompt for one in range(rank - rank % tp, rank - rank % tp + tp) for prompt in _prompts(one)]
        calls = ["sleep 1", "wake", "generate", "sleep 1", "wake", "generate"]
        if (asleep, awake, asked) != ("asleep", "awake", calls):
            raise AssertionError(f"the engine was asked {asked}, and was {asleep} and {awake}")
        expected = [[Request(prompt_token_ids=tuple(prompt)) for prompt in ours]]
        expected += [[Request(prompt=f"{prompt}", images=("image",)) for prompt in ours]]
        if requests != expected:
            raise AssertionError(f"the engine of rank {rank} got {requests}, expected {expected}")


def _fails(make: Make) -> list[Any]:
    strategy = make(engine_tp_size=_shared_by(make.world_size))
    strategy.inference_engine = engine = Recorder()
    actor = strategy.prepare_model(workload.transformer(), is_training=True)
    last = strategy.get_rank() == strategy.world_size - 1
    engine.failure = ValueError("no memory left") if last else None
    concerned = strategy.get_rank() >= strategy.world_size - _shared_by(make.world_size)

    def generate() -> list[Any]:
        return strategy.gather_and_generate({}, all_prompt_token_ids=[[1]])

    messages = [refused(generate, EngineStateError)] if concerned else [f"no memory left {len(generate())}"]
    messages.append(refused(lambda: strategy.update_engine_weights(actor), WeightSyncError))
    engine.failure = None
    strategy.update_engine_weights(actor)
    return [messages, len(generate()), len(engine.weights)]


@contract.check(506)
def check_an_engine_that_fails_on_one_rank(subject: Subject) -> None:
    """An error of the engine on one rank is one on every rank of its group, in `update_engine_weights` on every rank, and afterwards all go on (F17, K10)."""  # noqa: E501
    weights = len(list(workload.transformer().parameters()))
    for rank, (messages, completions, received) in enumerate(subject.run(_fails)):
        for message in messages:
            if "no memory left" not in message:
                raise AssertionError(f"rank {rank}: expected 'no memory left' in {message!r}")
        if (completions, received) != (1, weights):
            raise AssertionError(f"afterwards rank {rank} got {completions} completions and {received} weights")


def _sleeps_deeply(make: Make) -> list[Any]:
    strategy = make(max_norm=0.0, engine_sleep_level=2, **accumulating(make.world_size, 2))
    model = workload.transformer()
    actor, optimizer, _ = strategy.prepare((model, Recipe().make(model.parameters()), None))
    strategy.inference_engine = engine = Recorder()

    def generate() -> list[Any]:
        return strategy.gather_and_generate({}, all_prompt_token_ids=[[1]])

    found = [len(generate()), refused(generate, StaleWeightsError)]
    strategy.update_engine_weights(actor)
    before = strategy.engine_updates
    found += [len(generate()), len(generate()), strategy.engine_updates - before]
    for ids in workload.micro_batches(strategy, 0):
        found.append(len(generate()))  # in the middle of an accumulation, which goes on
        strategy.backward(workload.loss_of(actor(ids), ids), actor, optimizer)
        strategy.optimizer_step(optimizer, actor, None)
    found.append(len(strategy.engine_generate_local({}, prompt_token_ids=[[1]])))
    strategy.engines_sleep([engine])
    return [found, engine.asked, engine.weights]


@contract.check(507)
def check_a_deep_sleep_drops_weights_that_are_sent_again(subject: Subject) -> None:
    """With `engine_sleep_level=2` the engine drops its weights when it sleeps, and gets the present ones of the actor that it was given last before it generates; that is no `engine_updates`, and ends no accumulation. Without such an actor it is a StaleWeightsError (F01, K24)."""  # noqa: E501
    trained = workload.plain(Recipe(steps=1)).weights
    slept = ["wake", "generate", "sleep 2"]
    again = [["wake weights", f"update {version}", "reset", *slept] for version in (1, 2, 3, 4, 5)]
    calls = [*slept[1:], *slept, *(call for each in again for call in each)]
    calls[-1] = "sleep 1"  # of engines_sleep, which keeps the weights
    for (one, told, *rest), asked, weights in subject.run(_sleeps_deeply):
        if (one, *rest) != (1, 1, 1, 0, 1, 1, 1) or "update_engine_weights" not in told:
            raise AssertionError(f"completions, updates: {one, *rest}, expected 1, 1, 1, 0, 1, 1, 1; {told!r}")
        if asked != calls:
            raise AssertionError(f"the engine was asked {asked}, expected {calls}")
        workload.same(weights, trained, what="sent again after a step")
