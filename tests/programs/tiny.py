"""A tiny transformer, its data, and what a program tells about its training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

VOCABULARY, WIDTH, HEADS, LENGTH, BATCH = 32, 16, 2, 8, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inputs = nn.Linear(WIDTH, 3 * WIDTH)
        self.outputs = nn.Linear(WIDTH, WIDTH)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.inputs(self.norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.outputs(attended.transpose(1, 2).reshape(batch, length, -1))
        return x + self.narrow(functional.gelu(self.widen(x)))


class Transformer(nn.Module):
    """Token ids of shape (batch, length) to logits of shape (batch, length, vocabulary)."""

    def __init__(self, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def transformer(layers=2, seed=0):
    """The same weights on every rank."""
    torch.manual_seed(seed)
    return Transformer(layers)


def batch(step, rank=None):
    """Token ids of shape (batch, length): different ones for each rank and step, the same in every world."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)


def loss_of(logits, ids):
    """Cross-entropy of the next token, mean over all but the last."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr)


def whole(tensor):
    """The full value of a tensor that may be sharded."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.float().cpu().clone()


def weights(model):
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def told(losses, model=None, norms=(), **more):
    """What a program returns: losses and norms of this rank, full weights."""
    return {
        "losses": [float(loss) for loss in losses],
        "norms": [float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) for norm in norms],
        "weights": {} if model is None else model if isinstance(model, dict) else weights(model),
        **more,
    }


def start(backend="gloo"):
    dist.init_process_group(backend)


def end():
    dist.barrier()
    dist.destroy_process_group()
