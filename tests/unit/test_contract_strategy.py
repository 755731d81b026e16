"""The contract of strategies, checked of every strategy on simulated ranks."""

import pytest

from lightrft.sim import SimWorld, contracts
from lightrft.sim.contracts.strategy import LACKS, SETTINGS, Subject


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SETTINGS)
@contracts.strategy.parametrize()
def test_strategies_keep_the_contract_on_simulated_ranks(check, name, size):
    check(Subject(world=SimWorld, settings=SETTINGS[name], name=name, size=size, lacks=LACKS[name]))
