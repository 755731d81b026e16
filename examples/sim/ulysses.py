"""Sequence parallelism with DeepSpeed Ulysses: every sequence is split over two ranks.

lightrft sim -n 8 examples/sim/ulysses.py
torchrun --nproc-per-node 2 examples/sim/ulysses.py
"""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM

deepspeed.logger.setLevel("ERROR")
if not torch.cuda.is_available():  # real processes on a CPU would compile an operation for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

SEQUENCE_PARALLEL = 2


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.randint(128, (32,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(32)}


def main():
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=128, num_key_value_heads=4, attn_implementation="sdpa", **shape))
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=SEQUENCE_PARALLEL,
        micro_batch_size=1,
        seq_length_is_variable=True,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "sequence_parallel_size": SEQUENCE_PARALLEL,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    group = mpu.get_sequence_parallel_group()
    mine = torch.utils.data.Subset(Tokens(), range(dist.get_rank(), 64, dist.get_world_size()))
    loader = UlyssesSPDataLoaderAdapter(
        DataLoader(mine, batch_size=1),
        sp_rank=mpu.get_sequence_parallel_rank(),
        sp_group=group,
        sp_world_size=SEQUENCE_PARALLEL,
        device=engine.device,
    )
    for step, batch in zip(range(4), loader):
        labels = batch["shift_labels"].flatten()
        logits = engine(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        tokens = (labels != -100).sum().float()
        dist.all_reduce(tokens, group=group)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") * SEQUENCE_PARALLEL / tokens
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item():.4f}")
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
