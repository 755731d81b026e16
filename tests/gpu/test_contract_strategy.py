"""The contract of strategies, checked of every strategy on as many nccl ranks as there are GPUs, up to two."""

import pytest

from lightrft.sim import contracts
from lightrft.sim.contracts.strategy import LACKS, SETTINGS, Subject

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", SETTINGS)
@contracts.strategy.parametrize()
def test_strategies_keep_the_contract_on_gpus(check, name, gpus, nccl_world, request):
    if name.startswith("ZeRO"):
        request.getfixturevalue("deepspeed")
    check(Subject(world=nccl_world, settings=SETTINGS[name], name=name, size=min(gpus, 2), lacks=LACKS[name]))
