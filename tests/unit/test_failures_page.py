"""The list of failures names tests and checks that exist."""

import re
from pathlib import Path

import pytest

from lightrft.sim import contracts

ROOT = Path(__file__).parents[2]
TABLE, OPEN = (ROOT / "docs/failures.md").read_text().split("## What is open")
ROWS = re.findall(r"^\| ([FK]\d\d) \| (.+?) \| (.+?) \|$", TABLE, re.MULTILINE)


def test_every_failure_has_one_row():
    assert [name for name, *_ in ROWS] == [f"F{n:02}" for n in range(1, 21)] + [f"K{n:02}" for n in range(1, 31)]


@pytest.mark.parametrize(("row", "guards"), [(name, guards) for name, _, guards in ROWS])
def test_what_guards_a_row_exists(row, guards):
    tests = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    several = (contracts.strategy, contracts.engine, contracts.weight_sync)
    checks = {check.number: check for contract in several for check in contract.CHECKS}
    for guard in guards.split(", "):
        if guard == "*open*":
            assert re.search(rf"^(F\d\d, )*{row}(, F\d\d)*: ", OPEN, re.MULTILINE), "why is not said"
        elif guard.startswith("`"):
            assert guard.strip("`") in tests
        else:
            assert row in checks[guard].property, f"{guard} does not say that it guards {row}"
