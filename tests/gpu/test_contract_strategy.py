"""The contract of strategies, checked of every strategy on as many nccl ranks as there are GPUs, up to two."""

import os

import pytest
import torch

from lightrft.sim import ProcessWorld, contracts
from lightrft.sim.contracts.strategy import LACKS, SETTINGS, Subject

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def size():
    count = torch.cuda.device_count()
    if not count:
        (pytest.fail if os.environ.get("LIGHTRFT_REQUIRE_GPU") == "1" else pytest.skip)("no GPU")
    return min(count, 2)


def nccl(size):
    return ProcessWorld(size, backend="nccl")


@pytest.mark.parametrize("name", SETTINGS)
@contracts.strategy.parametrize()
def test_strategies_keep_the_contract_on_gpus(check, name, size):
    if name.startswith("ZeRO"):
        pytest.importorskip("deepspeed")
    check(Subject(world=nccl, settings=SETTINGS[name], name=name, size=size, lacks=LACKS[name]))
