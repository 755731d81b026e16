"""The pytest plugin, seen through the output of pytest itself."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import lightrft
from lightrft.errors import ConfigError, DeadlockError
from lightrft.sim import ProcessWorld, SimWorld, pytest_plugin
from lightrft.sim.mark import PROCESS_OPTIONS, WORLD_OPTIONS, SimMark

pytest_plugins = "pytester"

ROOT = Path(lightrft.__file__).parents[1]
HEAD = """
import os, pytest, torch
import torch.distributed as dist
from lightrft.errors import DeadlockError

def init():
    dist.init_process_group("gloo")
    return dist.get_rank()
"""


@pytest.fixture(scope="session", autouse=True)
def everything_is_imported():
    """Pytester forgets modules that are imported while it runs, and torch cannot be imported twice."""

    def body() -> None:
        dist.init_process_group("gloo")
        dist.all_gather_object([None, None], torch.ones(2))
        dist.destroy_process_group()

    SimWorld(2, schedule="random").run(body)
    with pytest.raises(DeadlockError):
        SimWorld(2).run(lambda: dist.init_process_group("gloo") or (dist.get_rank() and dist.barrier()))


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


def after(result: pytest.RunResult, line: str) -> str:
    """The output from the first line that contains ``line`` on."""
    lines = result.outlines
    return "\n".join(lines[next(n for n, shown in enumerate(lines) if line in shown) :])


# -- the plugin itself ------------------------------------------------------------------------------------------------


def test_the_plugin_is_registered_and_loads_no_torch():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert declared == {"lightrft_sim": pytest_plugin.__name__}
    source = f"import sys, {pytest_plugin.__name__}; print(sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_mark_passes_on_every_option_of_a_world():
    parameters = inspect.signature(SimWorld).parameters
    assert set(WORLD_OPTIONS) == set(parameters) - {"size", "seed"}
    parameters = inspect.signature(ProcessWorld).parameters
    assert set(PROCESS_OPTIONS) == set(parameters) - {"size", "seed", "unknown"}


def test_the_mark_the_option_and_the_fixture_are_described(run):
    result = run("", "--markers")
    result.stdout.fnmatch_lines(
        ["@pytest.mark.sim(ranks, ?, seeds=1, world='sim', gpus_per_node=*): run the body of the test on *"]
    )
    run("", "--help").stdout.fnmatch_lines(["*--sim-seed=SEED*"])
    run("", "--fixtures").stdout.fnmatch_lines(["sim_world -- *", "*The world of a marked test*"])


# -- what runs --------------------------------------------------------------------------------------------------------


def test_the_body_runs_on_every_rank_for_every_seed(run):
    result = run("""
        @pytest.fixture
        def ran():
            seen = []
            yield seen
            assert sorted(seen) == [0, 0, 1, 1, 2, 2]
            assert "RANK" not in os.environ

        @pytest.mark.sim(ranks=3, seeds=2)
        def test_body(ran):
            ran.append(init())
            dist.destroy_process_group()
    """)
    result.assert_outcomes(passed=1)


def test_the_schedule_is_random_only_where_a_seed_would_change_something(run):
    result = run("""
        from lightrft.sim.current import current_task
        seen = []

        def look():
            world = current_task().rank.world
            seen.append((world.schedule, world.seed))

        @pytest.mark.sim(1)
        def test_one(): look()

        @pytest.mark.sim(1, seeds=2)
        def test_two(): look()

        @pytest.mark.sim(1, seeds=[7])
        def test_seven(): look()

        @pytest.mark.sim(1, seeds=range(3, 5), schedule="fifo")
        def test_fifo(): look()

        @pytest.mark.sim(1, schedule="random")
        def test_random(): look()

        def test_after():
            assert seen == [
                ("fifo", 0), ("random", 0), ("random", 1), ("random", 7), ("fifo", 3), ("fifo", 4), ("random", 0)
            ]
    """)
    result.assert_outcomes(passed=6)


def test_marks_of_module_class_and_test_add_up_and_the_closest_wins(run, pytester):
    pytester.syspathinsert()
    pytester.makepyfile(conf="import os\nRANK = os.environ['RANK']")
    result = run("""
        from lightrft.sim.current import current_task
        pytestmark = pytest.mark.sim(ranks=2, profile="gloo", numerics="tree")

        @pytest.mark.sim(ranks=3)
        class TestClass:
            @pytest.mark.sim(numerics="ring", rank_local=["conf"], gpus_per_node=1, cuda=True)
            def test_method(self):
                import conf
                assert conf.RANK == os.environ["RANK"]
                world = current_task().rank.world
                assert (world.size, world.profile, world.numerics) == (3, "gloo", "ring")
                assert (world.rank_local, world.gpus_per_node) == (["conf"], 1)
                assert torch.cuda.is_available() and os.environ["LOCAL_WORLD_SIZE"] == "1"
    """)
    result.assert_outcomes(passed=1)


def test_a_list_of_sizes_makes_one_test_for_each(run):
    result = run(
        """
        @pytest.mark.sim(ranks=[1, 4])
        @pytest.mark.parametrize("word", ["a", "b"])
        def test_size(word, request):
            assert os.environ["WORLD_SIZE"] == request.node.name.partition("ranks=")[2][0]
        """,
        "-v",
    )
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines_random([f"*::test_size[[]ranks={n}-{word}[]] PASSED*" for n in (1, 4) for word in "ab"])


def test_fixtures_are_set_up_once_and_reach_every_rank(run):
    result = run("""
        made = []

        @pytest.fixture
        def thing(tmp_path):
            made.append(tmp_path)
            yield tmp_path
            assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]

        @pytest.mark.sim(ranks=3)
        def test_thing(thing, capsys, monkeypatch):
            assert made == [thing]
            (thing / os.environ["RANK"]).write_text("")
            monkeypatch.setenv("LIGHTRFT_TEST_MINE", os.environ["RANK"])

        def test_after():
            assert "LIGHTRFT_TEST_MINE" not in os.environ
    """)
    result.assert_outcomes(passed=2)


def test_hypothesis_draws_outside_so_that_ranks_see_the_same_example(run):
    pytest.importorskip("hypothesis")
    result = run("""
        from hypothesis import given, settings, strategies

        class TestClass:
            @pytest.mark.sim(ranks=2)
            @settings(max_examples=5, database=None, deadline=None)
            @given(number=strategies.integers())
            def test_same(self, number):
                numbers = [None] * 2 if init() is not None else None
                dist.all_gather_object(numbers, number)
                assert numbers[0] == numbers[1]
                dist.destroy_process_group()
    """)
    result.assert_outcomes(passed=1)


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
        @pytest.mark.sim(ranks=3, seeds=2)
        def test_body():
            {statement}
    """)
    result.assert_outcomes(**{outcome: 1})


def test_what_one_rank_skips_has_failed(run):
    result = run("""
        @pytest.mark.sim(ranks=2)
        def test_body():
            if init():
                pytest.skip("not today")
            dist.barrier()
    """)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["rank 1 failed: Skipped: not today", "*A test is skipped on all ranks or on none."])


def test_an_expected_error_is_an_expected_failure(run):
    result = run("""
        @pytest.mark.xfail(raises=DeadlockError, strict=True)
        @pytest.mark.sim(ranks=2)
        def test_deadlock():
            if init():
                dist.barrier()

        @pytest.mark.xfail(raises=ZeroDivisionError, strict=True)
        @pytest.mark.sim(ranks=2)
        def test_error():
            1 / int(os.environ["RANK"])
    """)
    result.assert_outcomes(xfailed=2)


def test_leaving_pytest_from_a_rank_leaves_pytest(run):
    result = run("""
        @pytest.mark.sim(ranks=2)
        def test_body():
            pytest.exit("enough", returncode=5)

        def test_after():
            raise AssertionError("this must not run")
    """)
    assert result.ret == 5


# -- how a failure looks ----------------------------------------------------------------------------------------------


def test_a_failing_assert_looks_as_always_and_the_other_ranks_follow(run):
    result = run("""
        def check(rank, limit=2):
            assert rank < limit, "too large"

        @pytest.mark.sim(ranks=4, seeds=range(3, 6))
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
            "*- simulated ranks, seed 3 -*",
            "  ranks 0-1  waits in barrier() on the default group, #1",
            "  ranks 2-3  raised AssertionError",
            "seed 3; run it again with: pytest test_it.py::test_body --sim-seed 3",
            "FAILED test_it.py::test_body - AssertionError: too large",
        ]
    )
    shown = result.stdout.str()
    assert shown.count("too large") == 4  # its source twice, the message, and the summary
    assert "lightrft/" not in shown
    assert "Traceback" not in shown


def test_a_deadlock_shows_the_table_and_nothing_else(run):
    result = run("""
        @pytest.mark.parametrize("word", ["two words"])
        @pytest.mark.sim(ranks=3)
        def test_body(word):
            if init() == 1:
                return
            dist.barrier()
    """)
    result.assert_outcomes(failed=1)
    shown = after(result, "= FAILURES =").splitlines()
    assert shown[2].startswith("deadlock: no rank can go on. Look at rank 1 at test_it.py:")
    assert "  ranks 0, 2  waits in barrier() on the default group, #1" in shown
    assert "seed 0; run it again with: pytest 'test_it.py::test_body[two words]'" in shown
    assert shown[-2].startswith("FAILED test_it.py::test_body[two words] - deadlock: no rank can go on. Look at rank 1")
    assert not any("lightrft" in line or "Traceback" in line for line in shown)


def test_the_one_line_form_of_a_report_names_the_line_to_blame(run):
    source = """
        @pytest.mark.sim(ranks=3)
        def test_body():
            if init():
                dist.barrier()
    """
    result = run(source, "--tb=line")
    assert re.search(r"^/.*/test_it\.py:6: deadlock: no rank can go on", result.stdout.str(), re.MULTILINE)
    full = run(source, "--full-trace").stdout.str()
    assert "world.py" in full


def test_a_refused_call_shows_the_line_of_the_user_not_the_inside_of_torch(run):
    result = run("""
        @pytest.mark.sim(ranks=2)
        def test_body():
            init()
            dist.all_reduce(torch.ones(2, 2).t())
    """)
    result.stdout.fnmatch_lines([">       dist.all_reduce(torch.ones(2, 2).t())", "E       *RefusedError: *"])
    assert "distributed_c10d" not in after(result, "= FAILURES =").partition("Captured log call")[0]


def test_warnings_point_at_the_test(run):
    result = run(
        """
        @pytest.mark.sim(ranks=2)
        def test_leftover():
            init()

        @pytest.mark.sim(ranks=2)
        def test_value():
            return 3
        """,
        "-Wdefault",
    )
    result.assert_outcomes(passed=2, warnings=2)
    result.stdout.fnmatch_lines(["*test_it.py:*: SimWarning: the run ended*"])
    result.stdout.fnmatch_lines(["*test_it.py:*: PytestReturnNotNoneWarning: *"])
    assert "pytest_plugin.py" not in result.stdout.str()


def test_a_warning_that_is_an_error_is_shown_by_its_message_alone(run):
    result = run("@pytest.mark.sim(ranks=2)\ndef test_leftover():\n    init()", "-W", "error")
    result.assert_outcomes(failed=1)
    shown = after(result, "= FAILURES =").splitlines()
    assert shown[2].startswith("the run ended")
    assert not any("lightrft" in line for line in shown)


def test_replaying_a_seed_runs_that_seed_alone(run):
    source = """
        from lightrft.sim.current import current_task

        @pytest.mark.sim(ranks=1, seeds=20)
        def test_body():
            world = current_task().rank.world
            assert (world.seed, world.schedule) == (5, "random")
    """
    run(source, "--sim-seed", "5").assert_outcomes(passed=1)
    failed = run(source, "--sim-seed=6")
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines(["seed 6; run it again with: pytest test_it.py::test_body --sim-seed 6"])


def test_the_replay_is_relative_to_where_pytest_was_started(run, pytester):
    folder = pytester.mkdir("folder")
    (folder / "test_inner.py").write_text(HEAD + "@pytest.mark.sim(1)\ndef test_inner():\n    assert 0\n")
    pytester.makeini("[pytest]")
    os.chdir(folder)
    result = run("", "test_inner.py")
    result.stdout.fnmatch_lines(["seed 0; run it again with: pytest test_inner.py::test_inner"])


def test_under_xdist_a_failure_looks_the_same(run, pytester, monkeypatch):
    pytest.importorskip("xdist")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    pytester.makepyfile(
        test_it=HEAD
        + inspect.cleandoc("""
        @pytest.mark.sim(ranks=2)
        def test_deadlock():
            if init():
                dist.barrier()

        @pytest.mark.sim(ranks=2, seeds=2)
        def test_assert():
            assert os.environ["RANK"] == "0"
        """)
    )
    result = pytester.runpytest_inprocess("-p", "xdist", "-n1", "-p", pytest_plugin.__name__, "-p", "no:cacheprovider")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["deadlock: no rank can go on. Look at *", "*run it again with: pytest test_it.py*"])
    result.stdout.fnmatch_lines(["E       AssertionError: assert '1' == '0'", "*- simulated ranks, seed 0 -*"])
    result.stdout.fnmatch_lines(["FAILED test_it.py::test_deadlock - deadlock: no rank can go on. Look at *"])


# -- marks that cannot work -------------------------------------------------------------------------------------------


def given(*args: object, **kwargs: object) -> SimpleNamespace:
    """What ``pytest.mark.sim(*args, **kwargs)`` gives the plugin, here where the mark need not be registered."""
    return SimpleNamespace(args=args, kwargs=kwargs)


@pytest.mark.parametrize(
    ("mark", "complaint"),
    [
        (given(), "the number of ranks is missing: write @pytest.mark.sim(ranks=8)"),
        (given(ranks=0), "ranks=0: expected a number of at least 1, or a list of such numbers"),
        (given(ranks=True), "ranks=True: expected a number of at least 1, or a list of such numbers"),
        (given(ranks=[]), "ranks=[]: expected a number of at least 1, or a list of such numbers"),
        (given(ranks="8"), "ranks='8': expected a number of at least 1, or a list of such numbers"),
        (given(8, 20), "(8, 20): expected one positional argument, the number of ranks"),
        (given(8, seeds=0), "seeds=0: expected how many seeds to run, at least 1, or a list of seeds"),
        (
            given(8, seeds=[1.5]),
            "seeds=[1.5]: expected how many seeds to run, at least 1, or a list of seeds",
        ),
        (given(8, seed=3), "unknown argument 'seed': expected one of ranks, seeds, world, gpus_per_node, "),
        (given(8, world="thread"), "world='thread': expected 'sim', 'process', or a list of both"),
        (given(8, world=[]), "world=[]: expected 'sim', 'process', or a list of both"),
        (
            given(8, world="process", schedule="random"),
            "schedule is for simulated ranks (world='sim') only, and this test has world='process': leave it out",
        ),
        (
            given(8, limit=5),
            "limit is for real processes (world='process') only, and this test has world='sim': leave it out",
        ),
    ],
)
def test_arguments_that_cannot_work_are_named(mark, complaint):
    with pytest.raises(ConfigError) as caught:
        SimMark.of([mark])
    assert str(caught.value).startswith(complaint)


def test_each_world_of_a_mark_gets_its_own_options():
    mark = SimMark.of([given(2, seeds=3, world=["sim", "process"], profile="gloo", limit=5, gpus_per_node=1)])
    assert mark.worlds == ("sim", "process")
    assert mark.options == {
        "sim": {"gpus_per_node": 1, "profile": "gloo", "schedule": "random"},
        "process": {"gpus_per_node": 1, "limit": 5},
    }


def test_a_mark_that_cannot_work_is_found_before_anything_runs(run):
    result = run("""
        @pytest.mark.sim(rank=8)
        def test_body():
            raise AssertionError("this must not run")
    """)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["test_it.py::test_body: @pytest.mark.sim: unknown argument 'rank': expected one of *"])
    assert "this must not run" not in result.stdout.str()


def test_an_option_that_the_world_refuses_is_shown_without_our_source(run):
    result = run("""
        @pytest.mark.sim(ranks=2, schedule="lifo")
        def test_body(): pass
    """)
    result.assert_outcomes(failed=1)
    assert after(result, "= FAILURES =").splitlines()[2] == (
        "@pytest.mark.sim: schedule='lifo' is unknown: expected 'fifo' or 'random'"
    )


def test_the_mark_is_refused_where_nothing_would_run_on_ranks(run):
    result = run("""
        import unittest

        class TestCase(unittest.TestCase):
            @pytest.mark.sim(ranks=2)
            def test_method(self):
                raise AssertionError("this must not run")

        @pytest.mark.sim(ranks=2)
        async def test_async():
            raise AssertionError("this must not run")
    """)
    result.assert_outcomes(errors=2)
    assert "this must not run" not in result.stdout.str()


# -- the fixture ------------------------------------------------------------------------------------------------------


def test_without_the_mark_sim_world_makes_worlds(run):
    result = run("""
        def all_reduce():
            init()
            total = torch.ones(())
            dist.all_reduce(total)
            dist.destroy_process_group()
            return total.item()

        def test_runs(sim_world):
            first, second = (sim_world(3, seed=seed, schedule="random") for seed in (1, 2))
            assert first.run(all_reduce) == second.run(all_reduce) == [3.0, 3.0, 3.0]
            assert len(first.trace) == 3

        def stuck():
            if init():
                dist.barrier()

        def test_stuck(sim_world):
            sim_world(2).run(stuck)

        def test_raises(sim_world):
            with pytest.raises(DeadlockError, match="pytest test_it.py::test_raises"):
                sim_world(2).run(stuck)
    """)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       sim_world(2).run(stuck)",
            "E       lightrft.errors.DeadlockError: deadlock: no rank can go on. *",
            "E       seed 0; run it again with: pytest test_it.py::test_stuck",
            "test_it.py:*: DeadlockError",
            "FAILED test_it.py::test_stuck - deadlock: no rank can go on. *",
        ]
    )
    assert "world.py" not in result.stdout.str()


def test_with_the_mark_sim_world_is_the_world_that_the_body_runs_in(run):
    result = run("""
        @pytest.fixture
        def one_barrier(sim_world):
            yield
            assert [event.operation for event in sim_world.trace] == ["barrier"] * 3

        @pytest.mark.sim(ranks=3, seeds=2)
        def test_body(sim_world, one_barrier):
            init()
            dist.barrier()
            assert sim_world.size == 3 and sim_world.seed in (0, 1)
            dist.destroy_process_group()
    """)
    result.assert_outcomes(passed=1)
