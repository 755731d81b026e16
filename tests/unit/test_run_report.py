"""``world.report()``: counts, bytes and times of a run, by group and by line, and what ``lightrft sim`` shows."""

from __future__ import annotations

import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import all_gather_single, reduce_scatter_single
from torch.distributed.device_mesh import init_device_mesh

from lightrft import cli
from lightrft.errors import CollectiveMismatchError, DeadlockError, RankFailedError
from lightrft.sim import SimWorld
from lightrft.sim.run_report import format_bytes, format_seconds


def session(body, backend="gloo"):
    def run():
        dist.init_process_group(backend)
        body(dist.get_rank())
        dist.destroy_process_group()

    return run


def reported(body, ranks=4, backend="gloo", **settings):
    world = SimWorld(ranks, **settings)
    world.run(session(body, backend))
    return world.report()


def f32(*shape):
    return torch.ones(shape)


def parts(number, *shape):
    return [torch.ones(shape) for _ in range(number)]


def group():
    return dist.distributed_c10d._get_default_group()


def ragged(rank):
    return [torch.ones(1 + member) for member in range(4)]


# -- bytes, counted by hand -------------------------------------------------------------------------------------------

FAMILIES = {
    "all_reduce": (lambda rank: dist.all_reduce(f32(3, 5)), 3 * 5 * 4),
    "all_reduce of halves": (lambda rank: dist.all_reduce(torch.ones(7, dtype=torch.float16)), 7 * 2),
    "all_reduce of a scalar": (lambda rank: dist.all_reduce(torch.tensor(1, dtype=torch.int64)), 8),
    "all_reduce of nothing": (lambda rank: dist.all_reduce(f32(0, 5)), 0),
    "all_reduce, asynchronous": (lambda rank: dist.all_reduce(f32(3, 5), async_op=True).wait(), 3 * 5 * 4),
    "all_reduce_coalesced": (lambda rank: group().allreduce_coalesced([f32(3), f32(2, 2)]).wait(), (3 + 4) * 4),
    "reduce": (lambda rank: dist.reduce(f32(6), 1), 6 * 4),
    "broadcast": (lambda rank: dist.broadcast(f32(6), 1), 6 * 4),
    "all_gather": (lambda rank: dist.all_gather(parts(4, 5), f32(5)), 4 * 5 * 4),
    "all_gather_single": (lambda rank: all_gather_single(f32(8, 3), f32(2, 3)), 8 * 3 * 4),
    "all_gather_single_coalesced": (
        lambda rank: group().all_gather_single_coalesced([f32(4), f32(8)], [f32(1), f32(2)]).wait(),
        (4 + 8) * 4,
    ),
    "all_gather_coalesced": (
        lambda rank: group().allgather_coalesced([parts(2, 3)] * 4, parts(2, 3)).wait(),
        4 * (3 + 3) * 4,
    ),
    "gather": (lambda rank: dist.gather(f32(5), parts(4, 5) if rank == 2 else None, 2), 4 * 5 * 4),
    "scatter": (lambda rank: dist.scatter(f32(5), parts(4, 5) if rank == 2 else None, 2), 4 * 5 * 4),
    "reduce_scatter": (lambda rank: dist.reduce_scatter(f32(5), parts(4, 5)), 4 * 5 * 4),
    "reduce_scatter, uneven": (lambda rank: dist.reduce_scatter(f32(1 + rank), ragged(rank)), (1 + 2 + 3 + 4) * 4),
    "reduce_scatter_single": (lambda rank: reduce_scatter_single(f32(2, 3), f32(8, 3)), 8 * 3 * 4),
    "reduce_scatter_single_coalesced": (
        lambda rank: group().reduce_scatter_single_coalesced([f32(1), f32(2)], [f32(4), f32(8)]).wait(),
        (4 + 8) * 4,
    ),
    "all_to_all_single": (lambda rank: dist.all_to_all_single(f32(8, 3), f32(8, 3)), 8 * 3 * 4),
    "all_to_all_single, uneven": (  # rank 0 sends one row to each and gets 1 + 2 + 3 + 4; rank 3 sends 4 to each
        lambda rank: dist.all_to_all_single(f32(10), f32(4 * (rank + 1)), [1, 2, 3, 4], [rank + 1] * 4),
        16 * 4,
    ),
    "barrier": (lambda rank: dist.barrier(), 0),
    "message": (lambda rank: dist.send(f32(9), 1) if rank == 0 else rank == 1 and dist.recv(f32(9), 0), 9 * 4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_payload_is_the_larger_of_what_a_rank_hands_in_and_gets(family):
    body, expected = FAMILIES[family]
    report = reported(body)
    assert report.payload == expected
    assert (report.collectives, report.messages) == ((0, 1) if family == "message" else (1, 0))
    assert [use.payload for use in report.groups] == [expected]
    assert {use.payload for use in report.lines} == {expected}


def test_the_payload_of_lists_that_only_nccl_takes():
    def body(rank):
        dist.all_to_all([f32(1 + rank) for _ in range(4)], [f32(1 + member) for member in range(4)])
        dist.all_to_all([f32(8 - rank) for _ in range(4)], [f32(8 - member) for member in range(4)])
        dist.all_gather([f32(2 * (1 + member)) for member in range(4)], f32(2 * (1 + rank)))

    report = reported(body, backend="nccl")
    # first rank 3 sends four tensors of 4, then rank 0 four of 8, the most of all; everybody gathers 2 + 4 + 6 + 8
    assert [(use.operation, use.payload) for use in sorted(report.lines, key=lambda use: use.place.line)] == [
        ("all_to_all", 16 * 4),
        ("all_to_all", 32 * 4),
        ("all_gather", 20 * 4),
    ]


def test_object_collectives_count_as_the_tensors_that_torch_makes_of_them():
    def body(rank):
        dist.all_gather_object([None] * 4, "x")

    report = reported(body)
    (use,) = report.lines
    size = len(torch.distributed.distributed_c10d._object_to_tensor("x", torch.device("cpu"), None)[0])
    assert (use.operation, use.count, use.payload) == ("all_gather", 2, 4 * 8 + 4 * size)


# -- counts -----------------------------------------------------------------------------------------------------------


def training(rank):
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    pair = dist.new_group([0, 5])
    for _ in range(3):
        dist.all_reduce(f32(100), group=mesh["tp"].get_group())
        dist.all_reduce(f32(10), group=mesh["dp"].get_group())
    if rank in (0, 5):
        dist.broadcast(f32(2), 0, group=pair)
    for other in range(1, 4):
        if rank == 0:
            dist.send(f32(other), other)
        elif rank == other:
            dist.recv(f32(other), 0)


def test_totals_agree_with_the_trace():
    world = SimWorld(8, schedule="random", seed=3)
    world.run(session(training))
    report, collectives, sends = world.report(), set(), 0
    members = {group.name: group.ranks for group in world.groups.values()}
    for event in world.trace:
        if event.operation == "send":
            sends += 1
        elif event.operation != "recv":
            collectives.add((event.group, members[event.group], event.sequence))
    assert (report.collectives, report.messages) == (len(collectives), sends) == (3 * 2 + 3 * 4 + 1, 3)
    payload = 3 * 2 * 400 + 3 * 4 * 40 + 8 + (4 + 8 + 12)
    assert report.payload == sum(use.payload for use in report.groups) == payload
    assert report.collectives == sum(use.collectives for use in report.groups)
    assert report.messages == sum(use.messages for use in report.groups)
    assert report.unfinished == 0
    counted = [use for use in report.lines if use.operation != "recv"]
    assert sum(use.count for use in counted) == report.collectives + report.messages
    assert sum(use.payload for use in counted) == report.payload


def test_groups_are_named_by_their_dimension_of_the_mesh():
    report = reported(training, 8)
    assert [(use.name, use.collectives, use.messages, use.payload) for use in report.groups] == [
        ("2 groups 'mesh_tp' of 4 ranks", 6, 0, 2400),
        ("4 groups 'mesh_dp' of 2 ranks", 12, 0, 480),
        ("the default group", 0, 3, 24),
        ("group 7 of ranks [0, 5]", 1, 0, 8),
    ]


def test_lines_are_those_of_the_user_and_a_collective_stands_at_that_of_its_lowest_rank():
    def body(rank):
        if rank:
            dist.all_reduce(f32(4))
        else:
            dist.all_reduce(f32(4))

    low, high = sorted(reported(body).lines, key=lambda use: -use.place.line)
    first = body.__code__.co_firstlineno
    assert (low.place.file, low.place.function) == (__file__, "body")
    assert (low.place.line, low.count, low.payload) == (first + 4, 1, 16)
    assert (high.place.line, high.count, high.payload) == (first + 2, 0, 0)


def test_a_failed_run_is_reported_until_it_failed():
    def body(rank):
        dist.all_reduce(f32(4))
        if rank == 0:
            dist.recv(f32(4), 1)
        elif rank != 3:
            dist.all_reduce(f32(4))
        else:
            dist.all_reduce(f32(4), async_op=True)

    world = SimWorld(4)
    with pytest.raises(DeadlockError):
        world.run(session(body))
    report = world.report()
    assert (report.collectives, report.messages, report.unfinished) == (2, 1, 2)
    assert "4 ranks, 2 collectives, 1 message, payload 48 B; 2 of them never completed\n" in str(report)


@pytest.mark.parametrize(
    "body",
    [
        lambda rank: dist.all_reduce(f32(4 + rank), async_op=True),
        lambda rank: dist.all_to_all_single(f32(4), f32(4), [1, 3], [1, 3]),
    ],
)
def test_ranks_that_disagree_have_not_completed(body):
    world = SimWorld(2)
    with pytest.raises(CollectiveMismatchError):
        world.run(session(body))
    assert (world.report().collectives, world.report().unfinished) == (1, 1)


# -- time -------------------------------------------------------------------------------------------------------------


def test_virtual_time_is_that_of_the_waiting_ranks():
    def body(rank):
        time.sleep(10 * rank)
        dist.all_reduce(f32(1))
        work = dist.all_reduce(f32(2), async_op=True)
        if rank == 0:
            dist.recv(f32(3), 1)
        if rank == 1:
            time.sleep(5)
            dist.send(f32(3), 0)
        work.wait()

    report = reported(body, 2)
    waited = {(use.operation, use.payload): use.waited_seconds for use in report.lines}
    assert waited == pytest.approx({("all_reduce", 4): 10, ("all_reduce", 8): 0, ("recv", 12): 5, ("send", 12): 0})
    assert report.virtual_seconds == pytest.approx(15, abs=0.01)
    assert "virtual time 15.00 s: ranks waited in calls for 50 % of it" in str(report)


@pytest.mark.parametrize("wait", [dist.barrier, lambda: dist.recv(f32(1), 0)])
def test_who_waits_for_ever_waits_until_the_end_of_the_run(wait):
    def body(rank):
        if rank:
            wait()
        time.sleep(3)

    world = SimWorld(2)
    with pytest.raises(DeadlockError):
        world.run(lambda: (dist.init_process_group("gloo"), body(dist.get_rank())))
    assert world.report().waited_seconds == pytest.approx(3, abs=0.01)


def test_a_barrier_with_a_timeout_of_its_own_is_waited_for_once():
    def body(rank):
        time.sleep(4 * rank)
        dist.monitored_barrier(timeout=timedelta(seconds=30))

    assert reported(body, 2).waited_seconds == pytest.approx(4, abs=0.01)


def test_real_time_belongs_to_the_line_that_it_led_to():
    def spin(seconds):
        end = time.clock_gettime(time.CLOCK_MONOTONIC) + seconds
        while time.clock_gettime(time.CLOCK_MONOTONIC) < end:
            pass

    def body(rank):
        if rank == 1:
            spin(0.02)
        dist.all_reduce(f32(1))
        spin(0.01)
        time.sleep(1)  # ranks are switched here, and the time that the other one spends does not count
        spin(0.01)
        dist.barrier()
        work = dist.all_reduce(f32(2), async_op=True)
        spin(0.01)
        work.wait()
        spin(0.01)

    world = SimWorld(2)
    world.timed = True
    world.run(session(body))
    report = world.report()
    own = {(use.operation, use.payload): use.own_seconds for use in report.lines}
    assert own["all_reduce", 4] >= 0.02
    assert own["barrier", 0] >= 0.04
    assert own["all_reduce", 8] < own["barrier", 0]
    assert report.own_seconds - sum(own.values()) >= 0.04  # after the last calls
    assert report.own_seconds <= report.real_seconds  # no time counts for two ranks
    assert report.own_seconds + report.simulator_seconds == pytest.approx(report.real_seconds)
    assert re.search(r"real time \d+\.\d ms, \d+ switches of ranks: \d+ % in the code of the ranks, \d+ %", str(report))


def test_real_time_of_lines_is_not_measured_unless_asked_for():
    report = reported(lambda rank: dist.barrier())
    assert report.own_seconds is report.simulator_seconds is report.lines[0].own_seconds is None
    assert report.real_seconds > 0
    assert "code" not in str(report)


# -- text -------------------------------------------------------------------------------------------------------------


def test_the_text_fits_a_screen():
    lines = "\n".join(f"    dist.all_reduce(torch.ones({size}), group=groups[{size % 12}])" for size in range(1, 41))
    source = (
        "import torch\nimport torch.distributed as dist\n"
        f"def body(rank):\n    groups = [dist.new_group() for _ in range(12)]\n{lines}\n"
    )
    namespace = {}
    file = "/a/long/path/of/a/project/" + "folder/" * 20 + "train.py"
    exec(compile(source, file, "exec"), namespace)
    text = str(reported(namespace["body"], 16))
    assert "and 7 more groups\n" in text
    assert text.endswith("\nand 30 more lines")
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"\n\.\.\.\S+/folder/train\.py:44 +all_reduce +1 +160 B\n", text)


def test_the_text_of_a_small_run(monkeypatch):
    def body(rank):
        dist.all_reduce(f32(300))

    world = SimWorld(2)
    world.run(session(body))
    text = re.sub(r"real time [\d.]+ \w+", "real time 1 ms", str(world.report()))
    line = f"test_run_report.py:{body.__code__.co_firstlineno + 1}"
    text = re.sub(r"virtual time.*\n", "", re.sub(rf"\S+{line}", line, text))
    assert text.splitlines()[:4] == [
        "2 ranks, 1 collective, 0 messages, payload 1.2 KiB",
        f"real time 1 ms, {world.report().switches} switches of ranks",
        "",
        "group              collectives  messages  payload",
    ]
    assert text.splitlines()[4] == "the default group            1         0  1.2 KiB"
    assert text.splitlines()[-1].split() == [line, "all_reduce", "1", "1.2", "KiB"]


def test_numbers_have_units():
    sizes = (0, 1023, 1024, 1536, 20 * 2**20, 3 * 2**30, 2**60)
    expected = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "20.0 MiB", "3.0 GiB", "1024.0 PiB"]
    assert [format_bytes(size) for size in sizes] == expected
    assert [format_seconds(time) for time in (0, 83e-5, 0.0125, 1.2, 3000)] == [
        "0 us",
        "830 us",
        "12.5 ms",
        "1.20 s",
        "3,000.00 s",
    ]


# -- worlds -----------------------------------------------------------------------------------------------------------


def test_a_world_that_has_not_run_or_made_no_call_has_an_empty_report():
    world = SimWorld(3)
    assert str(world.report()) == "3 ranks, 0 collectives, 0 messages, payload 0 B\nreal time 0 us, 0 switches of ranks"
    world.run(lambda: None)
    report = world.report()
    assert (report.collectives, report.messages, report.payload, report.groups, report.lines) == (0, 0, 0, (), ())
    assert (report.switches, report.real_seconds > 0) == (3, True)


def test_the_report_is_of_the_latest_run_and_of_one_run_if_determinism_is_checked():
    world = SimWorld(2, check_determinism=True)
    for size in (3, 5):
        world.run(session(lambda rank, size=size: dist.all_reduce(f32(size), async_op=True).wait()))
        report = world.report()
        assert (report.collectives, report.payload, len(report.lines)) == (1, 4 * size, 1)
        assert len(world._waits) == 2


def test_a_thread_of_a_rank_counts_like_the_rank():
    def body(rank):
        import threading

        thread = threading.Thread(target=dist.all_reduce, args=(f32(4),))
        thread.start()
        thread.join()

    world = SimWorld(2)
    world.timed = True
    world.run(session(body))
    assert (world.report().collectives, world.report().payload) == (1, 16)


def test_1024_ranks_are_counted():
    world = SimWorld(1024)

    def body(rank):
        for _ in range(2):
            dist.all_reduce(f32(4))

    world.run(session(body))
    report = world.report()
    assert (report.ranks, report.collectives, report.payload, report.lines[0].count) == (1024, 2, 32, 2)


# -- the command ------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
for _ in range(3):
    dist.all_reduce(torch.ones(256))
print("the end", file=sys.stderr)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(end):
        (tmp_path / "script.py").write_text(SCRIPT + end)
        return "script.py"

    return write


def test_the_command_ends_with_the_report(script, capsys):
    assert cli.main(["sim", "-n", "2", script("dist.destroy_process_group()")]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("the end\nthe end\n\n2 ranks, 3 collectives, 0 messages, payload 3.0 KiB\nreal time ")
    assert re.search(r"\nscript\.py:7 +all_reduce +3 +3\.0 KiB +[\d.]+ [mu]s\b", shown.err)
    assert " in the code of the ranks, " in shown.err


def test_after_a_failure_the_error_comes_last(script, capsys):
    assert cli.main(["sim", "-n", "2", script("if dist.get_rank(): dist.barrier()")]) == 1
    shown = capsys.readouterr().err
    report, error = shown.index("2 ranks, 4 collectives, "), shown.index("\ndeadlock: ")
    assert shown.startswith("the end\n")
    assert report < error
    assert "run it again with: lightrft sim -n 2 script.py" in shown.splitlines()[-1]


def test_the_report_can_be_turned_off(script, capsys):
    assert cli.main(["sim", "-n", "2", "--no-report", script("dist.destroy_process_group()")]) == 0
    assert capsys.readouterr() == ("", "the end\nthe end\n")


def test_a_rank_may_ask_for_what_happened_until_now():
    world = SimWorld(2)

    def body(rank):
        time.sleep(2)
        dist.all_reduce(f32(4))
        report = world.report()
        assert (report.collectives, report.real_seconds, round(report.virtual_seconds)) == (1, 0, 2)

    world.run(session(body))


def test_an_exception_of_a_rank_does_not_hide_what_was_done_before():
    def body(rank):
        dist.all_reduce(f32(4))
        raise ValueError

    world = SimWorld(2)
    with pytest.raises(RankFailedError):
        world.run(session(body))
    assert (world.report().collectives, world.report().unfinished) == (1, 0)
