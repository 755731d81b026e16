"""The contract of process groups, checked of nccl on as many ranks as there are GPUs."""

import pytest

from lightrft.sim import contracts
from lightrft.sim.contracts.process_group import LACKS, Subject

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def nccl(gpus, nccl_world):
    return Subject(world=nccl_world, backend="nccl", name="nccl", lacks=LACKS["nccl"], device="cuda", most_ranks=gpus)


@contracts.process_group.parametrize()
def test_nccl_keeps_the_contract(check, nccl):
    check(nccl)
