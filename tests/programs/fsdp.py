"""What ranks do with FSDPV2Strategy: tiny models, their training, checkpoints and files."""

from __future__ import annotations

import copy
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lightrft.sim.contracts.strategy import workload
from lightrft.strategy import get_strategy

LAYERS = 2


def strategy(accumulation=1, **settings):
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return get_strategy({"fsdp": True, "max_norm": 0.0, "train_batch_size": accumulation * size, **settings})


def qwen2(*, tied=True, seed=0):
    config = Qwen2Config(
        vocab_size=workload.VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)


class Actor(nn.Module):
    """A module around a transformers model, as trainers write them."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.value = nn.Linear(16, 1)

    def forward(self, ids):
        hidden = self.model.model(input_ids=ids).last_hidden_state
        return self.model.lm_head(hidden) + self.value(hidden)


def ids_of(ours, step):
    """This rank's share of a batch that is the same in every world of up to 4 ranks."""
    return workload.batch(step, 4).chunk(ours.world_size)[ours.get_rank()].to(ours.device)


def logits_of(model, ids):
    found = model(ids)
    return getattr(found, "logits", found)


def step(ours, model, optimizer, number, scheduler=None):
    ids = ids_of(ours, number)
    loss = workload.loss_of(logits_of(model, ids), ids)
    ours.backward(loss, model, optimizer)
    norm = ours.optimizer_step(optimizer, model, scheduler)
    return [ours.all_reduce(loss.item()), norm]


def ending(program, *args):
    """``program``, and the end of the group that its strategy makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        try:
            return program(*args)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def saves(folder, settings):
    """Trains for two steps, saves, and goes on: what a resumed run has to equal."""
    ours = strategy(**settings)
    model = workload.transformer(tied=True)
    optimizer = ours.create_optimizer(model, lr=1e-3)
    model, optimizer = ours.prepare((model, optimizer))
    for number in range(2):
        step(ours, model, optimizer, number)
    ours.save_ckpt(model, folder)
    saved = workload.weights(ours, model)
    after = [step(ours, model, optimizer, number) for number in (2, 3)]
    return {"saved": saved, "after": after, "weights": workload.weights(ours, model)}


def loads(folder, settings):
    """Takes up what any number of ranks saved."""
    ours = strategy(**settings)
    model = ours.prepare(workload.transformer(1, tied=True))
    optimizer = ours.create_optimizer(model, lr=1.0)
    ours.load_ckpt(model, folder)
    saved = workload.weights(ours, model)
    rate = optimizer.param_groups[0]["lr"]
    after = [step(ours, model, optimizer, number) for number in (2, 3)]
    return {"saved": saved, "after": after, "weights": workload.weights(ours, model), "rate": rate}


def built(meta_init, how, folder, settings):
    """A Qwen2 that is built in the context, and one step of it."""
    ours = strategy(**settings)
    torch.manual_seed(3)
    with ours.init_model_context(meta_init=meta_init):
        model = qwen2() if how == "config" else Qwen2ForCausalLM.from_pretrained(folder)
    bare = sum(one.is_meta for one in model.parameters())
    drawn = torch.rand(2).tolist()
    model, optimizer = ours.prepare((model, ours.create_optimizer(model, lr=1e-3)))
    return {
        "bare": bare,
        "drawn": drawn,
        "weights": {name: value.clone() for name, value in ours.full_parameters(model)},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "step": step(ours, model, optimizer, 0),
    }


def trains(kind, accumulation, settings, steps=3):
    """Losses, norms and weights of some steps with SGD."""
    ours = strategy(accumulation, **settings)
    model = Actor(qwen2()) if kind == "actor" else qwen2() if kind == "qwen2" else workload.transformer(tied=True)
    model, optimizer = ours.prepare((model, torch.optim.SGD(model.parameters(), lr=0.1)))
    norms = []
    for number in range(steps):
        for ids in ids_of(ours, number).chunk(accumulation):
            ours.backward(workload.loss_of(logits_of(model, ids), ids), model, optimizer)
            norm = ours.optimizer_step(optimizer, model)
        norms.append(norm)
    return {"norms": norms, "weights": workload.weights(ours, model)}


def plain(kind, steps=3):
    """The same in one process without any strategy."""
    model = Actor(qwen2()) if kind == "actor" else qwen2() if kind == "qwen2" else workload.transformer(tied=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for number in range(steps):
        ids = workload.batch(number, 4)
        workload.loss_of(logits_of(model, ids), ids).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, "weights": {name: copy.copy(one.detach()) for name, one in model.named_parameters()}}
