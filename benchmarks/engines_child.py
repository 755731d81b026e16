"""Measures the fake engine: ``python -m benchmarks.engines_child WHAT ...`` prints JSON.

Where two things are compared, they take turns, and processor time is taken, which other processes disturb least.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.groups import grown_mib
from lightrft.models import tiny
from lightrft.sim import SimWorld
from lightrft.sim.engine.samples import Sample
from lightrft.sim.engine.sglang_face.engine import Engine
from lightrft.sim.engine.transformer_model import TransformerModel, checkpoint_tensors
from lightrft.sim.engine.vllm_face.llm import LLM
from lightrft.strategy import get_strategy
from lightrft.strategy.sampling import SamplingParams

TURNS = 7


def rollout(engine: str) -> dict[str, float]:
    """Seconds to gather, generate (by hash) and scatter 1,024 prompts of 256 tokens over 8 ranks, 4 to an engine.

    Completions have 256 tokens and log-probs. It is processor time of all ranks together, which run one at a time;
    on an idle machine it passes as much. Setting up is not in it.
    """
    ranks, each = 8, 128

    def on_rank() -> list[float]:
        lengths = {"prompt_max_len": 256, "generate_max_len": 256, "pretrain": "no/model", "engine_type": engine}
        strategy = get_strategy({"strategy": "fake", "train_batch_size": ranks, "engine_tp_size": 4, **lengths})
        strategy.setup_inference_engine().update_weights([[("weight", torch.ones(3))]], 1)
        prompts = [[strategy.get_rank() * each + number, *range(1, 256)] for number in range(each)]
        seconds = []
        for _ in range(TURNS):
            dist.barrier()
            begin = _used()
            found = strategy.gather_and_generate(
                {"max_tokens": 256, "logprobs": 0}, all_prompt_token_ids=prompts, sleep_engine=False
            )
            assert len(found) == each
            dist.barrier()
            seconds.append(_used() - begin)
        dist.destroy_process_group()
        return seconds

    rounds = SimWorld(ranks, engines="hash").run(on_rank)
    return {"seconds": statistics.median(max(several) for several in zip(*rounds, strict=True))}


def generation(spread: str) -> dict[str, float]:
    """Tokens a second of the fake engine and of ``generate`` of transformers, and the median of their ratios.

    64 greedy completions by the same tiny model: prompts of 4 to 64 tokens, uniformly spread; completions of 4 to 128,
    as ``spread`` says. Transformers gets all prompts in one batch, padded on the left, and goes on to the longest
    completion; only the tokens that were asked for count. The fake engine has forgotten all prompts.
    """
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 65, (64,), generator=draws).tolist()
    shares = torch.rand(64, generator=draws)
    spreads = {"uniform": 4 + shares * 124, "log-uniform": 4 * (shares * math.log(32)).exp()}
    wanted = spreads[spread].round().int().tolist()
    prompts = [torch.randint(6, 100, (length,), generator=draws).tolist() for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.tiny_text_model(folder)
        fake = TransformerModel(folder, torch.float32)
        fake.load(checkpoint_tensors(folder))
    samples = [
        Sample(tokens=tuple(prompt), params=SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        for prompt, count in zip(prompts, wanted, strict=True)
    ]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])

    @torch.inference_mode()
    def theirs() -> torch.Tensor:
        found: torch.Tensor = model.generate(
            ids, attention_mask=mask, max_new_tokens=max(wanted), do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return found

    def ours() -> list[Any]:
        fake.forget()
        return fake.draw(samples)

    for one, row, count in zip(ours(), theirs()[:, width:].tolist(), wanted, strict=True):
        assert list(one.tokens) == row[:count]
    pairs = _in_turns(ours, theirs)
    return {
        "ours": sum(wanted) / statistics.median(mine for mine, _ in pairs),
        "theirs": sum(wanted) / statistics.median(other for _, other in pairs),
        "ratio": statistics.median(mine / other for mine, other in pairs),
    }


def update(engine: str) -> dict[str, float]:
    """``update_engine_weights`` of a model of 100M parameters in this process, without a world.

    ``ratio``: its time beside that of one copy of each weight into memory that is there; ``buckets``: the memory that
    it takes meanwhile, in buckets; ``calls``: to the engine, for each parameter.
    """
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        actor = tiny.tiny_text_model(folder, **_LARGER)
        lengths = {"prompt_max_len": 64, "generate_max_len": 64}
        settings = {"pretrain": folder, "engine_type": engine, "train_batch_size": 1, **lengths}
        strategy = get_strategy({"strategy": "fake", "engine_update_bucket_mb": _BUCKET_MIB, **settings})
        strategy.setup_inference_engine()
    weights = [weight.detach() for weight in actor.parameters()]
    copies = [torch.ones_like(weight) for weight in weights]

    def copy() -> None:
        for weight, place in zip(weights, copies, strict=True):
            place.copy_(weight)

    def send() -> None:
        strategy.update_engine_weights(actor)

    return {
        "calls": _calls(send) / len(weights),
        "buckets": grown_mib(send) / _BUCKET_MIB,
        "ratio": statistics.median(mine / other for mine, other in _in_turns(send, copy)),
    }


_BUCKET_MIB = 64
_LARGER = {
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "vocab_size": 32_000,
}
_CALLS = (
    (LLM, "collective_rpc"),
    (LLM, "apply_model"),
    (Engine, "begin_weight_update"),
    (Engine, "update_weights_from_tensor"),
    (Engine, "end_weight_update"),
)
"""By which weights come to an engine."""


def _calls(action: Callable[[], object]) -> int:
    """How many of ``_CALLS`` there are during ``action``."""
    with ExitStack() as stack:
        spies = [
            stack.enter_context(mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name)))
            for owner, name in _CALLS
        ]
        action()
    return sum(spy.call_count for spy in spies)


def _in_turns(ours: Callable[[], object], theirs: Callable[[], object]) -> list[tuple[float, float]]:
    """Processor seconds of both, for some turns after one that is not counted."""
    return [(_processor_seconds(ours), _processor_seconds(theirs)) for _ in range(TURNS + 1)][1:]


def _processor_seconds(action: Callable[[], object]) -> float:
    begin = _used()
    action()
    return _used() - begin


def _used() -> float:
    """Processor seconds of this process."""
    return time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)


def _memory() -> str | None:
    """A folder in memory, if there is one: what is written there is read at once."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    what, argument = sys.argv[1:]
    print(json.dumps({"rollout": rollout, "generation": generation, "update": update}[what](argument)))
