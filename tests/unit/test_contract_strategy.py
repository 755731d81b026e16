"""The contract of strategies, checked of every strategy on simulated ranks."""

import pytest

from lightrft.sim import SimWorld, contracts
from lightrft.sim.contracts.strategy import Subject

SETTINGS = {
    "fake, as FSDP": {"strategy": "fake", "fsdp": True},
    "fake, as DeepSpeed": {"strategy": "fake"},
    "FSDP": {"fsdp": True},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
}
LACKS = {name: {} for name in SETTINGS}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SETTINGS)
@contracts.strategy.parametrize()
def test_strategies_keep_the_contract_on_simulated_ranks(check, name, size):
    check(Subject(world=SimWorld, settings=SETTINGS[name], name=name, size=size, lacks=LACKS[name]))
