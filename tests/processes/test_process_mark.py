"""``@pytest.mark.sim(world="process")``: the body of a test on real processes, seen through the output of pytest."""

import inspect
import os
from pathlib import Path

import pytest
import torch.distributed as dist

import lightrft
from lightrft.sim import ProcessWorld, SimWorld, pytest_plugin

pytestmark = pytest.mark.processes
pytest_plugins = "pytester"

ROOT = Path(lightrft.__file__).parents[1]
HEAD = """
import os, pytest, random, torch
import torch.distributed as dist

def init():
    dist.init_process_group("gloo")
    return dist.get_rank()
"""


@pytest.fixture(scope="session", autouse=True)
def everything_is_imported():
    """Pytester forgets modules that are imported while it runs, and torch cannot be imported twice."""

    def body():
        dist.init_process_group("gloo")
        dist.destroy_process_group()

    for world in (SimWorld(2), ProcessWorld(2)):
        world.run(body)


@pytest.fixture
def run(pytester, monkeypatch):
    """Writes a test file and runs pytest on it, with our plugin alone; returns the result."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("CI", raising=False)

    def run_pytest(source: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=HEAD + inspect.cleandoc(source))
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options, plugins=[pytest_plugin])

    return run_pytest


@pytest.mark.parametrize("mode", ["importlib", "prepend"])
def test_one_body_runs_in_both_worlds(run, mode):
    result = run(
        """
        draws = []

        @pytest.fixture
        def folder(tmp_path):
            yield tmp_path
            assert len(list(tmp_path.iterdir())) == 4

        def test_before(): pass

        class TestClass:
            number = 3

            @pytest.mark.sim(ranks=2, seeds=2, world=["sim", "process"], profile="gloo", limit=20)
            def test_body(self, folder, monkeypatch):
                monkeypatch.setenv("LIGHTRFT_TEST_MINE", "1")
                total = torch.tensor(init() + self.number)
                dist.all_reduce(total)
                assert total.item() == 7
                (folder / f"{os.environ['RANK']} {random.random()}").write_text(str(os.getpid()))
                dist.destroy_process_group()

        def test_after():
            assert "LIGHTRFT_TEST_MINE" not in os.environ
        """,
        "-v",
        f"--import-mode={mode}",
    )
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines_random([f"*::test_body[[]world={world}[]] PASSED*" for world in ("sim", "process")])


def test_the_world_of_the_mark_is_a_fixture(run):
    result = run("""
        @pytest.mark.sim(ranks=[1, 2], world="process", gpus_per_node=1, backend="gloo", seeds=[4])
        def test_body(sim_world):
            assert str(sim_world.size) == os.environ["WORLD_SIZE"]
            assert (sim_world.seed, sim_world.backend, os.environ["LOCAL_WORLD_SIZE"]) == (4, "gloo", "1")
    """)
    result.assert_outcomes(passed=2)


def test_a_failing_assert_looks_as_always_and_the_other_ranks_follow(run):
    result = run("""
        def check(rank, limit=2):
            assert rank < limit, "too large"

        @pytest.mark.sim(ranks=4, seeds=range(3, 6), world="process")
        def test_body():
            check(init())
            dist.barrier()
    """)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "    def test_body():",
            ">       check(init())",
            ">       assert rank < limit, ?too large?",
            "E       AssertionError: too large",
            "E       assert [23] < 2",
            "test_it.py:*: AssertionError",
            "*- real processes, seed 3 -*",
            "  ranks 0-1  is in barrier()",
            "  ranks 2-3  raised AssertionError",
            "seed 3; run it again with: pytest test_it.py::test_body --sim-seed 3",
            "FAILED test_it.py::test_body - AssertionError: too large",
        ]
    )
    shown = result.stdout.str()
    assert shown.count("too large") == 4  # its source twice, the message, and the summary
    assert "lightrft/" not in shown
    assert "Traceback" not in shown


def test_a_death_and_a_hang_show_their_report_and_nothing_of_ours(run):
    result = run("""
        @pytest.mark.sim(ranks=2, world="process", limit=3)
        def test_hang():
            if init():
                dist.barrier()
            os.read(os.pipe()[0], 1)

        @pytest.mark.sim(ranks=2, world="process")
        def test_death():
            print("last words")
            os._exit(3)
    """)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "timeout: the run did not end within 3 s. Look at rank 0 at test_it.py:*; rank 1 at test_it.py:*.",
            "stack of rank 1 (most recent call last):",
            "  rank 1  is in barrier()",
            "seed 0; run it again with: pytest test_it.py::test_hang",
            "ranks 0-1 left with exit status 3",
            "last words",
        ]
    )
    assert "lightrft" not in result.stdout.str().partition("= FAILURES =")[2]


@pytest.mark.parametrize(
    ("statement", "outcome"),
    [
        ("pytest.skip('not today')", "skipped"),
        ("pytest.importorskip('no_such_module')", "skipped"),
        ("pytest.xfail('not yet')", "xfailed"),
    ],
)
def test_what_all_ranks_skip_is_skipped(run, statement, outcome):
    result = run(f"""
        @pytest.mark.sim(ranks=2, world="process")
        def test_body():
            {statement}
    """)
    result.assert_outcomes(**{outcome: 1})


def test_expected_errors_are_expected_failures(run):
    result = run("""
        class MyError(Exception): pass

        @pytest.mark.xfail(raises=MyError, strict=True)
        @pytest.mark.sim(ranks=2, world="process")
        def test_error():
            raise MyError
    """)
    result.assert_outcomes(xfailed=1)


def test_a_fixture_that_cannot_be_sent_is_named(run):
    result = run("""
        @pytest.mark.sim(ranks=2, world="process")
        def test_body(capsys): pass
    """)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["argument 'capsys' (_pytest.capture.CaptureFixture) cannot be sent to the ranks *"])


def test_hypothesis_draws_outside_so_that_ranks_see_the_same_example(run):
    pytest.importorskip("hypothesis")
    result = run("""
        from hypothesis import given, settings, strategies

        @pytest.mark.sim(ranks=2, world="process")
        @settings(max_examples=3, database=None, deadline=None)
        @given(number=strategies.integers())
        def test_same(number):
            numbers = [None] * 2 if init() is not None else None
            dist.all_gather_object(numbers, number)
            assert numbers[0] == numbers[1]
    """)
    result.assert_outcomes(passed=1)


def test_every_worker_of_xdist_has_a_warm_process_of_its_own_for_the_whole_session(pytester, monkeypatch):
    pytest.importorskip("xdist")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    source = """
        @pytest.mark.parametrize("number", range(4))
        @pytest.mark.sim(ranks=2, world="process")
        def test_body(number):
            init()
            dist.barrier()
            assert number < 3

        parents = []

        @pytest.mark.parametrize("number", range(6))
        def test_the_warm_process_is_the_same(number):
            from lightrft.sim import ProcessWorld

            with ProcessWorld(1) as world:
                parents.extend(world.run(os.getppid))
            assert len(set(parents)) == 1
    """
    pytester.makepyfile(test_it=HEAD + inspect.cleandoc(source))
    result = pytester.runpytest_inprocess("-p", "xdist", "-n2", "-p", pytest_plugin.__name__, "-p", "no:cacheprovider")
    result.assert_outcomes(passed=9, failed=1)
    result.stdout.fnmatch_lines(["E       assert 3 < 3", "*- real processes, seed 0 -*"])
