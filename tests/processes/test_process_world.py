"""``ProcessWorld``: functions on real processes, what comes back, and every way in which it can go wrong."""

import contextlib
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import lightrft
from lightrft.errors import CollectiveTimeoutError, ConfigError, RankFailedError, SimulationError
from lightrft.sim import ProcessWorld, SimWorld, process_rendezvous

pytestmark = pytest.mark.processes

ROOT = Path(lightrft.__file__).parents[1]
SOON = 3.0
"""Seconds within which a failure must be reported; it takes half a second on a quiet machine."""


@dataclass
class Point:
    x: int


class OddError(Exception):
    """Its ``__init__`` does not take what it passes on, so that plain pickle cannot load it."""

    def __init__(self, code, detail):
        super().__init__(f"code {code}: {detail}")
        self.code = code


class PrefixError(Exception):
    """Its ``__init__`` called again, as plain pickle does, would give another message."""

    def __init__(self, name):
        super().__init__(f"bad {name}")


class LockedError(Exception):
    def __init__(self):
        super().__init__("has a lock")
        self.lock = threading.Lock()


def rank():
    return int(os.environ["RANK"])


def init():
    dist.init_process_group("gloo")
    return dist.get_rank()


def total(number):
    init()
    tensor = torch.tensor(number * dist.get_rank())
    dist.all_reduce(tensor)
    dist.destroy_process_group()
    return tensor


def fails(world, function, kind=RankFailedError):
    """The error of a run; the world must work afterwards, and the error come soon."""
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        world.run(function)
    assert time.monotonic() - started < SOON + (world.limit if kind is CollectiveTimeoutError else 0)
    assert world.run(rank) == list(range(world.size))
    return caught.value


def rows(error):
    return {row.ranks: (row.what, row.place.function) for row in error.report.rows}


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def script(source, *args, **environ):
    """A Python script in a process of its own, where no pytest keeps the pool."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    command = [sys.executable, "-c", textwrap.dedent(source), *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="session", autouse=True)
def started():
    """The process that ranks are forks of loads torch once, which no test should wait for."""
    ProcessWorld(1).run(rank)


# -- what runs --------------------------------------------------------------------------------------------------------


def test_results_come_back_by_rank():
    world = ProcessWorld(3)
    assert world.run(total, 2.0) == [torch.tensor(6.0)] * 3
    assert world.run(total, number=1) == [torch.tensor(3)] * 3


def test_the_environment_is_that_of_torchrun():
    def look():
        assert not dist.is_initialized()
        names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR"]
        return [os.environ[name] for name in names], os.environ["MASTER_PORT"]

    found, ports = zip(*ProcessWorld(3, gpus_per_node=2).run(look), strict=True)
    assert list(found) == [
        ["0", "0", "3", "2", "0", "127.0.0.1"],
        ["1", "1", "3", "2", "0", "127.0.0.1"],
        ["2", "0", "3", "1", "1", "127.0.0.1"],
    ]
    assert len(set(ports)) == 1
    assert found == tuple(found for found, _ in SimWorld(3, gpus_per_node=2).run(look))


def test_generators_are_seeded_as_those_of_simulated_ranks():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert ProcessWorld(2, seed=5).run(draw) == SimWorld(2, seed=5).run(draw)


def test_a_process_group_can_be_made_again(tmp_path):
    def twice():
        first = total(1)
        (tmp_path / str(rank())).touch()
        while len(list(tmp_path.iterdir())) < 2:  # else a rank may meet the store of the first group, which is closing
            time.sleep(0.01)
        return [first, total(2)]

    assert ProcessWorld(2).run(twice) == [[1, 2]] * 2


def test_every_kind_of_function_can_run():
    offset = 10

    class Adder:
        def __call__(self, number):
            return number + offset + rank()

    world = ProcessWorld(2)
    assert world.run(lambda number: number + offset, 1) == [11, 11]
    assert world.run(functools.partial(Adder(), 5)) == [15, 16]
    assert world.run(lambda: torch.ops.aten.add(torch.tensor(1), rank()).item()) == [1, 2]
    assert world.run(max, [1, 3, 2]) == [3, 3]


def test_classes_of_the_test_are_the_same_on_both_sides():
    point = Point(3)
    assert ProcessWorld(2).run(lambda given: (given == Point(3), Point(rank())), point) == [
        (True, Point(0)),
        (True, Point(1)),
    ]


def test_every_run_starts_clean():
    def look(name):
        before = name in os.environ, torch.get_default_dtype(), len(left), dist.is_initialized()
        os.environ[name] = "1"
        torch.set_default_dtype(torch.float64)
        left.append(1)
        init()
        return before

    left = []
    world = ProcessWorld(2)
    for _ in range(2):
        assert world.run(look, "LIGHTRFT_TEST_LEFT") == [(False, torch.float32, 0, False)] * 2
    assert left == []
    assert "LIGHTRFT_TEST_LEFT" not in os.environ


def test_ranks_see_this_process_as_it_is_now(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTRFT_TEST_NEW", "new")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr"])
    (tmp_path / "reads_rank.py").write_text("import os\nRANK = os.environ['RANK']\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def look():
        import reads_rank

        return os.environ["LIGHTRFT_TEST_NEW"], os.getcwd(), sys.argv, reads_rank.RANK

    for _ in range(2):  # a module of the user is not kept for the second run
        expected = ("new", str(tmp_path), ["train.py", "--lr"])
        assert ProcessWorld(2).run(look) == [(*expected, "0"), (*expected, "1")]


def test_libraries_that_ranks_load_are_there_for_the_next_run():
    def load():
        before = "wave" in sys.modules
        import wave

        return before and wave.__name__ == "wave"

    world = ProcessWorld(2)
    world.run(load)
    assert world.run(load) == [True, True]


def test_warning_filters_hold_on_ranks():
    def warn():
        import warnings

        warnings.warn("careful", UserWarning, stacklevel=1)

    assert isinstance(fails(ProcessWorld(1), warn).__cause__, UserWarning)  # an error, as everywhere in these tests


def test_sys_exit_without_a_status_is_an_ordinary_end():
    assert ProcessWorld(2).run(sys.exit) == [None, None]
    assert fails(ProcessWorld(2), lambda: sys.exit(3)).__cause__.code == 3


def test_large_tensors_travel():
    tensor = torch.arange(4_000_000)
    (doubled,) = ProcessWorld(1).run(lambda given: given * 2, tensor)
    assert torch.equal(doubled, tensor * 2)


def test_the_port_of_the_store_is_nobody_elses():
    def bind_and_init():
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        return init()

    assert ProcessWorld(2).run(bind_and_init) == [0, 1]


# -- what ranks print -------------------------------------------------------------------------------------------------


def speak():
    sys.stdout.write(f"printed {rank()}\n")
    os.write(2, b"written\n")
    subprocess.run(["echo", "child"], check=True)


@pytest.mark.parametrize("capture", ["capsys", "capfd"])
def test_what_ranks_print_is_passed_on(request, capture):
    capture = request.getfixturevalue(capture)
    ProcessWorld(2).run(speak)
    out, err = capture.readouterr()
    assert sorted(out.splitlines()) == ["child", "child", "printed 0", "printed 1"]
    assert err == "written\n" * 2


def test_lines_are_tagged_when_asked(capsys):
    def speak_and_register():
        import atexit

        speak()
        atexit.register(print, "end", end="")

    ProcessWorld(2, tagged=True).run(speak_and_register)
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == [
        f"[rank {n}] {what}" for n in (0, 1) for what in ("child", "end", f"printed {n}")
    ]
    assert sorted(err.splitlines()) == ["[rank 0] written", "[rank 1] written"]


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_exception_is_reported_with_its_traceback_and_where_the_others_were():
    def diverge():
        if init() == 2:
            raise ValueError("too large")
        dist.barrier()

    error = fails(ProcessWorld(3), diverge)
    assert isinstance(error.__cause__, ValueError)
    assert error.__cause__.__traceback__.tb_frame.f_code.co_name == "diverge"
    head, _, rest = str(error).partition("\n\n")
    assert head == "rank 2 failed: ValueError: too large"
    assert rest.startswith("rank 2:\nTraceback (most recent call last):\n  File")
    assert "raise ValueError(" in rest
    assert "stack of ranks 0-1 (most recent call last):" in rest
    assert rows(error) == {(0, 1): ("is in barrier()", "diverge"), (2,): ("raised ValueError", "diverge")}
    assert [culprit.rank for culprit in error.report.culprits] == [2]


def test_ranks_that_raise_the_same_are_reported_together():
    def divide():
        time.sleep(0.05 * rank())
        return 1 / (rank() % 2)

    error = fails(ProcessWorld(3), divide)
    assert str(error).startswith("ranks 0, 2 failed: ZeroDivisionError: division by zero\n\nranks 0, 2:\nTraceback")
    assert rows(error)[1,] == ("has returned", "?")


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: OddError(3, "odd"), OddError, "code 3: odd"),
        (lambda: PrefixError("name"), PrefixError, "bad name"),
        (lambda: OSError(2, "No such file", "x"), FileNotFoundError, "[Errno 2] No such file: 'x'"),
        (LockedError, RuntimeError, "LockedError: has a lock"),
    ],
)
def test_exceptions_come_back_as_they_are_or_else_by_name(make, kind, text):
    def raise_it():
        raise make() from KeyError("first")

    error = fails(ProcessWorld(1), raise_it)
    assert type(error.__cause__) is kind
    assert str(error.__cause__) == text
    assert repr(error.__cause__.__cause__) == "KeyError('first')"
    assert "direct cause" in str(error)
    assert getattr(error.__cause__, "code", 3) == 3


@pytest.mark.parametrize(
    ("die", "how"),
    [
        (lambda: os._exit(3), "left with exit status 3"),
        (lambda: os._exit(0), "left with exit status 0"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "died of SIGKILL"),
    ],
)
def test_the_death_of_a_rank_is_reported(die, how):
    def diverge():
        if init() == 1:
            die()
        dist.barrier()

    error = fails(ProcessWorld(3), diverge)
    assert str(error).startswith(f"rank 1 {how}\n\n")
    assert rows(error)[1,] == (how, "?")
    assert [culprit.rank for culprit in error.report.culprits] == [1]
    assert error.__cause__ is None


def test_a_segmentation_fault_is_reported_with_its_line():
    def crash():
        import ctypes
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if init():
            ctypes.string_at(0)
        dist.barrier()

    error = fails(ProcessWorld(2), crash)
    assert str(error).startswith("rank 1 died of SIGSEGV\n\n")
    assert rows(error)[1,] == ("died of SIGSEGV, in string_at()", "crash")


def test_a_death_after_the_return_is_a_failure():
    def die_late():
        import atexit

        if rank():
            atexit.register(os._exit, 4)

    error = fails(ProcessWorld(2), die_late)
    assert str(error).startswith("rank 1 left with exit status 4 after the function had returned")


def test_a_hang_ends_at_the_limit_and_shows_every_stack():
    def hang():
        if init() == 1:
            threading.Event().wait()
        dist.barrier()

    error = fails(ProcessWorld(3, limit=1.5), hang, CollectiveTimeoutError)
    assert isinstance(error, TimeoutError)
    assert str(error).startswith("timeout: the run did not end within 1.5 s. Look at rank 1 at ")
    assert rows(error) == {(0, 2): ("is in barrier()", "hang"), (1,): ("is in wait()", "hang")}
    assert "stack of ranks 0, 2 (most recent call last):" in str(error)
    assert "stack of rank 1 (most recent call last):" in str(error)


def test_a_rank_that_returns_too_early_is_seen_by_the_others_as_on_a_cluster():
    def leave():
        if init():
            dist.barrier()

    error = fails(ProcessWorld(2), leave)
    assert str(error).startswith("rank 1 failed: RuntimeError: ")
    assert rows(error)[0,] == ("has returned", "?")


def test_a_loop_in_c_that_holds_the_interpreter_is_ended_too():
    error = fails(ProcessWorld(1, limit=0.5), lambda: sum(range(10**12)), CollectiveTimeoutError)
    assert rows(error)[0,] == ("runs", "<lambda>")


def test_a_thread_that_never_ends_keeps_its_rank():
    def leave_a_thread():
        if rank():
            threading.Thread(target=threading.Event().wait).start()

    error = fails(ProcessWorld(2, limit=0.5), leave_a_thread, CollectiveTimeoutError)
    assert rows(error)[0,] == ("has returned", "?")
    assert rows(error)[1,] == ("has returned, and runs", "_shutdown")
    assert [culprit.rank for culprit in error.report.culprits] == [1]


def test_a_rank_that_is_stopped_is_ended_too():
    error = fails(ProcessWorld(1, limit=0.3), lambda: os.kill(os.getpid(), signal.SIGSTOP), CollectiveTimeoutError)
    assert rows(error)[0,] == ("does not answer", "?")


def test_nothing_that_a_rank_started_outlives_the_run(tmp_path):
    def start():
        for index in range(2):
            child = subprocess.Popen(["sleep", "1000"], start_new_session=bool(index))
            (tmp_path / f"{child.pid}").write_text("")

    ProcessWorld(2).run(start)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 4
    assert not any(map(is_alive, pids))


def test_an_interrupt_ends_all_ranks(tmp_path):
    def hang():
        (tmp_path / str(os.getpid())).write_text("")
        threading.Event().wait()

    def interrupt():
        with contextlib.suppress(AssertionError):
            wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    world = ProcessWorld(2)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        world.run(hang)
    thread.join()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(map(is_alive, pids))
    assert world.run(rank) == [0, 1]


def test_when_the_process_that_starts_ranks_dies_the_next_run_starts_another(tmp_path):
    def kill_it():
        (tmp_path / str(os.getpid())).write_text("")
        dist.init_process_group("gloo")
        dist.barrier()
        os.kill(os.getppid(), signal.SIGKILL)
        threading.Event().wait()

    world = ProcessWorld(2)
    with pytest.raises(SimulationError, match="the process that starts ranks has died"):
        world.run(kill_it)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_alive, pids)))
    assert world.run(rank) == [0, 1]


# -- what cannot work -------------------------------------------------------------------------------------------------


def test_what_cannot_be_sent_is_named():
    world = ProcessWorld(2)
    lock = threading.Lock()
    with pytest.raises(SimulationError, match=r"argument 1 \(_thread.lock\) cannot be sent to the ranks"):
        world.run(print, 1, lock)
    with pytest.raises(SimulationError, match=r"argument 'end' \(_thread.lock\) cannot be sent"):
        world.run(print, end=lock)
    with pytest.raises(SimulationError, match=r"the function \(builtins.function\) cannot be sent"):
        world.run(lambda: lock)


def test_what_cannot_come_back_is_named():
    error = fails(ProcessWorld(2), lambda: threading.Lock() if rank() else None)
    assert isinstance(error.__cause__, TypeError)
    assert "rank 1 returned a _thread.lock, which cannot be pickled" in str(error)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"size": 0}, "size=0: expected the number of ranks, at least 1"),
        ({"backend": "mpi"}, "backend='mpi' is unknown: expected one of gloo, nccl"),
        ({"gpus_per_node": 0}, "gpus_per_node=0: expected a number of at least 1"),
        ({"limit": 0}, "limit=0: expected a number of seconds above 0"),
        ({"schedule": "random"}, "schedule is for simulated ranks only: real processes run as they do."),
        ({"check_determinism": True}, "check_determinism is for simulated ranks only"),
        ({"seeds": 3}, "unknown argument 'seeds': expected one of backend, gpus_per_node, seed, limit, tagged"),
        ({"size": 10_000, "gpus_per_node": 10_000, "backend": "nccl"}, "backend='nccl': 10000 ranks of a node need 10"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, complaint):
    with pytest.raises(ConfigError) as caught:
        ProcessWorld(**{"size": 2, **options})
    assert str(caught.value).startswith(complaint)


def test_a_closed_world_runs_nothing():
    world = ProcessWorld(2)
    with world:
        assert world.run(rank) == [0, 1]
    world.close()
    with pytest.raises(SimulationError, match="this ProcessWorld is closed"):
        world.run(rank)


def test_a_simulated_rank_starts_no_processes():
    with pytest.raises(RankFailedError, match="ProcessWorld.run was called inside a simulated rank"):
        SimWorld(1).run(lambda: ProcessWorld(1).run(rank))


# -- what is left -----------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_world_that_is_closed():
    source = """
        import os, torch
        from lightrft.sim import ProcessWorld

        def left():
            pid = os.getpid()
            children = open(f"/proc/{pid}/task/{pid}/children").read()
            files = {os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir("/proc/self/fd")[:-1]}
            return children, len(os.listdir("/proc/self/task")), sorted(files)

        def body():
            return os.getpid()

        before = left()
        with ProcessWorld(2) as world, ProcessWorld(3) as other:
            world.run(body)
            world.close()
            assert left()[0], "the other world still needs the process"
            other.run(body)
        after = left()
        assert after == before, (before, after)
        print("nothing", ProcessWorld(1).run(lambda: 1))
    """
    process = script(source)
    assert process.communicate(timeout=60) == ("nothing [1]\n", "")
    assert process.returncode == 0


def test_when_this_process_is_killed_all_ranks_die():
    source = """
        import os, time
        from lightrft.sim import ProcessWorld

        def body():
            print(os.getppid(), os.getpid(), flush=True)
            time.sleep(1000)

        import sys
        sys.stdout.reconfigure(line_buffering=True)
        ProcessWorld(2).run(body)
    """
    process = script(source)
    pids = {int(pid) for _ in range(2) for pid in process.stdout.readline().split()}
    assert len(pids) == 3
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not any(map(is_alive, pids)))


def test_a_rank_looks_for_the_store_of_rank_0_until_it_is_there(monkeypatch):
    """Torch would try half a second later, and half of all groups of 8 would take four times as long."""
    made = threading.Event()
    create = process_rendezvous.patient(lambda *_: made.set())
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        host, port = server.getsockname()
        waiting = threading.Thread(target=create, args=(host, port, 1, 2, timedelta(seconds=60)))
        waiting.start()
        assert not made.wait(0.1)
        server.listen()
        assert made.wait(30)
        waiting.join()

    def body():
        return sys.modules["torch.distributed.rendezvous"]._create_c10d_store.__module__, os.environ["RES_OPTIONS"]

    monkeypatch.delenv("RES_OPTIONS", raising=False)
    assert ProcessWorld(1).run(body) == [(process_rendezvous.__name__, "timeout:1 attempts:1")]


def test_simulated_ranks_in_a_real_process_have_a_store_of_their_own():
    def group():
        dist.init_process_group("gloo")
        dist.barrier()
        dist.destroy_process_group()

    assert ProcessWorld(1, limit=20).run(lambda: SimWorld(2).run(group)) == [[None, None]]


def test_libraries_of_data_are_loaded_once_for_all_runs():
    """pyarrow would start a thread, and with it pandas, datasets and transformers would be left to every rank."""

    def body():
        before = "datasets" in sys.modules
        import datasets  # noqa: F401 - it loads pyarrow and pandas

        return before

    with ProcessWorld(1) as world:
        world.run(body)
        assert world.run(body) == [True]


def test_a_library_that_starts_a_thread_is_left_to_the_ranks(tmp_path):
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    source = """
        import os, sys
        from lightrft.sim import ProcessWorld

        def body():
            before = "threaded" in sys.modules, "wave" in sys.modules, len(os.listdir("/proc/self/task"))
            import threaded, wave
            return before

        world = ProcessWorld(1)
        print([world.run(body) for _ in range(3)])
    """
    process = script(source, PYTHONPATH=f"{ROOT}{os.pathsep}{site}")
    out, err = process.communicate(timeout=60)
    assert err == ""
    assert out == "[[(False, False, 1)], [(False, True, 1)], [(False, True, 1)]]\n"
