"""A small transformer under DeepSpeed ZeRO, built partitioned when the stage is 3.

lightrft sim -n 8 examples/sim/deepspeed_zero.py --stage 3
torchrun --nproc-per-node 2 examples/sim/deepspeed_zero.py --stage 3
"""

import argparse
import contextlib

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

deepspeed.logger.setLevel("ERROR")
if not torch.cuda.is_available():  # real processes on a CPU would compile an operation for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Transformer(nn.Module):
    def __init__(self, vocabulary=128, width=32, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=3, choices=range(4))
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": args.stage},
    }
    torch.manual_seed(0)
    partitioned = deepspeed.zero.Init(config_dict_or_path=config) if args.stage == 3 else contextlib.nullcontext()
    with partitioned:
        model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(128, (4, 32), generator=generator)
    for step in range(args.steps):
        logits = engine(ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item():.2f}")
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
