"""The contract of process groups, checked of nccl on as many ranks as there are GPUs."""

import pytest
import torch

from lightrft.sim import ProcessWorld, contracts
from lightrft.sim.contracts.process_group import LACKS, Subject

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def nccl():
    def world(size):
        return ProcessWorld(size, backend="nccl")

    return Subject(
        world=world,
        backend="nccl",
        name="nccl",
        lacks=LACKS["nccl"],
        device="cuda",
        most_ranks=torch.cuda.device_count(),
    )


@contracts.process_group.parametrize()
def test_nccl_keeps_the_contract(check, nccl):
    check(nccl)
