"""Every rank has its own copy of what libraries keep in globals, however and whenever they were imported."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightrft.errors import RankFailedError, SimWarning
from lightrft.sim import SimWorld, library_state, rank_state
from lightrft.sim.libraries import LIBRARIES, Library
from lightrft.sim.library_state import LibraryState

SOURCE = {
    "__init__": "__version__ = '1.4.2'",
    "state": """
        group = None
        registry = {}
        stack = []
        seen = set()
        settings = {"depth": [0]}

        class Engine:
            count = 0
            names = []

        class Log:
            def __init__(self):
                self.lines = []
                self.level = 0

        log = Log()

        def register(name, where=[]):
            where.append(name)
            return list(where)
    """,
    "plugin": """
        from lib_of_one_rank import state
        state.registry["plugin"] = "built in"
        state.stack.append("plugin")
        state.group = "set by plugin"
    """,
}

LIBRARY = Library(
    name="lib_of_one_rank",
    oldest=(1, 0),
    newest=(1, 4),
    state={
        "state": (
            "group",
            "registry",
            "stack",
            "seen",
            "settings",
            "Engine.count",
            "Engine.names",
            "log.*",
            "register()",
            "not_in_this_version",
        )
    },
)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library that keeps state in globals; it is listed, and nobody has imported it."""
    folder = tmp_path / LIBRARY.name
    folder.mkdir()
    for name, source in SOURCE.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(rank_state, "LibraryState", functools.partial(LibraryState, (LIBRARY,)))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == LIBRARY.name]:
        del sys.modules[name]


def meet():
    dist.barrier()


def session(body):
    def run():
        dist.init_process_group("gloo")
        result = body(dist.get_rank())
        dist.destroy_process_group()
        return result

    return run


def write_everywhere(rank):
    """Writes to every place, lets the others do the same, and reads again."""
    state = importlib.import_module("lib_of_one_rank.state")
    state.group = rank
    state.registry[rank] = "mine"
    meet()
    state.stack.append(rank)
    state.seen.add(rank)
    meet()
    state.settings["depth"][0] += rank
    state.Engine.count += rank
    state.Engine.names.append(rank)
    state.log.level = rank
    state.log.lines.append(rank)
    meet()
    registered = state.register(rank)
    meet()
    return [
        state.group,
        dict(state.registry),
        list(state.stack),
        sorted(state.seen),
        state.settings["depth"][0],
        state.Engine.count,
        list(state.Engine.names),
        state.log.level,
        list(state.log.lines),
        [*registered, *state.register("again")],
    ]


EXPECTED = [
    [rank, {rank: "mine"}, [rank], [rank], rank, rank, [rank], rank, [rank], [rank, rank, "again"]] for rank in range(3)
]


@pytest.mark.parametrize("imported", ["before the run", "by a rank"])
def test_ranks_do_not_disturb_each_other(library, imported):
    if imported == "before the run":
        importlib.import_module("lib_of_one_rank.state")
    assert SimWorld(3).run(session(write_everywhere)) == EXPECTED
    assert SimWorld(3, schedule="random", seed=5).run(session(write_everywhere)) == EXPECTED


@pytest.mark.parametrize("imported", ["before the run", "by a rank"])
def test_after_a_run_a_library_is_as_after_its_import(library, imported):
    if imported == "before the run":
        importlib.import_module("lib_of_one_rank.state").registry["kept"] = 1
    with pytest.raises(RankFailedError):
        SimWorld(2).run(session(lambda rank: [write_everywhere(rank), 1 / (rank - 1)]))
    state = sys.modules["lib_of_one_rank.state"]
    assert state.registry == ({"kept": 1} if imported == "before the run" else {})
    assert (state.group, state.stack, state.seen, state.Engine.names) == (None, [], set(), [])
    assert vars(state.log) == {"lines": [], "level": 0}
    assert state.register("x") == ["x"]


def test_what_an_import_registers_is_registered_for_every_rank(library):
    def body(rank):
        state = importlib.import_module("lib_of_one_rank.state")
        state.registry["own"] = rank
        if rank == 0:
            state.group = "set by rank 0"
        meet()
        if rank == 1:
            importlib.import_module("lib_of_one_rank.plugin")
        meet()
        importlib.import_module("lib_of_one_rank.plugin")
        return dict(state.registry), list(state.stack), state.group

    groups = ["set by rank 0", "set by plugin", "set by plugin"]
    expected = [({"own": rank, "plugin": "built in"}, ["plugin"], groups[rank]) for rank in range(3)]
    assert SimWorld(3).run(session(body)) == expected


def test_what_a_module_does_to_the_process_it_does_for_every_rank(tmp_path, monkeypatch):
    (tmp_path / "sets_things.py").write_text(
        textwrap.dedent(
            """
            import os, sys, warnings, torch
            os.environ["SET_BY_IMPORT"] = "yes"
            os.environ.setdefault("SET_BY_RANK", "import")
            sys.path.insert(0, "/added/by/import")
            warnings.filterwarnings("ignore", "as the module wishes")
            torch.set_default_dtype(torch.float64)
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)

    def body(rank):
        if rank == 1:
            os.environ["SET_BY_RANK"] = "rank"
        meet()
        if rank == 2:
            importlib.import_module("sets_things")
        meet()
        importlib.import_module("sets_things")
        warnings.warn("as the module wishes", stacklevel=1)
        return os.environ["SET_BY_IMPORT"], os.environ.get("SET_BY_RANK"), sys.path[0], torch.ones(1).dtype

    filters, path = list(warnings.filters), list(sys.path)
    results = SimWorld(3).run(session(body))
    del sys.modules["sets_things"]
    expected = [("yes", who, "/added/by/import", torch.float64) for who in ("import", "rank", "import")]
    assert results == expected
    assert "SET_BY_IMPORT" not in os.environ
    assert (list(warnings.filters), sys.path) == (filters, path)
    assert torch.get_default_dtype() is torch.float32


# -- versions ---------------------------------------------------------------------------------------------------------


def test_an_unknown_version_gives_one_notice(library, monkeypatch):
    old = Library(name="lib_of_one_rank", oldest=(0, 9), newest=(1, 3), state=LIBRARY.state)
    monkeypatch.setattr(rank_state, "LibraryState", functools.partial(LibraryState, (old,)))
    monkeypatch.setattr(library_state, "_told", set())
    importlib.import_module("lib_of_one_rank.state")
    with pytest.warns(SimWarning, match=r"lib_of_one_rank 1\.4\.2 .*0\.9 to 1\.3.*rank_local"):
        SimWorld(1).run(session(lambda rank: None))
    SimWorld(1).run(session(lambda rank: None))  # a second notice would be an error


@pytest.mark.parametrize(
    ("installed", "known"),
    [("1.0", True), ("1.4.9", True), ("1.4rc1", True), ("1.5", False), ("2.0", False), ("0.9.9", False)],
)
def test_versions_are_compared_by_their_first_two_numbers(installed, known):
    assert (LIBRARY.notice(installed) == "") is known


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_the_page_names_the_versions_that_were_looked_through(library):
    oldest, newest = (".".join(map(str, version)) for version in (library.oldest, library.newest))
    versions = oldest if oldest == newest else f"{oldest} to {newest}"
    page = Path(__file__).parents[2] / "docs" / "libraries.md"
    assert f"| {library.name} | {versions} |" in page.read_text()


@pytest.mark.parametrize("name", [library.name for library in LIBRARIES])
def test_every_place_of_the_list_is_in_the_installed_version(name):
    [library] = [library for library in LIBRARIES if library.name == name]
    package = importlib.import_module(name)
    assert library.notice(package.__version__) == ""
    for module, paths in library.state.items():
        try:
            loaded = importlib.import_module(f"{name}.{module}" if module else name)
        except ImportError:
            pytest.fail(f"{name}.{module} is listed and cannot be imported")
        for path in paths:
            *steps, last = path.removesuffix("()").removesuffix(".*").split(".")
            holder = functools.reduce(getattr, steps, loaded)
            absent_until_written = path.rpartition(".")[2] in ("linear_bk", "_active_ddp_module", "__compatible_ops__")
            assert path == "*" or absent_until_written or hasattr(holder, last), f"{name}.{module}: {path}"


# -- what needs no list -----------------------------------------------------------------------------------------------


class _Trainer:
    @functools.cached_property
    def met(self):
        dist.barrier()
        return threading.get_ident()


def test_a_cached_property_in_which_ranks_meet_keeps_nobody_out():
    assert len(set(SimWorld(3).run(session(lambda rank: _Trainer().met)))) == 3


def test_a_cached_property_is_computed_once():
    class Counted:
        calls = 0

        @functools.cached_property
        def value(self):
            Counted.calls += 1
            return Counted.calls

    def body(rank):
        counted = Counted()
        return [counted.value, counted.value]

    assert SimWorld(1).run(session(body)) == [[1, 1]]


def test_a_cached_property_needs_a_place_for_its_value():
    class Slotted:
        __slots__ = ()
        value = functools.cached_property(lambda self: 1)

    with pytest.raises(RankFailedError, match="No '__dict__' attribute"):
        SimWorld(1).run(session(lambda rank: Slotted().value))
