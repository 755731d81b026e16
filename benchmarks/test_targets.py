"""The promises of ``targets.py``: one that is missed fails the run."""

from __future__ import annotations

import pytest

from benchmarks.targets import TARGETS, Target


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_target_is_met(target: Target) -> None:
    measured = target.measured()
    assert measured <= target.limit, f"{target.what}: measured {measured:.3g}, promised at most {target.limit:g}"
