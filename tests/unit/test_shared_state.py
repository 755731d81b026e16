"""State of the user's modules that ranks share: what two of them write to is named, and nothing else."""

from __future__ import annotations

import importlib
import sys
import threading
import time
import warnings

import pytest
import torch.distributed as dist

from lightrft.errors import SimWarning
from lightrft.sim import SimWorld
from lightrft.sim.bytecode import INSIDE, WRITES, uses_of
from lightrft.sim.shared_globals import SharedGlobals
from lightrft.sim.surveys import parts_of, user_modules

from .helpers_shared import ordinary, written

HELPERS = written.__name__.rpartition(".")[0]


def warnings_of(*steps, ranks=3, **options):
    """What a run warns of in which every rank does the steps one after the other, with a barrier behind each."""

    def run():
        dist.init_process_group("gloo")
        for step in steps:
            step(dist.get_rank())
            dist.barrier()
        dist.destroy_process_group()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SimWorld(ranks, **options).run(run)
    return [str(warning.message) for warning in caught if issubclass(warning.category, SimWarning)]


KINDS = {
    "name": ("NAME", "global"),
    "new_name": ("LATER", "global"),
    "table": ("TABLE", "global"),
    "table_by_alias": ("TABLE", "global"),
    "table_handed_on": ("TABLE", "global"),
    "losses": ("LOSSES", "global"),
    "order": ("ORDER", "global"),
    "counts": ("COUNTS", "global"),
    "recent": ("RECENT", "global"),
    "total": ("TOTAL", "global"),
    "bias": ("BIAS", "global"),
    "options": ("OPTIONS", "global"),
    "net": ("NET", "global"),
    "buffers": ("BUFFERS", "global"),
    "class_attribute": ("Registry.count", "class attribute"),
    "class_container": ("Registry.entries", "class attribute"),
    "new_class_attribute": ("Registry.newest", "class attribute"),
    "derived_class_attribute": ("Derived.newest", "class attribute"),
    "timer": ("TIMER", "global"),
    "laps": ("LAPS", "global"),
    "lazy_timer": ("_timer", "global"),
    "progress": ("PROGRESS", "global"),
    "tick": ("tick.calls", "function attribute"),
    "remember": ("remember(history=...)", "default argument"),
    "remember_by_keyword": ("remember_by_keyword(seen=...)", "default argument"),
    "decorated": ("GROUPS", "global"),
}


@pytest.fixture(autouse=True)
def fresh_helpers():
    """Every test finds the helpers as they are after their import."""
    for module in (ordinary, written):
        importlib.reload(module)
    yield
    for name in ("late", "later"):
        sys.modules.pop(f"{HELPERS}.{name}", None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_ranks_write_to_is_named(kind):
    name, what = KINDS[kind]
    found = warnings_of(getattr(written, kind))
    assert len(found) == 1, found
    assert found[0].startswith(
        f"{written.__name__}.{name} is one {what} for all simulated ranks, and ranks 0 and 2 wrote"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_rank_writes_to_is_nobody_s_business(kind):
    write = getattr(written, kind)
    assert warnings_of(*[lambda rank: write(rank) if rank == 1 else None] * 3) == []


def test_every_kind_of_state_of_the_helper_has_its_test():
    assert {name for name in vars(written) if name in KINDS} == set(KINDS)


@pytest.mark.parametrize(
    "kind", sorted(KINDS.keys() - {"options", "net", "progress"})
)  # rank_local does not separate these
def test_state_of_a_rank_local_module_is_not_watched(kind):
    assert warnings_of(getattr(written, kind), rank_local=[written.__name__]) == []


def test_for_an_object_that_rank_local_does_not_separate_something_else_is_advised():
    (found,) = warnings_of(written.net)
    assert found.endswith("If that matters, make it inside the function that the ranks run")
    (found,) = warnings_of(written.timer)
    assert found.endswith(f"run with SimWorld(rank_local=[{written.__name__!r}]) or --rank-local {written.__name__}")


@pytest.mark.parametrize(
    ("cached", "reads"), [("my_rank", "get_rank"), ("my_device", "the environment variable LOCAL_RANK")]
)
def test_a_cache_of_what_differs_between_ranks_is_named(cached, reads):
    function = getattr(written, cached)
    (found,) = warnings_of(lambda _: function())
    assert found.startswith(
        f"{written.__name__}.{cached} caches its results for all simulated ranks, and ranks 0 and 2"
    )
    assert f"it depends on {reads};" in found
    assert warnings_of(lambda rank: function() if rank == 1 else None, lambda rank: rank == 1 and function()) == []


def test_a_cache_that_gives_nothing_out_twice_is_nobody_s_business():
    assert warnings_of(written.is_first) == []


def test_only_what_somebody_may_write_to_is_watched():
    shared = SharedGlobals(lambda name: name != ordinary.__name__)
    shared.begin(user_modules(), parts_of(user_modules()))
    prefix = f"{ordinary.__name__}."
    assert {watched.label.removeprefix(prefix) for watched in shared._watched} == {
        "REGISTRY",
        "ONCE",
        "SAME",
        "DEVICE",
        "RANK_0_ONLY",
        "REFERENCE",
        "TABLE",  # a function that reads it changes something else, and it holds a list
        "CONFIG",  # the list of another object's attribute of the same name is changed
    }


def test_ordinary_programs_are_left_in_peace():
    assert warnings_of(lambda _: ordinary.setup(), lambda _: ordinary.train(), lambda _: ordinary.train()) == []
    assert ordinary.RANK_0_ONLY == [1]


def test_a_registry_that_imports_fill_is_left_in_peace():
    def load(rank):
        importlib.import_module(f"{HELPERS}.{'late' if rank == 0 else 'later'}")

    assert warnings_of(load) == []
    assert {"net", "late", "loss", "later"} == ordinary.REGISTRY.keys()


def test_a_module_imported_during_the_run_is_watched_from_its_import_on():
    def load(rank):
        importlib.import_module(f"{HELPERS}.late").count(rank)

    (found,) = warnings_of(load, ranks=2)
    assert found.startswith(
        f"{HELPERS}.late.COUNT is one global for all simulated ranks, and ranks 0 and 1 wrote to it"
    )


def test_state_that_two_ranks_wrote_to_is_watched_no_more():
    seen = []

    def look(rank):
        written.table(rank)
        seen.append(len(_world().shared._watched))

    def _world():
        from lightrft.sim.current import current_task

        return current_task().rank.world

    warnings_of(look, look)
    assert seen[-1] == seen[0] - 1


# -- what bytecode shows -----------------------------------------------------------------------------------------------

X = {}


def reads(key):
    return X[key], len(X), [(each, 1) for each in X], key in X, X.get(key), key == X, sorted(X)


def reads_while_writing_elsewhere(key, out):
    out[key] = X[key]


def stores(key):
    X[key] = 1


def adds(key):
    X[key] += 1


def deletes(key):
    del X[key]


def calls_a_changing_method():
    X.update(a=1)


def hands_on(function):
    function(1, X)


def returns():
    return X


def chooses(key):
    return X[1 if key else 2]


@pytest.mark.parametrize(
    ("function", "level"),
    [
        (reads, 0),
        (reads_while_writing_elsewhere, INSIDE),
        (stores, WRITES),
        (adds, WRITES),
        (deletes, WRITES),
        (calls_a_changing_method, WRITES),
        (hands_on, WRITES),
        (returns, WRITES),
        (chooses, WRITES),  # not understood, so it may be
    ],
)
def test_reading_a_container_is_told_from_writing_to_it(function, level):
    assert uses_of(function.__code__).names["X"] == level


EMPTY = """
import threading
import time

KEPT = LOCK = None

class Box:
    kept = None

def keep(place, rank):
    place.append(rank)

def in_global(rank):
    KEPT.append(rank)

def in_class(rank):
    Box.kept.append(rank)

def in_function(rank):
    keep.kept.append(rank)

def in_default(rank):
    remember(rank)

def waits(rank):
    wait(1e6)

def locks(rank):
    with LOCK:
        time.sleep(1)
"""

REMEMBER = """
def remember(rank, kept=[]):
    kept.append(rank)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's, of which a run has found nothing to watch."""
    (tmp_path / "bound_anew.py").write_text(EMPTY)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("bound_anew")
    del sys.modules["bound_anew"]


def binds_a_global(module):
    module.KEPT = []
    return module.in_global, "bound_anew.KEPT is one global"


def binds_a_class_attribute(module):
    module.Box.kept = []
    return module.in_class, "bound_anew.Box.kept is one class attribute"


def binds_an_attribute_of_a_function(module):
    module.keep.kept = []
    return module.in_function, "bound_anew.keep.kept is one function attribute"


def binds_a_function(module):
    code = compile(REMEMBER, module.__file__, "exec")
    exec(code, vars(module))
    return module.in_default, "bound_anew.remember(kept=...) is one default argument"


@pytest.mark.parametrize(
    "bind", [binds_a_global, binds_a_class_attribute, binds_an_attribute_of_a_function, binds_a_function]
)
def test_what_is_bound_anew_between_runs_is_watched(module, bind):
    assert warnings_of(lambda rank: None) == []
    write, expected = bind(module)
    (found,) = warnings_of(write)
    assert found.startswith(expected)
    assert warnings_of(lambda rank: rank or write(rank)) == []


def test_a_lock_and_a_clock_that_a_module_has_got_between_runs_are_simulated(module):
    assert warnings_of(lambda rank: None) == []
    module.LOCK, module.wait = threading.Lock(), time.sleep
    assert warnings_of(module.waits, module.locks) == []  # a million seconds, and no deadlock that nobody sees
