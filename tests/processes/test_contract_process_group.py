"""The contract of process groups, checked of real gloo processes."""

import pytest

from lightrft.sim import ProcessWorld, contracts
from lightrft.sim.contracts.process_group import LACKS, Subject

GLOO = Subject(world=ProcessWorld, backend="gloo", name="gloo", lacks=LACKS["gloo"])


@pytest.mark.processes
@contracts.process_group.parametrize()
def test_gloo_keeps_the_contract(check):
    check(GLOO)
