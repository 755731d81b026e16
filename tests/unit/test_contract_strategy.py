"""The contract of strategies, checked of every strategy on simulated ranks."""

import pytest

from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import CHECKS, LACKS, SETTINGS, Subject

SPEAKS_OF_RANKS = ("ST1", "ST2", "ST301", "ST302", "ST7", "ST8")
"""Numbers of the checks whose properties speak of the number of ranks; the others take less of it with 2 and 4."""


def sized(check, size):
    usual = size in (2, 4) or check.number.startswith(SPEAKS_OF_RANKS)
    return pytest.param(check, size, id=f"{check}-{size}", marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("check", "size"), [sized(check, size) for check in CHECKS for size in (1, 2, 4, 8)])
def test_strategies_keep_the_contract_on_simulated_ranks(check, size, name):
    check(Subject(world=SimWorld, settings=SETTINGS[name], name=name, size=size, lacks=LACKS[name]))
