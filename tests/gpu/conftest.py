"""What tests on GPUs share. Where something that they need is missing, they skip, or fail if they were asked for."""

import importlib.util
import os

import pytest
import torch

from lightrft.sim import ProcessWorld


def missing(what):
    (pytest.fail if os.environ.get("LIGHTRFT_REQUIRE_GPU") == "1" else pytest.skip)(what)


@pytest.fixture(scope="session")
def needed():
    """Says that something is missing: the test is skipped, or fails if LIGHTRFT_REQUIRE_GPU=1."""
    return missing


@pytest.fixture(scope="session")
def gpus():
    """How many there are."""
    count = torch.cuda.device_count()
    if not count:
        missing("no GPU")
    return count


@pytest.fixture(scope="session")
def nccl_world():
    """Makes worlds of real ranks that use nccl."""
    return lambda size: ProcessWorld(size, backend="nccl")


@pytest.fixture(scope="session")
def deepspeed(gpus):
    """DeepSpeed is installed."""
    if importlib.util.find_spec("deepspeed") is None:
        missing("deepspeed is not installed: pip install 'lightrft[deepspeed]'")
