"""The contract of strategies, checked of every strategy on simulated ranks."""

import pytest

from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import CHECKS, LACKS, SETTINGS, Subject

SPEAKS_OF_RANKS = ("ST1", "ST2", "ST301", "ST302", "ST7", "ST8")
"""Numbers of the checks whose properties speak of the number of ranks. The usual tests take them with 2 and 4 ranks and
the others with 2; the slow ones take the rest of 1, 2, 4 and 8."""


def sized(check, size):
    usual = size == 2 or (size == 4 and check.number.startswith(SPEAKS_OF_RANKS))
    return pytest.param(check, size, id=f"{check}-{size}", marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("check", "size"), [sized(check, size) for check in CHECKS for size in (1, 2, 4, 8)])
def test_strategies_keep_the_contract_on_simulated_ranks(check, size, name):
    check(Subject(world=SimWorld, settings=SETTINGS[name], name=name, size=size, lacks=LACKS[name]))
