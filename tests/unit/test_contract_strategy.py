"""The contract of strategies, checked of every strategy on simulated ranks."""

import pytest

from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import CHECKS, LACKS, SETTINGS, Subject

GROUPS = ("ST101", "ST102", "ST106", "ST204", "ST801")
"""Checks that meet something on 4 ranks which there is not on 2: groups within the world. The usual tests take them
with 2 and 4 ranks and the others with 2; the slow ones take the rest of 1, 2, 4 and 8, and ZeRO-1, which is ZeRO-2 with
whole gradients."""

LONG = ("ST702",)
"""Checks that train long for what others see as well. The usual tests take them with the fakes alone."""


def sized(check, size, name):
    usual = name != "ZeRO-1" and (size == 2 or (size == 4 and check.number in GROUPS))
    usual = usual and (check.number not in LONG or name.startswith("fake"))
    return pytest.param(check, size, name, id=f"{check}-{size}-{name}", marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize(
    ("check", "size", "name"),
    [sized(check, size, name) for check in CHECKS for size in (1, 2, 4, 8) for name in SETTINGS],
)
def test_strategies_keep_the_contract_on_simulated_ranks(check, size, name):
    check(Subject(world=SimWorld, settings=SETTINGS[name], name=name, size=size, lacks=LACKS[name]))
