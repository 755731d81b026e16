"""Trainers in simulated worlds."""

import torch.distributed as dist
from trainer_parts import EvenTokens, parts, prompts, weights_of

from lightrft.datasets import Prompt
from lightrft.sim import SimWorld
from lightrft.trainer import SPMDPPOTrainer


def in_world(program, size=2, **more):
    def on_rank():
        try:
            return program()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return SimWorld(size, stall_limit=15, **more).run(on_rank)


def trained(size=2, count=32, reward=None, given=None, strategy=None, **settings):
    """Metrics and weights after a run."""

    def program():
        trainer = SPMDPPOTrainer(reward_model=reward or EvenTokens(), **parts(**(strategy or {})), **settings)
        return trainer.fit(given or prompts(count)), weights_of(trainer)

    return in_world(program, size)


def plain(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "tokens_per"))}


def too_long(index):
    return Prompt(prompt="long", token_ids=(3,) * 9, index=index)
