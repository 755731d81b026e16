"""A run of the trainer as a script: ``train_and_stop.py FOLDER [--resume] [flags]``; it tells of each iteration."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from trainer_parts import EvenTokens, parts, prompts

from lightrft.trainer import SPMDPPOTrainer, TrainerConfig
from lightrft.utils import add_arguments, add_trainer_arguments


def main():
    parser = add_trainer_arguments(add_arguments(argparse.ArgumentParser()))
    parser.set_defaults(train_batch_size=8, rollout_batch_size=8, generate_max_len=6, prompt_max_len=8)
    args = parser.parse_args()
    made = parts(dropout=0.1, **vars(args))
    trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made)
    assert trainer.config.gamma == TrainerConfig.from_args(args).gamma
    trainer.fit(prompts(48))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
