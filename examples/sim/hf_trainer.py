"""The Trainer of transformers, with DeepSpeed ZeRO-2 below.

lightrft sim -n 8 examples/sim/hf_trainer.py
torchrun --nproc-per-node 2 examples/sim/hf_trainer.py
"""

import tempfile

import deepspeed
import torch
import transformers
from torch.utils.data import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

deepspeed.logger.setLevel("ERROR")
transformers.logging.set_verbosity_error()
if not torch.cuda.is_available():  # real processes on a CPU would compile an operation for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Tokens(Dataset):
    def __len__(self):
        return 256

    def __getitem__(self, index):
        ids = torch.randint(128, (32,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def main():
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=2,
            max_steps=5,
            learning_rate=0.1,
            optim="sgd",
            logging_steps=1,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            disable_tqdm=True,
            deepspeed={
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": 2},
            },
        )
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=128, num_key_value_heads=4, **shape))
        trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
        trainer.train()
        if trainer.is_world_process_zero():
            for entry in trainer.state.log_history:
                if "loss" in entry:
                    print(f"step {entry['step']}: loss {entry['loss']:.4f}")
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
