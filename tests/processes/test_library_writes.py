"""Every training program on two simulated ranks: they write to no library state that they share and nobody excuses."""

from __future__ import annotations

import importlib

import pytest
from programs.library_writes import unlisted, written
from test_libraries_agree import CASES

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_two_ranks_write_to_library_state_that_is_not_listed(case, tmp_path):
    for name in case.programs:
        program = getattr(importlib.import_module(f"programs.{case.module}"), name)
        takes_folder = "folder" in program.__code__.co_varnames[: program.__code__.co_argcount]
        assert unlisted(written(program, *([str(tmp_path)] if takes_folder else []))) == []
