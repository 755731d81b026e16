"""``world.write_trace()`` and ``lightrft sim --trace``: a run in the Trace Event Format."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightrft import cli
from lightrft.errors import CollectiveTimeoutError, DeadlockError
from lightrft.sim import SimWorld


def session(body, backend="gloo"):
    def run():
        dist.init_process_group(backend)
        body(dist.get_rank())
        dist.destroy_process_group()

    return run


@pytest.fixture
def traced(tmp_path):
    """Runs a function on ranks and reads the trace, of which it checks what is true of every trace."""

    def run(body, ranks=2, error=None, **settings):
        world = SimWorld(ranks, **settings)
        if error is None:
            world.run(session(body))
        else:
            with pytest.raises(error):
                world.run(session(body))
        world.write_trace(tmp_path / "trace.json")
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        check(events, world)
        return [event for event in events if event["ph"] != "M"]

    return run


def check(events, world):
    """Rows have names, begins have ends, slices of a row do not overlap, arrows end in slices; no call is missing."""
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    marks = [event for event in events if event["ph"] != "M"]
    assert {(event["pid"], event["tid"]) for event in marks} <= named
    slices = [event for event in marks if event["ph"] == "X"]
    times = [event["ts"] for event in slices]
    assert times == sorted(times)
    free = defaultdict(float)
    for event in slices:
        row = event["pid"], event["tid"]
        assert event["dur"] > 0
        assert event["ts"] >= free[row], "slices of one row overlap"
        free[row] = event["ts"] + event["dur"]
    calls = [event for event in slices if not event["name"].startswith("wait ")]
    assert [(event["pid"] - 10_000, event["args"]["sequence"]) for event in calls] == [
        (event.rank, event.sequence) for event in world.trace
    ]
    for begin, end in (("b", "e"), ("s", "f")):
        begins = {event["id"]: event for event in marks if event["ph"] == begin}
        ends = {event["id"]: event for event in marks if event["ph"] == end}
        assert begins.keys() == ends.keys()
        assert len(begins) + len(ends) == len([event for event in marks if event["ph"] in (begin, end)])
        assert all(begins[key]["ts"] <= ends[key]["ts"] for key in begins)
    for arrow in (event for event in marks if event["ph"] in ("s", "f")):
        assert slice_at(slices, arrow) is not None, "an arrow ends at no slice"


def slice_at(slices, mark):
    row = mark["pid"], mark["tid"]
    at = (e for e in slices if (e["pid"], e["tid"]) == row and e["ts"] <= mark["ts"] < e["ts"] + e["dur"])
    return next(at, None)


def shown(events, phase="X"):
    """Name, rank, begin and end of the slices, in microseconds."""
    return [
        (event["name"], event["pid"] - 10_000, event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["ph"] == phase
    ]


def everything(rank):
    """Every kind of slice that there is."""
    dist.barrier()
    first = dist.all_reduce(torch.ones(4), async_op=True)
    time.sleep(0.25 * rank)
    other = dist.new_group([1, 2])
    if rank in (1, 2):
        dist.broadcast(torch.ones(2), 1, group=other)
    if rank == 0:
        sends = [dist.isend(torch.ones(peer), peer, tag=peer) for peer in (1, 2)]
        thread = threading.Thread(target=dist.recv, args=(torch.ones(5), 2), kwargs={"tag": 7}, name=f"{time.time()}")
        thread.start()
        dist.all_reduce(torch.ones(1))
        for send in sends:
            send.wait()
        thread.join()
    else:
        dist.recv(torch.ones(rank), 0, tag=rank)
        dist.all_reduce(torch.ones(1))
        if rank == 2:
            dist.send(torch.ones(5), 0, tag=7)
    first.wait()
    dist.monitored_barrier(timeout=timedelta(seconds=5))
    dist.all_gather_object([None] * 3, rank)


# -- what a trace shows -----------------------------------------------------------------------------------------------


def test_a_collective_lasts_until_the_last_rank_has_come(traced):
    def body(rank):
        time.sleep(0.5 * rank)
        dist.all_reduce(torch.ones(4, 8))

    events = traced(body, 3)
    slices = shown(events)
    assert [name for name, *_ in slices] == ["all_reduce"] * 3
    ranks, begins, ends = zip(*(rest for _, *rest in slices), strict=True)
    assert ranks == (0, 1, 2)
    assert len(set(ends)) == 1
    # 1 us for each call before, beside virtual time
    assert [begin - begins[0] for begin in begins] == pytest.approx([0, 500_001, 1_000_002], abs=100)
    assert ends[2] == begins[2] + 1


def test_a_slice_tells_what_the_call_was(traced):
    def body(rank):
        dist.all_gather([torch.ones(4, 8) for _ in range(2)], torch.ones(4, 8))

    arguments = traced(body)[1]["args"]
    line = body.__code__.co_firstlineno + 1
    assert arguments.pop("line").endswith(f"test_trace_file.py:{line} in body")
    assert arguments.pop("virtual time of the call (us)") >= 0
    assert arguments == {
        "call": "all_gather(float32[4, 8]) on the default group, #1",
        "group": "the default group",
        "sequence": 1,
        "shape": "[4, 8]",
        "dtype": "float32",
        "bytes": 2 * 4 * 8 * 4,
    }


def test_an_asynchronous_call_spans_from_the_call_to_the_end_of_the_wait(traced):
    def body(rank):
        work = dist.all_reduce(torch.ones(4), async_op=True)
        dist.barrier()
        work.wait()

    events = traced(body, 1)
    (issued, barrier, wait) = shown(events)
    assert [issued[0], barrier[0], wait[0]] == ["all_reduce", "barrier", "wait all_reduce"]
    assert issued[3] == issued[2] + 1 == barrier[2] == wait[2] - 1
    begin, end = (event for event in events if event["ph"] in "be")
    assert (begin["ts"], end["ts"], begin["name"]) == (issued[2], wait[3], "all_reduce")


def test_a_wait_that_follows_at_once_is_no_slice_of_its_own(traced):
    def body(rank):
        if rank:
            dist.recv(torch.ones(4), 0)
        else:
            dist.send(torch.ones(4), 1)

    events = traced(body)
    assert sorted((name, rank) for name, rank, *_ in shown(events)) == [("recv", 1), ("send", 0)]
    assert not [event for event in events if event["ph"] in "be"]
    start, finish = (event for event in events if event["ph"] in "sf")
    assert (start["pid"], finish["pid"], finish["bp"]) == (10_000, 10_001, "e")


def test_what_never_returns_lasts_until_the_end(traced):
    def body(rank):
        dist.all_reduce(torch.ones(1), async_op=True)
        if rank == 0:
            dist.recv(torch.ones(4), 1)
        elif rank == 1:
            time.sleep(3)
            dist.barrier()
        else:
            time.sleep(4)

    events = traced(body, 3, DeadlockError)
    slices = {(name, rank): (begin, end) for name, rank, begin, end in shown(events)}
    stuck = slices["recv (never returned)", 0], slices["barrier (never returned)", 1]
    assert stuck[0][1] == stuck[1][1] == max(end for _, end in slices.values()) > 4_000_000
    assert [event["ts"] for event in events if event["ph"] == "e"] == [stuck[0][1]] * 3


def test_a_wait_that_gave_up_ends_there(traced):
    def body(rank):
        work = dist.barrier(async_op=True) if rank == 0 else None
        if rank == 0:
            for _ in range(2):
                with pytest.raises(CollectiveTimeoutError):
                    work.wait(timedelta(seconds=1))
            dist.send(torch.ones(1), 1)
            work.wait()
        else:
            dist.recv(torch.ones(1), 0)
            dist.barrier()

    names = [name for name, rank, *_ in shown(traced(body)) if rank == 0]
    assert names == ["barrier", "wait barrier", "wait barrier", "send", "wait barrier"]


def test_a_barrier_that_gives_up_ends_there(traced):
    def body(rank):
        if rank == 0:
            with pytest.raises(RuntimeError, match="failed to pass monitoredBarrier"):
                dist.monitored_barrier(timeout=timedelta(seconds=2))
            dist.send(torch.ones(1), 1)
        else:
            dist.recv(torch.ones(1), 0)

    (barrier, *_) = (event for event in shown(traced(body)) if event[0] == "monitored_barrier")
    assert barrier[3] - barrier[2] == pytest.approx(2_000_000, abs=100)


def test_threads_of_a_rank_have_rows_of_their_own(traced):
    events = traced(everything, 3)
    assert {event["tid"] for event in events if event["pid"] == 10_000} == {10_000, 1_010_000}
    assert [event["name"] for event in events if event["tid"] == 1_010_000 and event["ph"] == "X"] == ["recv"]


def test_ranks_that_disagree_are_shown(traced):
    def body(rank):
        dist.all_reduce(torch.ones(4))
        dist.all_reduce(torch.ones(4 + rank))

    names = [name for name, *_ in shown(traced(body, error=Exception))]
    assert names == ["all_reduce"] * 2 + ["all_reduce (never returned)"] * 2


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"schedule": "random", "seed": 5}])
def test_one_seed_gives_one_file_byte_for_byte(tmp_path, traced, settings):
    files = []
    for _ in range(2):
        events = traced(everything, 3, **settings)
        files.append((tmp_path / "trace.json").read_bytes())
        assert {event["ph"] for event in events} == set("Xbesf")
    assert files[0] == files[1]


def test_two_seeds_of_a_random_schedule_give_two_files(tmp_path, traced):
    files = []
    for seed in (1, 2):
        traced(everything, 3, schedule="random", seed=seed)
        files.append((tmp_path / "trace.json").read_bytes().replace(f'"seed": {seed}'.encode(), b""))
    assert files[0] != files[1]


def test_a_world_without_calls_has_rows_and_says_what_its_axis_is(tmp_path):
    world = SimWorld(2, seed=4)
    for _ in range(2):
        world.write_trace(tmp_path / "trace.json")
        trace = json.loads((tmp_path / "trace.json").read_text())
        names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
        assert names == ["rank 0", "rank 1"]
        assert trace["otherData"] == {
            "axis": "virtual time plus 1 us for each call or wait that any rank has begun before",
            "ranks": 2,
            "seed": 4,
            "schedule": "fifo",
        }
        world.run(lambda: None)


def test_1024_ranks_are_written(traced):
    events = traced(lambda rank: dist.barrier(), 1024)
    assert len(events) == 1024


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(body):
        begin = "import os, pathlib, torch.distributed as dist\npathlib.Path('ran').touch()"
        group = "dist.init_process_group('gloo')"
        (tmp_path / "script.py").write_text(f"{begin}\n{group}\n{body}\ndist.destroy_process_group()")
        return "script.py"

    return write


def test_the_command_writes_the_trace_where_it_was_told_to(script, capsys):
    name = script("os.makedirs('elsewhere', exist_ok=True)\nos.chdir('elsewhere')\ndist.barrier()")
    assert cli.main(["sim", "-n", "2", "--trace", "trace.json", name]) == 0
    assert capsys.readouterr().err.endswith("\ntrace: trace.json (open it in ui.perfetto.dev or chrome://tracing)\n")
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"] == ["barrier"] * 2


def test_the_trace_of_a_failed_run_is_written_and_its_error_comes_last(script, capsys):
    name = script("if dist.get_rank(): dist.barrier()")
    assert cli.main(["sim", "-n", "2", "--trace", "trace.json", name]) == 1
    error = capsys.readouterr().err
    assert error.index("trace: trace.json") < error.index("\ndeadlock: ")
    assert "barrier (never returned)" in Path("trace.json").read_text()


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("missing/trace.json", "there is no folder 'missing'"),
        ("script.py/trace.json", "there is no folder 'script.py'"),
        (".", "'.' is a folder: expected the name of a file"),
        ("", "expected the name of a file"),
        ("/dev/full/x", "there is no folder '/dev/full'"),
        ("/proc/trace.json", "'/proc/trace.json' cannot be written: "),
        (f"{'x' * 300}.json", "cannot be written: File name too long"),
    ],
)
def test_a_bad_path_is_refused_before_the_script_runs(script, capsys, path, complaint):
    assert cli.main(["sim", "-n", "2", "--trace", path, script("dist.barrier()")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightrft sim: error: --trace: ")
    assert complaint in error
    assert not Path("ran").exists()


def test_a_file_that_is_there_is_kept_until_the_run_is_over(script):
    Path("trace.json").write_text("precious")
    name = script("assert pathlib.Path('trace.json').read_text() == 'precious'")
    assert cli.main(["sim", "-n", "2", "--no-report", "--trace", "trace.json", name]) == 0
    assert json.loads(Path("trace.json").read_text())["otherData"]["ranks"] == 2


def test_looking_whether_a_file_can_be_written_leaves_nothing(script):
    name = script("assert not os.path.exists('trace.json')")
    assert cli.main(["sim", "-n", "1", "--no-report", "--trace", "trace.json", name]) == 0


def test_a_trace_that_cannot_be_written_in_the_end_is_a_failure(script, capsys):
    assert cli.main(["sim", "-n", "2", "--no-report", "--trace", "/dev/full", script("")]) == 1
    error = capsys.readouterr().err
    assert error == "lightrft: error: the trace '/dev/full' could not be written: No space left on device\n"


def test_a_trace_that_cannot_be_written_hides_no_error_of_the_run(script, capsys):
    name = script("if dist.get_rank(): dist.barrier()")
    assert cli.main(["sim", "-n", "2", "--trace", "/dev/full", name]) == 1
    error = capsys.readouterr().err
    assert error.index("the trace '/dev/full' could not be written") < error.index("\ndeadlock: ")
