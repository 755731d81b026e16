"""One step of training with sequence parallelism, and without, on tiny models of several architectures."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lightrft.strategy.utils.sequence_parallel import SequenceParallelProcessor, enable
from programs import tiny

BATCH = 2


def _settings(heads, key_value_heads, **more):
    return {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # so that attention matters
        "attn_implementation": "sdpa",
        "pad_token_id": 0,
        **more,
    }


CONFIGS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_settings(4, 4))),
    "qwen2_gqa": (Qwen2ForCausalLM, Qwen2Config(**_settings(8, 2))),
    "qwen2_uneven": (Qwen2ForCausalLM, Qwen2Config(**_settings(12, 6, head_dim=4))),
    "qwen2_eager": (Qwen2ForCausalLM, Qwen2Config(**_settings(4, 2, attn_implementation="eager"))),
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config(**_settings(4, 4, tie_word_embeddings=True))),
    "llama": (LlamaForCausalLM, LlamaConfig(**_settings(4, 2))),
    "mistral_sliding": (MistralForCausalLM, MistralConfig(**_settings(4, 2, sliding_window=3))),
    "gemma2_alternating": (
        Gemma2ForCausalLM,
        Gemma2Config(**_settings(4, 2, sliding_window=3, head_dim=8, attn_implementation="eager")),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=tiny.VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_implementation="sdpa",
        ),
    ),
}
"""Models and their configurations; simulated ranks share the objects."""


def model(architecture):
    kind, config = CONFIGS[architecture]
    torch.manual_seed(0)
    return kind(config)


def batch(kind, replica):
    """Arguments of ``preprocess``, and a weight for each log-prob: the same on all ranks of one replica."""
    generator = torch.Generator().manual_seed(100 + replica)
    length = {"plain": 12, "odd": 11, "short": 3, "packed": 12, "packed_odd": 13}.get(kind, 10)
    ids = torch.randint(1, tiny.VOCABULARY, (BATCH, length), generator=generator)
    weights = torch.randn(BATCH, length - 1, generator=generator)
    inputs = {"input_ids": ids}
    if kind.startswith("packed"):
        lengths = [[5, 1, length - 6], [3, length - 3]]
        inputs["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        weights = weights * (inputs["position_ids"][:, 1:] != 0)
    if kind.endswith("padded"):
        mask = torch.ones_like(ids)
        mask[0, -4:] = 0
        if kind == "left_padded":
            mask = mask.flip(1)
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        inputs["attention_mask"] = mask
        inputs["input_ids"] = ids * mask
        weights = weights * mask[:, 1:] * mask[:, :-1]
    return inputs, weights


def loss_of(policy, processor, kind, replica):
    """A policy-gradient loss, and the log-probs of the full sequences."""
    inputs, weights = batch(kind, replica)
    part = processor.preprocess(inputs)
    logits = policy(**part.inputs, use_cache=False).logits
    log_probs = processor.gather_log_probs(logits, part)
    return (log_probs * weights).mean(), torch.where(weights == 0, 0, log_probs).detach()


def plain(architecture, kind, replicas=1):
    """What sequence parallelism has to equal: one process that sees the batches of all replicas."""
    policy = model(architecture)
    losses, log_probs = [], []
    for replica in range(replicas):
        loss, found = loss_of(policy, SequenceParallelProcessor(), kind, replica)
        (loss / replicas).backward()
        losses.append(loss.item())
        log_probs.append(found)
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    return losses, log_probs, gradients


def _group(size):
    """The group of ``size`` consecutive ranks in which this rank is."""
    world = range(dist.get_world_size())
    groups = [dist.new_group(list(world[first : first + size])) for first in world[::size]]
    return groups[dist.get_rank() // size]


class _Averaged:
    """Plain data parallelism: gradients are averaged over all ranks."""

    def __init__(self, policy):
        self.policy = self.module = policy

    def step(self, loss):
        loss.backward()
        for parameter in self.policy.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        torch.optim.SGD(self.policy.parameters(), lr=1.0).step()

    def weights(self):
        return tiny.weights(self.policy)


class _Sharded(_Averaged):
    """FSDP2."""

    def __init__(self, policy):
        for layer in policy.model.layers:
            fully_shard(layer)
        super().__init__(fully_shard(policy))

    def step(self, loss):
        loss.backward()
        torch.optim.SGD(self.policy.parameters(), lr=1.0).step()


class _Zero(_Averaged):
    """DeepSpeed at a ZeRO stage."""

    def __init__(self, policy, stage):
        from programs import zero

        zero.as_on_a_gpu()
        self._zero = zero
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        super().__init__(zero.engine_of(policy, zero.config(stage), optimizer))

    def step(self, loss):
        self.policy.backward(loss)
        self.policy.step()

    def weights(self):
        found = self._zero.weights(self.policy)
        self.policy.destroy()
        return found


BACKENDS = {
    "averaged": _Averaged,
    "fsdp2": _Sharded,
    "zero2": lambda policy: _Zero(policy, 2),
    "zero3": lambda policy: _Zero(policy, 3),
}


def step(architecture, kind, sp, backend="averaged", checkpointing=False):
    """Loss, log-probs, and the gradient that the optimizer saw: what one step of SGD with rate 1 took away."""
    if backend.startswith("zero"):
        from programs import zero

        zero.start()
    else:
        dist.init_process_group("gloo")
    group = _group(sp)
    policy = model(architecture)
    if checkpointing:
        name = "activation_checkpointing_enable"  # of transformers 5.23; older ones know the other name only
        getattr(policy, name, policy.gradient_checkpointing_enable)()
    before = copy.deepcopy(tiny.weights(policy))
    trained = BACKENDS[backend](policy)
    enable(trained.policy, group)
    processor = SequenceParallelProcessor(group)
    loss, log_probs = loss_of(trained.policy, processor, kind, dist.get_rank() // sp)
    trained.step(loss)
    after = trained.weights()
    dist.barrier()
    dist.destroy_process_group()
    return loss.item(), log_probs, {name: before[name] - after[name] for name in before}


def largest_difference(one, other):
    """Of two dicts of tensors, or two tensors."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max(largest_difference(one[name], other[name]) for name in one)
    return (one - other).abs().max().item()


def check_equal(found, architecture, kind, sp):
    """What every rank found equals what one process finds, within 1e-5."""
    losses, log_probs, gradients = plain(architecture, kind, len(found) // sp)
    for rank, (loss, mine, gradient) in enumerate(found):
        assert abs(loss - losses[rank // sp]) <= 1e-5, rank
        assert largest_difference(mine, log_probs[rank // sp]) <= 1e-5, rank
        assert largest_difference(gradient, gradients) <= 1e-5, rank
