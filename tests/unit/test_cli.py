"""The command ``lightrft sim``: its command line, and how it runs a script on every rank."""

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import lightrft
from lightrft import cli
from lightrft.sim.collectives import ORDERS
from lightrft.sim.profiles import PROFILES

ROOT = Path(lightrft.__file__).parents[1]
GROUP = "import torch.distributed as dist\ndist.init_process_group('gloo')\nrank = dist.get_rank()\n"
LEAVE = "\ndist.destroy_process_group()\n"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a script into an empty working directory; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(source: str, name: str = "script.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return name

    return write


def sim(*words: str) -> int:
    return cli.main(["sim", *words])


def sim_without_report(*words: str) -> int:
    return sim("--no-report", *words)


# -- the command line -------------------------------------------------------------------------------------------------


def test_help_version_and_complaints_load_no_torch(script):
    script("")
    source = """
        import sys
        from lightrft.cli import main
        lines = ["--version", "--help", "sim --help", "sim -n 2 missing.py", "sim -n 0 script.py", "sin"]
        print([main(line.split()) for line in lines], "torch" in sys.modules, "numpy" in sys.modules)
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(source)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"lightrft {lightrft.__version__}\n")
    assert done.stdout.endswith("[0, 0, 0, 2, 2, 2] False False\n")


def test_without_a_command_the_help_is_shown_as_an_error(capsys):
    assert cli.main([]) == 2
    assert "usage: lightrft COMMAND" in capsys.readouterr().err


def test_the_help_names_every_option_of_a_world(capsys):
    assert sim("--help") == 0
    shown = capsys.readouterr().out
    for option in ("--gpus-per-node", "--seed", "--schedule", "--rank-local", "--numerics", "--profile", "--cuda"):
        assert option in shown
    for option in (
        "--strict",
        "--check-determinism",
        "--tag-output",
        "--no-report",
        "--trace",
        "--flight-record",
        "-m MODULE",
    ):
        assert option in shown


def test_the_choices_are_those_of_the_simulator():
    assert tuple(ORDERS) == cli.NUMERICS
    assert tuple(PROFILES) == cli.PROFILES


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "the number of ranks is missing: give it before the script, as in lightrft sim -n 8 script.py"),
        ("script.py -n 8", "the number of ranks is missing"),
        ("-n 8", "the script to run is missing"),
        ("-n", "argument -n/--ranks: expected one argument"),
        ("-n 0 script.py", "'0' is no number of at least 1"),
        ("-n script.py", "'script.py' is no number of at least 1"),
        ("-n 8 --gpus-per-node -1 script.py", "'-1' is no number of at least 1"),
        ("-n 8 --seed x script.py", "'x' is no whole number"),
        ("-n 8 missing.py", "there is no file 'missing.py'"),
        ("-n 8 script", "there is no file 'script'; to run a module, write -m before its name"),
        ("-n 8 .", "'.' is a folder: expected a Python file"),
        ("-n 8 --schedule lifo script.py", "invalid choice: 'lifo'"),
        ("-n 8 --schedul random script.py", "there is no option --schedul (did you mean --schedule?)"),
        ("-n 8 --lr 3 script.py", "there is no option --lr; options of the script come after the script"),
        ("--nproc_per_node 8 script.py", "-n gives the number of all ranks"),
        ("-n 8 -m", "-m needs the name of a module"),
        ("-n 8 -m script.py", "'script.py' is that of a file: leave out -m"),
        ("-n 8 -m no/module", "'no/module' is none"),
        ("-n 8 -m no_such_module.x", "there is no module 'no_such_module' in"),
        ("-n 8 --rank-local no_such_module script.py", "--rank-local: there is no module 'no_such_module' in"),
        ("-n 8 --flight-record script.py/record/ script.py", "script.py' is no folder"),
    ],
)
def test_a_command_line_that_cannot_work_is_one_line_that_says_why(script, capsys, line, complaint):
    script("raise SystemExit('this must not run')")
    assert sim(*line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("lightrft sim: error: ")
    assert complaint in captured.err


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    assert cli.main(["sin", "-n", "8"]) == 2
    assert capsys.readouterr().err == (
        "lightrft: error: there is no command 'sin': expected sim (help: lightrft --help)\n"
    )


def test_options_reach_the_world(script, capsys):
    for module in "abc":
        script("", f"options_{module}.py")
    name = script("""
        import options_a, options_b, options_c
        import os
        import torch
        from lightrft.sim.current import current_task
        world = current_task().rank.world
        if world.ranks[0] is current_task().rank:
            print(world.size, world.gpus_per_node, world.seed, world.schedule, world.numerics, world.profile)
            print(world.cuda, world.strict, world.rank_local, os.environ["LOCAL_WORLD_SIZE"], torch.cuda.is_available())
    """)
    options = "-n3 --gpus-per-node=2 --seed -7 --schedule random --numerics tree --profile gloo --cuda --strict"
    assert sim(*options.split(), "--rank-local", "options_a,options_b", "--rank-local", "options_c", "--", name) == 0
    assert capsys.readouterr().out == (
        "3 2 -7 random tree gloo\nTrue True ['options_a', 'options_b', 'options_c'] 2 True\n"
    )


# -- a script is what python script.py would run ----------------------------------------------------------------------


def test_each_rank_has_a_main_module_of_its_own(script, capsys):
    name = script(
        GROUP
        + """
import os, sys
mine = rank
main = sys.modules["__main__"]
assert __name__ == "__main__" and vars(main) is globals()
dist.barrier()
assert mine == rank == int(os.environ["RANK"])
import __main__
assert __main__ is main is sys.modules["__main__"] and main.mine == rank
assert __spec__ is None and __package__ is None and __file__ == os.path.abspath("script.py")
print(rank, sys.argv, sys.path[0] == os.getcwd(), flush=True)
"""
        + LEAVE
    )
    assert sim("-n", "2", name, "-n", "3", "--seed", "x", "--", "-m", "--help") == 0
    lines = sorted(capsys.readouterr().out.splitlines())
    arguments = "['script.py', '-n', '3', '--seed', 'x', '--', '-m', '--help']"
    assert lines == [f"0 {arguments} True", f"1 {arguments} True"]


def test_nothing_of_the_script_is_left_in_the_process(script):
    name = script("import sys\nsys.argv.append('x'); sys.path.insert(0, 'x')\nsys.stdout = None")
    before = sys.argv, list(sys.argv), sys.path, list(sys.path), sys.stdout, sys.stderr, sys.modules["__main__"]
    assert sim("-n", "2", "--tag-output", name) == 0
    after = sys.argv, list(sys.argv), sys.path, list(sys.path), sys.stdout, sys.stderr, sys.modules["__main__"]
    assert after == before
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("rank")] == []


def test_success_prints_nothing_of_ours_without_the_report(script, capsys):
    assert sim_without_report("-n", "2", script(GROUP + LEAVE)) == 0
    assert capsys.readouterr() == ("", "")


def test_objects_of_the_script_travel_between_ranks(script, capsys):
    name = script(
        GROUP
        + """
import dataclasses, inspect, pickle, typing

@dataclasses.dataclass
class Sample:
    rank: int
    text: "typing.ClassVar[str]" = "x"

def double(value):
    return 2 * value

found = [None] * 3
dist.all_gather_object(found, Sample(rank))
assert [type(sample) for sample in found] == [Sample] * 3, found
assert [sample.rank for sample in found] == [0, 1, 2]
assert pickle.loads(pickle.dumps(double)) is double
assert "rank: int" in inspect.getsource(Sample) and "2 * value" in inspect.getsource(double)
assert typing.get_type_hints(Sample)["rank"] is int
"""
        + LEAVE
    )
    assert sim("-n", "3", name) == 0, capsys.readouterr().err


def test_processes_that_a_rank_forks_know_its_main_module(script, capsys):
    name = script("""
        import multiprocessing, os, warnings
        warnings.simplefilter("ignore")

        class Answer:
            rank = os.environ["RANK"]

        def work(queue):
            queue.put((Answer(), Answer.rank))

        if __name__ == "__main__":
            fork = multiprocessing.get_context("fork")
            queue = fork.Queue()
            process = fork.Process(target=work, args=(queue,))
            process.start()
            answer, rank = queue.get()
            process.join()
            assert type(answer) is Answer and rank == os.environ["RANK"]
    """)
    assert sim("-n", "2", name) == 0, capsys.readouterr().err


def test_workers_of_a_data_loader_know_the_main_module_of_their_rank(script, capsys):
    name = script("""
        import os, warnings
        from torch.utils.data import DataLoader
        warnings.simplefilter("ignore")

        class Sample:
            rank = os.environ["RANK"]

        class Samples:
            def __len__(self):
                return 3

            def __getitem__(self, index):
                return Sample()

        for worker in (0, 1):
            samples = list(DataLoader(Samples(), batch_size=None, num_workers=worker))
            assert [type(sample) for sample in samples] == [Sample] * 3
            assert [sample.rank for sample in samples] == [os.environ["RANK"]] * 3
    """)
    assert sim("-n", "2", name) == 0, capsys.readouterr().err


def test_a_module_runs_as_python_dash_m_runs_it(script, capsys):
    script("print('package', __name__)", "package/__init__.py")
    script(
        """
        import os, sys
        from . import helper
        print(__name__, __package__, __spec__.name, sys.argv[1:], sys.path[0] == os.getcwd())
        assert sys.argv[0] == __file__ == os.path.join(os.getcwd(), "package", "train.py")
        assert sys.modules["__main__"].__dict__ is globals()
        """,
        "package/train.py",
    )
    script("", "package/helper.py")
    try:
        assert sim("-n", "2", "-m", "package.train", "--lr", "1") == 0
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "package"]:
            del sys.modules[name]
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["package package"] + 2 * ["__main__ package package.train ['--lr', '1'] True"]


def test_a_module_that_is_rank_local_runs_too(script, capsys):
    script("", "local_package/__init__.py")
    script("from local_package import state; state.seen.append(1); print(__name__, state.seen)", "local_package/run.py")
    script("seen = []", "local_package/state.py")
    assert sim("-n", "2", "--no-report", "--rank-local", "local_package", "-m", "local_package.run") == 0
    assert capsys.readouterr().out == "__main__ [1]\n" * 2


def test_a_package_runs_its_main(script, capsys):
    script("", "package_with_main/__init__.py")
    script("import sys; print(__spec__.name, sys.argv[1:])", "package_with_main/__main__.py")
    assert sim("-n", "1", "-mpackage_with_main", "a b") == 0
    assert capsys.readouterr().out == "package_with_main.__main__ ['a b']\n"


def test_a_missing_module_of_a_package_is_reported(script, capsys):
    script("", "package_without_main/__init__.py")
    assert sim("-n", "2", "-m", "package_without_main") == 1
    assert "ImportError: no module named 'package_without_main.__main__'" in capsys.readouterr().err


def test_rank_local_finds_a_module_beside_the_script(script, capsys):
    script("seen = []\ndef add(x): seen.append(x)", "beside_the_script.py")
    name = script(
        GROUP
        + """
import beside_the_script
beside_the_script.add(rank)
dist.barrier()
beside_the_script.add(rank)
assert beside_the_script.seen == [rank, rank]
"""
        + LEAVE,
    )
    assert sim_without_report("-n", "2", "--rank-local", "beside_the_script", name) == 0, capsys.readouterr().err
    assert capsys.readouterr().err == ""


# -- how a run ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["sys.exit()", "sys.exit(0)", "raise SystemExit", "exit_code = None"])
def test_a_rank_that_exits_with_status_0_has_succeeded(script, capsys, end):
    assert sim_without_report("-n", "2", script(f"import atexit, sys\natexit.register(print, 'bye')\n{end}")) == 0
    assert capsys.readouterr() == ("bye\nbye\n", "")


PARSER = "import argparse\nparser = argparse.ArgumentParser(prog='mine')\nparser.add_argument('--size', type=int)\n"


@pytest.mark.parametrize("more", [[], ["--schedule", "random"], ["--check-determinism"]], ids=str)
def test_a_mistake_in_the_flags_of_a_script_is_told_once(script, capsys, more):
    name = script(PARSER + "print(parser.parse_args().size)")
    assert sim("-n", "4", *more, name, "--size", "two") == 2
    assert capsys.readouterr() == (
        "",
        "usage: mine [-h] [--size SIZE]\nmine: error: argument --size: invalid int value: 'two'\n",
    )
    assert sim("-n", "4", *more, name, "--help") == 0
    out, error = capsys.readouterr()
    assert (out.count("usage: mine"), error) == (1, "")


def test_a_mistake_in_the_flags_of_one_rank_is_a_failure_of_that_rank(script, capsys):
    name = script(GROUP + PARSER + "parser.parse_args(['--size', 'two'] if rank else [])\ndist.barrier()")
    assert sim_without_report("-n", "2", name) == 1
    error = capsys.readouterr().err
    assert "rank 1 failed: SystemExit: 2" in error
    assert "rank 0  waits in barrier()" in error


@pytest.mark.parametrize("code", ["3", "'no data'", "True"])
def test_a_rank_that_exits_with_another_status_is_reported(script, capsys, code):
    name = script(GROUP + f"import sys\nif rank == 1:\n    sys.exit({code})\ndist.barrier()")
    assert sim_without_report("-n", "3", name) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"\nrank 1 failed: SystemExit: {code.strip(chr(39))}\n")
    assert "script.py:6" in error
    assert "ranks 0, 2  waits in barrier()" in error


def test_a_rank_local_module_that_nobody_imports_is_named(script, capsys):
    script("", "never_imported.py")
    assert sim("-n", "2", "--rank-local", "never_imported", script("")) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightrft sim: error: rank_local names 'never_imported', ")
    assert error.count("\n") == 1


def test_a_failing_rank_is_reported_once_and_without_our_source(script, capsys):
    name = script(GROUP + "if rank == 2:\n    raise ValueError('no good')\ndist.barrier()")
    assert sim("-n", "4", "--schedule", "random", "--seed", "3", name, "two words", "a'b") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("Traceback (most recent call last)") == 1
    assert captured.err.count("ValueError: no good") == 2  # the head of the report, and the end of the traceback
    assert f'File "{Path(name).absolute()}", line 5, in <module>' in captured.err
    assert "lightrft" + os.sep not in captured.err
    replay = "lightrft sim -n 4 --schedule random --seed 3 script.py 'two words' " + shlex.quote("a'b")
    assert captured.err.rstrip().endswith(f"seed 3; run it again with: {replay}")


def test_a_deadlock_names_the_rank_and_its_line(script, capsys):
    assert sim_without_report("-n", "4", script(GROUP + "if rank != 3:\n    dist.barrier()" + LEAVE)) == 1
    error = capsys.readouterr().err
    assert error.startswith("\ndeadlock: ")
    assert re.search(r"Look at rank 3 at script\.py:\d\.", error)
    assert "Traceback" not in error


def test_a_script_that_is_no_python_is_shown_as_python_shows_it(script, capsys):
    assert sim("-n", "2", script("x = 1\ndef f(:\n")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f'  File "{Path("script.py").absolute()}", line 2\n')
    assert "SyntaxError" in error
    assert "Traceback" not in error


def test_leftovers_are_a_warning_and_an_error_if_strict(script, capsys):
    name = script(GROUP + "print('done')")
    assert sim_without_report("-n", "2", name) == 0
    plain = capsys.readouterr()
    assert plain.out == "done\ndone\n"
    assert plain.err.startswith("lightrft: warning: the run ended")
    assert "ranks 0-1" in plain.err
    assert "world.py" not in plain.err
    assert sim_without_report("-n", "2", "--strict", name) == 1
    strict = capsys.readouterr().err
    assert strict.startswith("\nthe run ended")


def test_the_flight_record_is_written_on_success_and_on_failure(script, capsys):
    fine = script(GROUP + "dist.barrier()" + LEAVE)
    assert sim_without_report("-n", "2", "--flight-record", "fine_", fine) == 0
    assert capsys.readouterr() == ("", "")
    assert sim("-n", "2", "--flight-record", "new/folder/of_", fine) == 0
    stuck = script(GROUP + "if rank:\n    dist.barrier()" + LEAVE, "stuck.py")
    assert sim("-n", "2", "--flight-record", "stuck_", stuck) == 1
    assert capsys.readouterr().err.endswith("\nflight record: stuck_0 ... stuck_1\n")
    assert all(Path(name).stat().st_size for name in ("fine_0", "fine_1", "new/folder/of_1", "stuck_0", "stuck_1"))


def test_check_determinism_stops_at_what_differs(script, capsys):
    name = script(
        GROUP
        + """
import itertools, sys
import torch
runs = sys.__dict__.setdefault("lightrft_test_runs", itertools.count())
dist.all_reduce(torch.tensor(float(next(runs))))
"""
        + LEAVE
    )
    try:
        assert sim("-n", "1", "--check-determinism", name) == 1
    finally:
        vars(sys).pop("lightrft_test_runs", None)
    assert "Look at rank 0 at script.py:8" in capsys.readouterr().err


def test_inside_a_rank_the_command_is_refused(script, capsys):
    script("", "inner.py")
    name = script("from lightrft.cli import main\nimport sys\nsys.exit(main(['sim', '-n', '2', 'inner.py']))")
    assert sim("-n", "1", name) == 1
    assert "worlds cannot be nested" in capsys.readouterr().err


def test_ctrl_c_stops_waiting_and_working_ranks(script):
    name = script(
        GROUP
        + """
import sys, time
if rank == 3:
    print("ready", sys.path[0] == sys.path[1], sys.argv)
    while True:
        sum(range(1000))
dist.barrier()
"""
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightrft", "sim", "-n", "4", "--trace", "trace.json", name, "-v"]
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready False ['script.py', '-v']\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.startswith("\n4 ranks, 0 collectives, 0 messages, payload 0 B\n")
    assert error.endswith("\nlightrft: interrupted\n")
    assert '"rank 3"' in Path("trace.json").read_text()


def test_at_the_end_of_the_process_garbage_is_collected_and_exit_functions_run(script):
    name = script("""
        import atexit, os

        class Temporary:
            def __init__(self):
                self.itself = self

            def __del__(self):
                print("removed", os.environ.get("RANK"))

        Temporary()
        import wave  # what a rank imports is kept from the collector, and all that is there with it
        print("the script ends")
        atexit.register(print, "exit function")
        """)
    command = [sys.executable, "-m", "lightrft", "sim", "-n", "2", name]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.count("exit function") == 2
    assert done.stdout.count("removed") == 2


def test_the_collector_is_on_while_a_script_runs_in_a_process_of_its_own(script):
    name = script("import gc; print(gc.isenabled())")
    command = [sys.executable, "-m", "lightrft", "sim", "-n", "1", "--no-report", name]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == "True\n"


def test_the_replay_is_the_command_as_it_was_given(monkeypatch):
    words = ["-n", "2", "a b.py", "$x"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lightrft"])
    assert cli._command(words, own_process=True) == "lightrft sim -n 2 'a b.py' '$x'"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "lightrft" / "__main__.py")])
    assert cli._command(words, own_process=True) == "python -m lightrft sim -n 2 'a b.py' '$x'"


# -- tagged output ----------------------------------------------------------------------------------------------------


def test_tagged_lines_are_never_mixed(script, capsys):
    name = script(
        GROUP
        + """
import sys
print("one", end=" ")
dist.barrier()
print("line", rank)
sys.stderr.write("error ")
dist.barrier()
sys.stderr.writelines(["of ", f"{rank}\\n", "\\n"])
print("two\\nlines", end="", flush=True)
"""
        + LEAVE
    )
    assert sim_without_report("-n", "3", "--tag-output", name) == 0
    captured = capsys.readouterr()
    assert sorted(captured.out.splitlines()) == sorted(
        f"[rank {rank}] {text}" for rank in range(3) for text in (f"one line {rank}", "two", "lines")
    )
    assert sorted(captured.err.splitlines()) == sorted(
        f"[rank {rank}] {text}" for rank in range(3) for text in (f"error of {rank}", "")
    )
    assert captured.out.endswith("\n")


def test_a_line_without_an_end_is_written_when_its_rank_ends(script, capsys):
    name = script(GROUP + "print('last words of', rank, end='')\nif rank == 0:\n    dist.recv" + LEAVE)
    assert sim("-n", "2", "--tag-output", name) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["[rank 0] last words of 0", "[rank 1] last words of 1"]


def test_of_a_progress_bar_the_last_state_is_shown(script, capsys):
    name = script(r"""
        for percent in range(101):
            print(f"\r{percent}%", end="", flush=True)
        print()
        print("1 of 2\r2 of 2\r", end="")
        print("dos\r")
    """)
    assert sim("-n", "1", "--tag-output", name) == 0
    assert capsys.readouterr().out == "[rank 0] 100%\n[rank 0] dos\n"


def test_a_logger_that_ranks_share_and_their_threads_are_tagged_right(script, capsys):
    name = script(
        GROUP
        + """
import logging, sys, threading
dist.barrier()
log = logging.getLogger("test_cli_shared_logger")
if not log.handlers:
    log.addHandler(logging.StreamHandler())
    log.propagate = False
log.warning("log of %s", rank)
thread = threading.Thread(target=print, args=("thread of", rank))
thread.start()
thread.join()
assert sys.stdout.encoding and not sys.stdout.closed
"""
        + LEAVE
    )
    assert sim_without_report("-n", "2", "--tag-output", name) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert sorted(captured.err.splitlines()) == ["[rank 0] log of 0", "[rank 1] log of 1"]
    assert sorted(captured.out.splitlines()) == ["[rank 0] thread of 0", "[rank 1] thread of 1"]


def test_the_report_of_a_tagged_run_is_not_tagged(script, capsys):
    assert sim_without_report("-n", "2", "--tag-output", script("print('x', end='')\nraise ValueError('no')")) == 1
    captured = capsys.readouterr()
    assert captured.out == "[rank 0] x\n[rank 1] x\n"
    assert captured.err.startswith("\nranks 0-1 failed: ValueError: no\n")
