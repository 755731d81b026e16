"""Ranks that run the training programs write to no library state that they share, beyond what is listed or excused."""

from __future__ import annotations

import functools
import importlib
import sys
import textwrap

import pytest
from programs import hugging_face, torch_native, zero
from programs.library_writes import EXCUSED, unlisted, written

from lightrft.sim import rank_state
from lightrft.sim.libraries import LIBRARIES, Library
from lightrft.sim.library_state import LibraryState

pytestmark = pytest.mark.filterwarnings("ignore")

PROGRAMS = [
    torch_native.ddp,
    torch_native.fsdp2,
    torch_native.tensor_parallel_loss,
    zero.zero2,
    hugging_face.accelerate_fsdp2,
    hugging_face.accelerate_zero3,
]
"""A few of those that ``tests/processes/test_library_writes.py`` runs."""


written_by = functools.cache(written)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_no_two_ranks_write_to_library_state_that_is_not_listed(program):
    places = written_by(program)
    assert places
    assert unlisted(places) == [], "list them in lightrft/sim/libraries.py, or excuse them in library_writes.py"


def test_what_is_taken_off_the_list_is_found():
    without = [library for library in LIBRARIES if library.name != "deepspeed"]
    found = unlisted(written_by(zero.zero2), without)
    assert "deepspeed.comm.comm.cdb" in found
    assert "deepspeed.utils.groups._WORLD_GROUP" in found


@pytest.mark.parametrize("place", EXCUSED)
def test_what_is_excused_exists(place):
    parts = place.removesuffix("[]").split(".")
    for count in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:count]) in sys.modules:
            owner = functools.reduce(getattr, parts[count:-1], sys.modules[".".join(parts[:count])])
            assert hasattr(owner, parts[-1])
            return
    pytest.fail("no such module")


# -- the account of writes --------------------------------------------------------------------------------------------

SOURCE = """
    count = 0
    registry = {}
    stack = []
    large = dict.fromkeys(range(100))
    untouched = {}

    class Engine:
        steps = 0
        names = []

    class Log:
        def __init__(self):
            self.level = 0
            self.lines = []

    log = Log()

    def register(name, where=[]):
        where.append(name)
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    folder = tmp_path / "lib_written_to"
    folder.mkdir()
    (folder / "__init__.py").write_text("__version__ = '1.0'\n")
    (folder / "state.py").write_text(textwrap.dedent(SOURCE))
    (folder / "alias.py").write_text("from lib_written_to.state import registry\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("state", "alias"):
        importlib.import_module(f"lib_written_to.{name}")
    yield
    for name in [name for name in sys.modules if name.startswith("lib_written_to")]:
        del sys.modules[name]


def write_everywhere():
    import torch.distributed as dist
    from lib_written_to import state

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    state.count += 1 + rank
    state.registry["rank"] = rank
    state.stack.append(rank)
    state.large[100 + rank] = rank
    state.Engine.steps += 1 + rank
    state.Engine.names.append(rank)
    state.log.level += 1 + rank
    state.log.lines.append(rank)
    state.register(rank)
    if rank == 0:
        state.untouched["by one rank"] = 1
    dist.barrier()
    dist.destroy_process_group()


WRITTEN = [
    "state.Engine.names[]",
    "state.Engine.steps",
    "state.count",
    "state.large[]",
    "state.log.level",
    "state.log.lines[]",
    "state.register()[]",
    "state.registry[]",
    "state.stack[]",
]


def test_every_kind_of_place_is_seen_to_be_written_to(library):
    assert unlisted(written(write_everywhere, packages=["lib_written_to"])) == [
        f"lib_written_to.{name}" for name in WRITTEN
    ]


def listing(**state):
    return Library(name="lib_written_to", oldest=(1, 0), newest=(1, 0), state=state)


@pytest.mark.parametrize(
    ("listed", "left"),
    [
        (("count", "registry", "stack", "large", "Engine.steps", "Engine.names", "log.*", "register()"), []),
        (("registry", "stack", "large", "Engine.steps", "Engine.names", "log.*", "register()"), ["count"]),
        (("count", "registry", "stack", "large", "Engine.names", "log.*", "register()"), ["Engine.steps"]),
        (
            ("count", "registry", "stack", "large", "Engine.steps", "Engine.names", "register()"),
            ["log.level", "log.lines[]"],
        ),
        (("*", "Engine.steps", "Engine.names", "log.*"), ["register()[]"]),
    ],
)
def test_a_place_that_is_listed_is_not_told_of_and_one_that_is_taken_off_is(library, monkeypatch, listed, left):
    libraries = [listing(state=listed)]
    monkeypatch.setattr(rank_state, "LibraryState", functools.partial(LibraryState, libraries))
    found = unlisted(written(write_everywhere, packages=["lib_written_to"]), libraries)
    assert found == [f"lib_written_to.state.{name}" for name in left]
