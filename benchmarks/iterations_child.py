"""Measures an iteration of the trainer: ``python -m benchmarks.iterations_child`` prints JSON.

A rank is a thread, and one runs at a time: the processor time of its thread is what its own code has taken, waiting for
others not included. What it takes in the model of the engine counts as generation; in the actor, in ``backward`` and in
``optimizer_step`` as training; the rest of ``fit`` is what the trainer adds: gathering and scattering, rewards,
advantages, the buffer, new weights for the engine, the log with the import of what writes it.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers

from lightrft.datasets import PromptDataset
from lightrft.models import Actor, tiny
from lightrft.sim import SimWorld
from lightrft.sim.engine.transformer_model import TransformerModel
from lightrft.strategy import get_strategy
from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.trainer import SPMDPPOTrainer

RANKS, TP_SIZE = 8, 4
PROMPTS, SAMPLES, PROMPT_LENGTH, LENGTH = 64, 8, 64, 512
MODEL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": PROMPT_LENGTH + LENGTH, "eos_token_id": None,
}  # fmt: skip
"""Nothing ends a completion: each has ``LENGTH`` tokens."""

SETTINGS = {
    "strategy": "fake", "engine_tp_size": TP_SIZE, "rollout_batch_size": PROMPTS, "n_samples_per_prompt": SAMPLES,
    "train_batch_size": PROMPTS * SAMPLES, "micro_train_batch_size": 8, "micro_rollout_batch_size": 16,
    "prompt_max_len": PROMPT_LENGTH, "generate_max_len": LENGTH, "advantage_estimator": "grpo", "init_kl_coef": 0,
}  # fmt: skip


class Meter:
    """Processor seconds by what they were used for, of all ranks together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def counting(self, what: str) -> Iterator[None]:
        """What this thread uses inside counts for ``what``."""
        begin = _used()
        try:
            yield
        finally:
            self.seconds[what] += _used() - begin

    def on(self, owner: type, name: str, what: str) -> Any:
        """A patch with which each call of a method counts for ``what``."""
        original = getattr(owner, name)

        def counted(*given: Any, **named: Any) -> Any:
            with self.counting(what):
                return original(*given, **named)

        return mock.patch.object(owner, name, counted)


def iteration() -> dict[str, float]:
    """Processor seconds of all ranks for one iteration: ``generation``, ``training``, and the ``rest``."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder))
        with (
            meter.on(TransformerModel, "draw", "generation"),
            meter.on(Actor, "forward", "training"),
            meter.on(FakeStrategy, "backward", "training"),
            meter.on(FakeStrategy, "optimizer_step", "training"),
        ):
            SimWorld(RANKS).run(_on_rank, Path(folder), meter)
    generation, training, everything = (meter.seconds[what] for what in ("generation", "training", "fit"))
    rest = everything - generation - training
    return {"generation": generation, "training": training, "rest": rest, "share": rest / everything}


def _prepare(folder: Path) -> None:
    """Write a model and prompts."""
    tiny.tiny_text_model(folder / "model", **MODEL)
    chance = torch.Generator().manual_seed(0)
    letters = torch.randint(len(tiny.LETTERS) - 1, (PROMPTS, PROMPT_LENGTH), generator=chance).tolist()
    lines = [json.dumps({"prompt": "".join(tiny.LETTERS[place] for place in row), "label": "e"}) for row in letters]
    (folder / "prompts.jsonl").write_text("\n".join(lines))


def _on_rank(folder: Path, meter: Meter) -> None:
    strategy = get_strategy({**SETTINGS, "pretrain": str(folder / "model"), "log_dir": str(folder / "logs")})
    actor = Actor.from_pretrained(str(folder / "model"), settings=strategy.config)
    optimizer = strategy.create_optimizer(actor)
    actor, optimizer, _ = strategy.prepare((actor, optimizer, None))
    strategy.setup_inference_engine()
    trainer = SPMDPPOTrainer(
        strategy=strategy, actor=actor, actor_optim=optimizer, reward_model=_share_of_letter, tokenizer=tiny.tokenizer()
    )
    prompts = PromptDataset.from_file(
        str(folder / "prompts.jsonl"), tiny.tokenizer(), input_key="prompt", label_key="label", max_length=PROMPT_LENGTH
    )
    with meter.counting("fit"):
        metrics = trainer.fit(prompts)
    assert (metrics["samples"], metrics["response_length"]) == (PROMPTS * SAMPLES, LENGTH)
    dist.destroy_process_group()


def _share_of_letter(_: list[str], responses: list[str], labels: list[str]) -> list[float]:
    return [response.count(label) / len(response) for response, label in zip(responses, labels, strict=True)]


def _used() -> float:
    """Processor seconds of this thread."""
    return time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps(iteration()))
