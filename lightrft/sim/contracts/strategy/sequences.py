"""ST801 and on: sequences that several ranks share. The model is a tiny Llama of transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightrft.errors import ConfigError
from lightrft.sim.contracts.strategy import workload
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.subject import Make, Subject, refused
from lightrft.sim.contracts.strategy.workload import BATCH, Recipe, Told
from lightrft.strategy.utils.sequence_parallel import SequenceParallelProcessor

LENGTH = 7
"""Odd, so that slices need padding."""


def llama(seed: int = 0, *, tied: bool = False) -> Any:
    """One layer, with fewer heads for keys and values than for queries.

    Args:
        seed: of the weights.
        tied: whether the output layer has the weights of the embedding.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = LlamaConfig(
        vocab_size=workload.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        use_cache=False,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def batch(step: int) -> Tensor:
    """Token ids of shape (BATCH, LENGTH)."""
    return workload.batch(step)[:, :LENGTH]


def loss_of(model: nn.Module, processor: SequenceParallelProcessor, ids: Tensor) -> Tensor:
    """Negative log-prob of the next token, mean over all but the last place."""
    part = processor.preprocess(ids)
    logits = model(**part.inputs).logits
    return -processor.gather_log_probs(logits, part).mean()


@functools.cache
def plain(recipe: Recipe) -> Told:
    """Training in one process, with the whole batch and whole sequences."""
    model = llama()
    optimizer = recipe.make(model.parameters())
    losses, norms = [], []
    for step in range(recipe.steps):
        loss = loss_of(model, SequenceParallelProcessor(), batch(step))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Told(losses=losses, norms=norms, weights=weights)


def _micro_batches(strategy: Any, step: int) -> Iterator[Tensor]:
    mine = batch(step).chunk(strategy.groups.dp_size)[strategy.groups.dp_rank]
    yield from mine.to(strategy.device).split(strategy.config.micro_train_batch_size)


def train(strategy: Any, recipe: Recipe) -> Told:
    """The same through ``strategy``, whose batch size is ``BATCH``."""
    model = llama()
    model, optimizer, _ = strategy.prepare((model, recipe.make(model.parameters()), None))
    losses, norms = [], []
    for step in range(recipe.steps):
        total, norm = 0.0, math.nan
        for ids in _micro_batches(strategy, step):
            loss = loss_of(model, strategy.sp_data_processor, ids)
            strategy.backward(loss, model, optimizer)
            norm = strategy.optimizer_step(optimizer, model, None)
            total += loss.item()
        losses.append(strategy.all_reduce(total / strategy.accumulated_gradient))
        norms.append(norm)
    return Told(losses=losses, norms=norms, weights=workload.weights(strategy, model))


def _shares(make: Make, settings: dict[str, Any]) -> Told:
    return train(make(max_norm=0.0, **settings), Recipe())


@contract.check(801, "sequence_parallel")
def check_shared_sequences_change_nothing(subject: Subject) -> None:
    """Two ranks that share each sequence end with the losses, norms and weights of whole sequences (F14, K20)."""
    subject.needs(2)
    micro = BATCH * 2 // subject.size
    settings = {"train_batch_size": BATCH, "micro_train_batch_size": micro, "sp_size": 2}
    for told in subject.run(_shares, settings):
        workload.close(told, plain(Recipe()), what="two ranks a sequence")


def _refuses(make: Make) -> str:
    strategy = make(sp_size=2)
    return refused(lambda: strategy.prepare_model(workload.transformer(), is_training=True), ConfigError)


@contract.check(802, "sequence_parallel")
def check_a_model_that_cannot_share_is_refused(subject: Subject) -> None:
    """A model whose attention the strategy cannot change is an error, not a wrong loss."""
    subject.needs(2)
    for message in subject.run(_refuses):
        if "sp_size" not in message:
            raise AssertionError(f"expected sp_size in {message!r}")
