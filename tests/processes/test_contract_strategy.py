"""The contract of strategies, checked of every strategy on two real gloo processes."""

import pytest

from lightrft.sim import ProcessWorld, contracts
from lightrft.sim.contracts.strategy import LACKS, SETTINGS, Subject


@pytest.mark.processes
@pytest.mark.parametrize("name", SETTINGS)
@contracts.strategy.parametrize()
def test_strategies_keep_the_contract_on_real_processes(check, name):
    check(Subject(world=ProcessWorld, settings=SETTINGS[name], name=name, size=2, lacks=LACKS[name]))
