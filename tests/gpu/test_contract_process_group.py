"""The contract of process groups, checked of nccl on as many ranks as there are GPUs."""

import os

import pytest
import torch

from lightrft.sim import ProcessWorld, contracts
from lightrft.sim.contracts.process_group import LACKS, Subject

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def nccl():
    count = torch.cuda.device_count()
    if not count:
        (pytest.fail if os.environ.get("LIGHTRFT_REQUIRE_GPU") == "1" else pytest.skip)("no GPU")

    def world(size):
        return ProcessWorld(size, backend="nccl")

    return Subject(
        world=world,
        backend="nccl",
        name="nccl",
        lacks=LACKS["nccl"],
        device="cuda",
        most_ranks=count,
    )


@contracts.process_group.parametrize()
def test_nccl_keeps_the_contract(check, nccl):
    check(nccl)
