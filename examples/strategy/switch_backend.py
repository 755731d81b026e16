"""One training script for every backend: a flag chooses it, and the losses stay the same.

    lightrft sim -n 4 examples/strategy/switch_backend.py --fsdp
    lightrft sim -n 4 examples/strategy/switch_backend.py --zero_stage 3
    lightrft sim -n 4 examples/strategy/switch_backend.py --strategy fake
    torchrun --nproc-per-node 2 examples/strategy/switch_backend.py --zero_stage 2

With ``--ckpt_path FOLDER`` it saves after every step, and goes on from there when it is started again: after it was
killed, and on another number of ranks too.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from lightrft.strategy import get_strategy
from lightrft.utils import add_arguments

VOCABULARY, WIDTH, LENGTH = 32, 32, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x):
        query, key, value = self.attention(x).unsqueeze(1).chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(1)
        x = x + self.projection(attended)
        return x + self.feed_forward(x)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        return self.head(self.blocks(self.embedding(ids)))


class Counting(torch.utils.data.Dataset):
    """Example ``i`` counts upwards from ``i``, by 1, 2 or 3."""

    def __len__(self):
        return 4096

    def __getitem__(self, i):
        return (i + torch.arange(LENGTH) * (1 + i % 3)) % VOCABULARY


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of the whole run")
    parser.add_argument("--ckpt_path", default=None, help="save here after every step, and go on from here")
    parser.set_defaults(train_batch_size=16, micro_train_batch_size=2, actor_learning_rate=0.01)
    return parser.parse_args()


def main():
    args = parse()
    strategy = get_strategy(args)
    model = LanguageModel()
    optimizer = strategy.create_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    model, optimizer, scheduler = strategy.prepare((model, optimizer, scheduler))

    consumed = 0
    if args.ckpt_path and Path(args.ckpt_path, "latest").exists():
        _, client_state = strategy.load_ckpt(model, args.ckpt_path)
        consumed = client_state["consumed_samples"]
        strategy.print(f"resumed after {consumed // args.train_batch_size} steps")

    loader = strategy.setup_dataloader(Counting(), args.micro_train_batch_size, consumed_samples=consumed)
    losses = []
    for ids in loader:
        loss = functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        strategy.backward(loss, model, optimizer)
        norm = strategy.optimizer_step(optimizer, model, scheduler, name="model")
        losses.append(loss.detach())
        if norm is None:
            continue
        consumed += args.train_batch_size
        step = consumed // args.train_batch_size
        mean = strategy.all_reduce(torch.stack(losses).mean(), op="mean")
        losses.clear()
        if args.ckpt_path:
            strategy.save_ckpt(model, args.ckpt_path, client_state={"consumed_samples": consumed})
        strategy.print(f"step {step}  loss {mean.item():.4f}  gradient norm {norm:.3f}")
        if step == args.steps:
            break
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
