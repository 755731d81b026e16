"""Functions run on simulated ranks that have devices."""

import os

import pytest
import torch

from lightrft.sim import SimWorld
from lightrft.sim.current import current_task

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a build without CUDA answers")


def in_rank(fn, **options):
    """What ``fn`` returns on the only rank of a world with two devices."""
    return SimWorld(1, gpus_per_node=2, **options).run(fn)[0]


def on_two_ranks(fn, **options):
    return SimWorld(2, gpus_per_node=2, **options).run(fn)


def local_rank():
    return int(os.environ["LOCAL_RANK"])


def accelerator_of_rank():
    return current_task().rank.accelerator


def start_group():
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl", device_id=device)
