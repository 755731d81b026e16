"""The pytest plugin: ``@pytest.mark.sim(ranks=8, seeds=20)`` and the fixture ``sim_world``.

The body of a marked test runs on every simulated rank, once for each seed; with ``world="process"`` on real processes.
Fixtures are set up once, outside the ranks; every rank gets their values. A failure on a rank is shown as pytest shows
any failure, followed by what the other ranks were doing. Nothing here loads torch before the first marked test runs.
"""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import unittest
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard, cast

import pytest

from lightrft.errors import ConfigError, RankFailedError, SimWarning
from lightrft.sim import pytest_report
from lightrft.sim.mark import SIGNATURE, SimMark
from lightrft.sim.process_pool import shared

if TYPE_CHECKING:
    from lightrft.sim.divergence import Report
    from lightrft.sim.process_world import ProcessWorld
    from lightrft.sim.world import SimWorld

__all__ = ["sim_world"]

_SIZE = "_sim_size"
_WORLD = "_sim_world"
_world_of = pytest.StashKey["SimWorld | ProcessWorld"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--sim-seed``."""
    parser.getgroup("lightrft", "simulated ranks (lightrft)").addoption(
        "--sim-seed",
        type=int,
        metavar="SEED",
        help="run tests marked sim with this seed only: repeats a failure that a report shows",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describe the mark for ``pytest --markers``; keep the warm process behind real ranks for the whole session."""
    shared.hold(config)
    config.addinivalue_line(
        "markers",
        f"{SIGNATURE}: run the body of the test on simulated torch.distributed ranks, once for each seed. ranks: how "
        "many, or a list to make one test for each size. seeds: how many (0, 1, ...), or a list; with several the "
        "order in which ranks run is drawn from the seed. world: 'sim', 'process' for real processes, or a list to "
        "make one test for each. The rest goes to lightrft.sim.SimWorld, or to ProcessWorld.",
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the warm process behind real ranks, if there is one."""
    shared.let_go(config)


# -- the mark ---------------------------------------------------------------------------------------------------------


def _mark_of(item: Any) -> SimMark | None:
    """The checked mark of a test, or None if it has none; fails the test if the mark cannot work."""
    marks = list(item.iter_markers("sim"))
    try:
        return SimMark.of(marks) if marks else None
    except ConfigError as error:
        problem = f"{item.nodeid}: @pytest.mark.sim: {error}"
    pytest.fail(problem, pytrace=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test for each size and each world, if the mark names several."""
    mark = _mark_of(metafunc.definition)
    if mark is not None and mark.each_size:
        metafunc.fixturenames.append(_SIZE)
        metafunc.parametrize(_SIZE, mark.sizes, ids=[f"ranks={size}" for size in mark.sizes], indirect=True)
    if mark is not None and mark.each_world:
        metafunc.fixturenames.append(_WORLD)
        metafunc.parametrize(_WORLD, mark.worlds, ids=[f"world={world}" for world in mark.worlds], indirect=True)


@pytest.fixture(name=_SIZE)
def _sim_size(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(name=_WORLD)
def _sim_world(request: pytest.FixtureRequest) -> Any:
    return request.param


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse the mark where it would do nothing."""
    if item.get_closest_marker("sim") is None:
        return
    cls = getattr(item, "cls", None)
    if not isinstance(item, pytest.Function) or (cls is not None and issubclass(cls, unittest.TestCase)):
        pytest.fail("@pytest.mark.sim works on test functions and on plain classes, not on this kind", pytrace=False)
    if inspect.iscoroutinefunction(item.obj):
        pytest.fail("@pytest.mark.sim runs plain functions, not async ones", pytrace=False)


# -- worlds -----------------------------------------------------------------------------------------------------------


def _new_world(item: pytest.Item, mark: SimMark) -> SimWorld | ProcessWorld:
    import lightrft.sim

    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec is not None else {}
    size, world = params.get(_SIZE, mark.sizes[0]), params.get(_WORLD, mark.worlds[0])
    make = lightrft.sim.ProcessWorld if world == "process" else lightrft.sim.SimWorld
    try:
        return make(size, seed=_seeds(item, mark)[0], **mark.options[world])
    except ConfigError as error:
        problem = f"@pytest.mark.sim: {error}"
    pytest.fail(problem, pytrace=False)


def _seeds(item: pytest.Item, mark: SimMark) -> tuple[int, ...]:
    chosen = item.config.getoption("--sim-seed")
    return mark.seeds if chosen is None else (chosen,)


def _replay(item: pytest.Item, seed: int | None) -> str:
    file = os.path.relpath(item.path, item.config.invocation_params.dir)
    name = item.nodeid.partition("::")[2]
    return shlex.join(["pytest", f"{file}::{name}", *([] if seed is None else ["--sim-seed", str(seed)])])


@pytest.fixture
def sim_world(request: pytest.FixtureRequest) -> Any:
    """The world of a marked test; in other tests a function that makes worlds.

    With ``@pytest.mark.sim(...)`` this is the :class:`~lightrft.sim.SimWorld` (or ``ProcessWorld``) on whose ranks the
    body runs: another fixture may look at its trace after the test. Without the mark, ``sim_world(8, seed=1)`` makes a
    world, for a test that looks at runs from outside; it takes the arguments of ``SimWorld``, and its reports name the
    test to run again.
    """
    item = request.node
    mark = _mark_of(item)
    if mark is not None:
        item.stash[_world_of] = world = _new_world(item, mark)
        return world

    def make(size: int, **options: Any) -> SimWorld:
        from lightrft.sim.world import SimWorld

        made = SimWorld(size, **options)
        made.replay = _replay(item, None)
        return made

    return make


# -- running ----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the body of a marked test on every rank, for every seed."""
    __tracebackhide__ = True
    mark = _mark_of(pyfuncitem)
    if mark is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    world = pyfuncitem.stash.get(_world_of, None) or _new_world(pyfuncitem, mark)
    run = functools.partial(_run_seeds, pyfuncitem, world, _seeds(pyfuncitem, mark))
    if hasattr(pyfuncitem.obj, "hypothesis"):
        _run_examples(pyfuncitem.obj, arguments, run)
    else:
        run(pyfuncitem.obj, arguments)
    return True


def _run_examples(function: Any, arguments: dict[str, Any], run: Callable[..., None]) -> None:
    """Run each example that hypothesis draws on all ranks; the search itself stays outside."""
    __tracebackhide__ = True
    body = function.hypothesis.inner_test

    @functools.wraps(body)
    def on_ranks(*args: Any, **drawn: Any) -> None:
        __tracebackhide__ = True
        run(functools.partial(body, *args) if args else body, drawn)

    function.hypothesis.inner_test = on_ranks
    try:
        function(**arguments)
    finally:
        function.hypothesis.inner_test = body


def _run_seeds(
    item: pytest.Function,
    world: SimWorld | ProcessWorld,
    seeds: Sequence[int],
    function: Callable[..., Any],
    arguments: dict[str, Any],
) -> None:
    __tracebackhide__ = True
    several = len(seeds) > 1 or item.config.getoption("--sim-seed") is not None
    for seed in seeds:
        world.seed = seed
        world.replay = _replay(item, seed if several else None)
        if _is_simulated(world):
            world.warn = functools.partial(_warn, item, SimWarning)
        failure = None
        try:
            results = world.run(function, **arguments)
        except RankFailedError as error:
            failure = error
        if failure is not None:
            _raise_failure(item, world, failure)
        elif any(result is not None for result in results):
            problem = f"Test functions should return None: {item.nodeid} returned something. Did you mean assert?"
            _warn(item, pytest.PytestReturnNotNoneWarning, problem)


def _warn(item: pytest.Item, category: type[Warning], message: str) -> None:
    """Warn at the first line of the test."""
    __tracebackhide__ = True
    file, line, _ = item.reportinfo()
    warnings.warn_explicit(message, category, os.fspath(file), (line or 0) + 1)


def _raise_failure(item: pytest.Function, world: SimWorld | ProcessWorld, failure: RankFailedError) -> NoReturn:
    """Raise what the rank raised, as if the test had run without ranks: pytest shows it in its own way."""
    __tracebackhide__ = True
    cause, report = failure.__cause__, cast("Report", failure.report)
    if cause is None:  # a process died
        raise failure
    kind = "simulated ranks" if _is_simulated(world) else "real processes"
    if not isinstance(cause, (pytest.skip.Exception, pytest.xfail.Exception)):
        pytest_report.remember(item, f"{kind}, seed {world.seed}", str(report))
    elif not _all_raised(world.size, cause, report):
        pytest_report.remember(item, kind, "A test is skipped on all ranks or on none.")
        raise failure
    raise cause


def _is_simulated(world: SimWorld | ProcessWorld) -> TypeGuard[SimWorld]:
    from lightrft.sim.world import SimWorld

    return isinstance(world, SimWorld)


def _all_raised(size: int, cause: BaseException, report: Report) -> bool:
    raised = [row.ranks for row in report.rows if row.what == f"raised {type(cause).__name__}"]
    return sum(map(len, raised)) == size


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the simulator found, not where in its source it said so."""
    report = yield
    if call.excinfo is not None and report.failed and not item.config.getoption("--full-trace"):
        pytest_report.show(item, call.excinfo, report)
    return report
