"""One seed, one trace; and what ``check_determinism=True`` says where two runs of a program differ."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import random
import sys
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightrft.errors import NondeterminismError, RankFailedError, SimWarning
from lightrft.sim import SimWorld
from lightrft.sim.observations import Budget, Contents, differing_results

LEGACY = np.random.mtrand._rand  # behind np.random.rand and its siblings
LINES = Path(__file__).read_text().splitlines()


def line_of(mark):
    """Number of the line that ends in ``# <mark>``."""
    (found,) = [number for number, text in enumerate(LINES, 1) if text.endswith(f"# {mark}")]
    return found


def session(body):
    """A rank's life around ``body(rank)``: make the default group, meet, run, meet, destroy it."""

    def run():
        dist.init_process_group("nccl")
        dist.barrier()  # before
        result = body(dist.get_rank())
        dist.barrier()  # after
        dist.destroy_process_group()
        return result

    return run


def difference(body, size=3, **options):
    """What is said about a program whose second run differs."""
    with pytest.raises(NondeterminismError) as caught:
        SimWorld(size, check_determinism=True, **options).run(session(body))
    return caught.value.report


def unfinished(size, run):
    """As :func:`difference`, for a whole program, whose groups are not destroyed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimWarning)
        with pytest.raises(NondeterminismError) as caught:
            SimWorld(size, check_determinism=True).run(run)
    return caught.value.report


def passes(body, size=3, **options):
    """The results of a program that is the same in both runs."""
    return SimWorld(size, check_determinism=True, **options).run(session(body))


def second_run(size=3):
    """A function that says, on every rank, whether this is the second run; it is called once per rank and run."""
    calls = itertools.count()
    return lambda: next(calls) >= size


def kinds(report):
    return [finding.what for finding in report.findings]


# -- same seed, same trace ---------------------------------------------------------------------------------------------


def busy():
    """A program in which ranks overtake one another wherever the schedule lets them."""
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    pair = dist.new_group([0, 1])
    for step in range(4):
        time.sleep(random.random())
        work = dist.all_reduce(torch.ones(step + 1), async_op=True)
        if rank < 2:
            dist.barrier(group=pair)
        work.wait()
        sent = dist.isend(torch.full((2,), float(rank)), (rank + 1) % size)
        dist.recv(torch.empty(2), (rank - 1) % size)
        sent.wait()
        dist.all_gather_object([None] * size, "x" * int(LEGACY.randint(9)))
    dist.destroy_process_group()


@pytest.mark.parametrize("schedule", ["fifo", "random"])
def test_ten_runs_of_one_seed_leave_one_trace(schedule):
    traces = []
    for _ in range(10):
        world = SimWorld(4, seed=7, schedule=schedule)
        world.run(busy)
        traces.append(world.trace)
    assert len(traces[0]) == 4 * 4 * 5 + 2 * 4
    assert all(trace == traces[0] for trace in traces)


def test_one_world_that_runs_twice_leaves_the_same_trace_twice():
    world = SimWorld(4, seed=7, schedule="random")
    world.run(busy)
    first = world.trace
    world.run(busy)
    assert world.trace == first


def test_a_random_schedule_gives_every_seed_a_trace_of_its_own():
    traces = []
    for seed in range(8):
        world = SimWorld(4, seed=seed, schedule="random")
        world.run(busy)
        traces.append(tuple(world.trace))
    assert len(set(traces)) == 8


def test_events_cannot_be_changed():
    world = SimWorld(1)
    world.run(session(lambda rank: None))
    with pytest.raises(AttributeError):
        world.trace[0].rank = 5


# -- programs that pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["fifo", "random"])
def test_a_clean_program_passes_and_its_results_come_back(schedule):
    def body(rank):
        x = torch.randn(4) + random.random() + float(LEGACY.rand())
        dist.all_reduce(x)
        return rank, x

    checked = passes(body, schedule=schedule)
    plain = SimWorld(3, schedule=schedule).run(session(body))
    assert [rank for rank, _ in checked] == [0, 1, 2]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(checked, plain, strict=True))


def test_memory_that_nobody_has_written_is_no_difference():
    objects = [b"x" * 3_000, b"y" * 70_000, b""]  # pickled into buffers whose tails are never initialised

    def body(rank):
        torch.full((20_000,), float(second())).sum()  # memory to find again in the buffers
        received = torch.empty(500)
        if rank == 0:
            received.fill_(1)
        dist.broadcast(received, 0)
        everybody, mine = [None] * 3, [None]
        dist.all_gather_object(everybody, objects[rank])
        dist.gather_object(objects[rank], everybody if rank == 0 else None)
        dist.scatter_object_list(mine, objects if rank == 1 else None, src=1)
        dist.recv(torch.empty(100), 0) if rank else [dist.send(torch.ones(100), peer) for peer in (1, 2)]
        return mine

    second = second_run()
    passes(body)


def test_every_operation_can_be_compared():
    def body(rank):
        x = torch.arange(6.0).view(3, 2)
        dist.all_gather([torch.empty(3, 2) for _ in range(3)], x)
        dist.all_to_all_single(torch.empty(3, 2), x, [1, 1, 1], [1, 1, 1])
        dist.reduce_scatter_single(torch.empty(1, 2), x)
        dist.scatter(torch.empty(2), [torch.ones(2)] * 3 if rank == 0 else None)
        dist.all_reduce(torch.zeros(0))
        dist.all_reduce(torch.tensor(1 + 2j))
        dist.broadcast(torch.ones(2, dtype=torch.bool), 2)
        return x

    passes(body)


def test_the_second_run_gets_the_arguments_as_they_were():
    @dataclass
    class State:
        steps: int = 0

    def body(seen, state, weight, extra):
        seen.append(1)
        state.steps += 1
        weight.add_(1)
        return list(seen), state.steps, weight.clone(), extra["n"]

    seen, weight = [], torch.zeros(2)
    run = functools.partial(body, seen)
    results = SimWorld(1, check_determinism=True).run(run, State(), weight, extra={"n": 1})
    assert results[0][:2] == ([1], 1)
    assert seen == [1]
    assert weight.tolist() == [1, 1]


def test_the_second_run_imports_afresh_what_the_first_was_the_first_to_import(tmp_path, monkeypatch):
    (tmp_path / "counting_helper.py").write_text("calls = []\n")
    (tmp_path / "counting_package").mkdir()
    (tmp_path / "counting_package" / "__init__.py").write_text("")
    (tmp_path / "counting_package" / "part.py").write_text("calls = []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import counting_package  # noqa: F401 - the package is there before the run, its part is not

    def body(rank):
        import counting_helper
        from counting_package import part

        counting_helper.calls.append(rank)
        part.calls.append(rank)
        return len(counting_helper.calls), len(part.calls)

    try:
        assert passes(body, size=1) == [(1, 1)]
    finally:
        for name in ("counting_helper", "counting_package.part", "counting_package"):
            sys.modules.pop(name, None)


def test_a_warning_comes_once_and_points_to_the_run():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SimWorld(2, check_determinism=True).run(lambda: dist.init_process_group("nccl"))  # warned
    (warning,) = [warning for warning in caught if warning.category is SimWarning]
    assert (warning.filename, warning.lineno) == (__file__, line_of("warned"))


def test_a_first_run_that_fails_is_the_last():
    runs = []

    def body(rank):
        runs.append(rank)
        raise KeyError("always")

    with pytest.raises(RankFailedError, match="KeyError"):
        passes(body, size=1)
    assert runs == [0]


def test_a_world_that_does_not_check_has_nobody_watching():
    world = SimWorld(2)
    assert world.run(lambda: world._observer) == [None, None]
    checking = SimWorld(1, check_determinism=True)
    checking.run(session(lambda rank: None))
    assert checking._observer is None


# -- events ------------------------------------------------------------------------------------------------------------


def test_another_line_in_the_second_run_is_named():
    second = second_run()

    def body(rank):
        if second() and rank == 1:
            dist.all_reduce(torch.ones(3))  # detour
        else:
            dist.all_reduce(torch.ones(3))  # usual

    found = difference(body)
    assert (found.rank, found.place.line) == (1, line_of("detour"))
    assert kinds(found) == ["event"]
    assert str(line_of("usual")) in found.findings[0].first
    assert str(line_of("detour")) in found.findings[0].second
    assert str(line_of("before")) in found.agreed


def test_another_shape_or_operation_or_root_is_an_event():
    def changing(call):
        second = second_run()

        def body(rank):
            later = second()
            call(later)

        (finding,) = difference(body).findings
        return finding.what, finding.first.partition(" on ")[0], finding.second.partition(" on ")[0]

    shape = changing(lambda later: dist.all_reduce(torch.ones(3 + later)))
    assert shape == ("event", "all_reduce(float32[3], SUM)", "all_reduce(float32[4], SUM)")
    kind = changing(lambda later: dist.broadcast(torch.ones(1), 0) if later else dist.all_reduce(torch.ones(1)))
    assert kind == ("event", "all_reduce(float32[1], SUM)", "broadcast(float32[1], root 0)")
    root = changing(lambda later: dist.broadcast(torch.ones(1), int(later)))
    assert root == ("event", "broadcast(float32[1], root 0)", "broadcast(float32[1], root 1)")


def test_another_tag_is_an_event():
    second = second_run(2)

    def body(rank):
        tag = 5 if second() else 4
        if rank == 0:
            dist.send(torch.ones(1), 1, tag=tag)  # tagged
        else:
            dist.recv(torch.ones(1), 0, tag=tag)

    found = difference(body, size=2, profile="gloo")
    assert (found.rank, found.place.line, kinds(found)) == (0, line_of("tagged"), ["event"])
    assert "tag 4" in found.findings[0].first
    assert "tag 5" in found.findings[0].second


def test_a_call_that_only_the_second_run_makes_is_named():
    second = second_run(2)

    def body():
        dist.init_process_group("nccl")
        later = second()
        dist.barrier()
        if later:
            dist.barrier()  # surplus

    found = unfinished(2, body)
    assert (found.rank, found.place.line, kinds(found)) == (0, line_of("surplus"), ["event"])
    assert found.findings[0].first == "the rank made no more calls"


@pytest.mark.parametrize("leave", [lambda: None, sys.exit])
def test_a_rank_that_leaves_out_a_call_in_the_second_run_is_named_before_others_hang(leave):
    second = second_run(2)

    def body():
        dist.init_process_group("nccl")
        later = second()
        dist.barrier()
        if later and dist.get_rank() == 1:
            leave()
        else:
            dist.barrier()  # skipped

    found = unfinished(2, body)
    assert (found.rank, found.place.line, kinds(found)) == (1, line_of("skipped"), ["event"])
    assert found.findings[0].second == "the rank made no more calls"


def test_a_rank_that_ends_its_process_early_in_the_second_run_is_named():
    second = second_run(1)

    def body():
        dist.init_process_group("nccl")
        dist.barrier()
        if second():
            os._exit(0)
        dist.barrier()  # omitted

    found = unfinished(1, body)
    assert (found.rank, found.place.line, kinds(found)) == (0, line_of("omitted"), ["event"])
    assert found.findings[0].second == "the rank made no more calls"


def test_a_failure_of_the_second_run_only_is_named_and_kept_as_the_cause():
    second = second_run(2)

    def body(rank):
        if second() and rank == 1:
            raise KeyError("only now")  # raised

    with pytest.raises(NondeterminismError) as caught:
        passes(body, size=2)
    found = caught.value.report
    assert (found.rank, found.place.line, kinds(found)) == (1, line_of("raised"), ["outcome"])
    assert "KeyError" in found.findings[0].second
    assert isinstance(caught.value.__cause__, RankFailedError)


# -- random draws ------------------------------------------------------------------------------------------------------


def seed_torch():
    torch.seed()


def seed_python():
    random.seed(os.urandom(8))


def seed_numpy():
    LEGACY.seed(int.from_bytes(os.urandom(4), "big"))


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (seed_torch, "torch"),
        (seed_python, "python"),
        (seed_numpy, "numpy"),
        (lambda: torch.randn(1 + os.urandom(1)[0], device="cuda"), "torch.cuda"),
        (lambda: torch.rand(1 + os.urandom(1)[0]), "torch"),
    ],
)
def test_random_draws_that_differ_are_named_with_their_generator(draw, name, monkeypatch):
    numbers = itertools.count(1)
    monkeypatch.setattr(os, "urandom", lambda n: (20 * next(numbers)).to_bytes(n, "little"))  # always another number

    def body(rank):
        if rank == 1:
            draw()

    found = difference(body)
    assert (found.rank, found.place.line) == (1, line_of("after"))
    assert kinds(found) == [f"random draws of {name}"]
    assert found.findings[0].first != found.findings[0].second
    assert str(line_of("before")) in found.agreed


def test_numbers_from_the_operating_system_are_seen_in_the_seed():
    def body(rank):
        if rank == 2:
            torch.manual_seed(uuid.uuid4().int % 2**62)

    found = difference(body)
    assert (found.rank, kinds(found)) == (2, ["random draws of torch"])
    assert found.findings[0].first.startswith("seed ")


def test_a_draw_after_the_last_call_is_seen():
    def body():
        dist.init_process_group("nccl")
        dist.barrier()  # last
        dist.destroy_process_group()
        random.seed(uuid.uuid4().int)

    with pytest.raises(NondeterminismError) as caught:
        SimWorld(2, check_determinism=True).run(body)
    found = caught.value.report
    assert (found.rank, found.place.line, found.operation) == (0, line_of("last"), "the end of its function")
    assert kinds(found) == ["random draws of python"]


def test_the_spare_gaussian_of_numpy_counts():
    second = second_run(1)

    def body(rank):
        if second():
            LEGACY.set_state((*LEGACY.get_state()[:3], 1, 0.5))

    assert kinds(difference(body, size=1)) == ["random draws of numpy"]


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_contents_that_differ_are_named_with_both_values():
    second = second_run()

    def body(rank):
        later = second()
        x = torch.zeros(2, 3)
        if rank == 2:
            x[1, 1] = 0.5 if later else 0.25
        dist.all_reduce(x)  # reduced

    found = difference(body)
    assert (found.rank, found.place.line) == (2, line_of("reduced"))
    assert kinds(found) == ["contents of tensor 0, first at [1, 1]"]
    assert (found.findings[0].first, found.findings[0].second) == ("0.25", "0.5")


def test_only_a_sender_contributes_to_a_message():
    second = second_run(2)

    def body(rank):
        x = torch.full((2,), float(second()))
        (dist.send if rank == 0 else dist.recv)(x, 1 - rank)  # exchanged

    found = difference(body, size=2)
    assert (found.rank, found.place.line, kinds(found)) == (
        0,
        line_of("exchanged"),
        ["contents of tensor 0, first at [0]"],
    )


def test_the_real_time_in_a_tensor_is_seen():
    def body(rank):
        now = time.clock_gettime_ns(time.CLOCK_REALTIME) if rank == 0 else 0
        dist.all_reduce(torch.tensor([now]))  # timed

    found = difference(body)
    assert (found.rank, found.place.line) == (0, line_of("timed"))
    assert int(found.findings[0].first) < int(found.findings[0].second)


def test_an_object_sent_to_all_is_seen():
    def body(rank):
        dist.broadcast_object_list([str(uuid.uuid4())] if rank == 0 else [None])  # announced

    found = difference(body)
    assert (found.rank, found.place.line) == (0, line_of("announced"))
    assert found.findings[0].what.startswith("contents of tensor 0, first at [")


def test_an_order_by_address_is_seen():
    alive = []

    def body(rank):
        objects = [object() for _ in range(8)]
        alive.append(objects)  # so that no address comes twice
        dist.all_reduce(torch.tensor([id(each) for each in objects]))  # addressed

    found = difference(body, size=1)
    assert (found.rank, found.place.line) == (0, line_of("addressed"))


def test_a_large_tensor_is_compared_too():
    second = second_run(1)

    def body(rank):
        x = torch.zeros(1_000_000)
        x[999_999] = float(second())
        dist.all_reduce(x)

    (finding,) = difference(body, size=1).findings
    assert finding.what.startswith("contents of tensor 0, which first differs among the elements 999424 to 999999")


def test_an_asynchronous_call_is_compared_by_what_it_was_given():
    second = second_run(2)

    def body(rank):
        x = torch.full((2,), float(second()))
        work = dist.all_reduce(x, async_op=True)  # issued
        work.wait()

    found = difference(body, size=2)
    assert (found.place.line, kinds(found)) == (line_of("issued"), ["contents of tensor 0, first at [0]"])


def test_split_sizes_that_differ_are_named():
    second = second_run(2)

    def body(rank):
        splits = [1, 3] if second() else [2, 2]
        received = [splits[rank]] * 2
        dist.all_to_all_single(torch.empty(sum(received)), torch.ones(4), received, splits)

    found = difference(body, size=2)
    assert kinds(found)[0] == "argument 1"
    assert (found.findings[0].first, found.findings[0].second) == ("(2, 2)", "(1, 3)")


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int16, torch.uint8, torch.bool, torch.complex64],
)
def test_values_of_every_dtype_can_be_shown(dtype):
    first, second = torch.zeros(3).to(dtype), torch.tensor([0, 0, 1]).to(dtype)
    finding = Contents.of(first, Budget()).compare(Contents.of(second, Budget()), "x")
    assert finding.what == "x, first at [2]"
    assert finding.first == repr(first[2].item())
    assert finding.second == repr(second[2].item())


def test_a_budget_bounds_what_is_kept():
    budget = Budget(total=100, largest=60)
    kept = [Contents.of(torch.zeros(n, dtype=torch.uint8), budget).data for n in (61, 60, 50, 40)]
    assert [data is not None for data in kept] == [False, True, False, True]


# -- order -------------------------------------------------------------------------------------------------------------


def test_a_rank_that_is_late_in_the_second_run_is_named():
    second = second_run()

    def body(rank):
        later = second()
        if rank == 1:
            time.sleep(9 if later else 1)  # nap
        if rank == 2:
            time.sleep(5)
        dist.all_reduce(torch.ones(1))

    found = difference(body)
    assert (found.rank, found.place.line) == (1, line_of("nap"))
    assert kinds(found) == ["order of the ranks"]
    assert "next came rank 1" in found.findings[0].first
    assert "next came rank 2" in found.findings[0].second


def test_a_rank_that_is_early_in_the_second_run_is_named():
    second = second_run()

    def body(rank):
        later = second()
        if rank == 1:
            time.sleep(1 if later else 9)
        if rank == 2:
            time.sleep(5)
        dist.all_reduce(torch.ones(1))  # hurried

    found = difference(body)
    assert (found.rank, found.place.line) == (1, line_of("hurried"))
    assert "next came rank 2" in found.findings[0].first


# -- results -----------------------------------------------------------------------------------------------------------


def test_results_that_differ_are_named():
    def body(rank):
        return {"id": [rank, uuid.uuid4().hex if rank == 1 else ""]}

    found = difference(body)
    assert (found.rank, kinds(found)) == (1, ["result['id'][1]"])
    assert found.place.function == "run"
    assert found.place.source.startswith("def run()")


class Opaque:
    """Equal to itself only."""


@dataclass(eq=False)
class Pair:
    left: object
    right: object


def local_object():
    class Local:
        """Another class at every call."""

    return Local()


def test_equal_results_pass_and_unknown_ones_are_left_alone():
    for make in (
        lambda: [1, "a", None, float("nan"), 2.5, b"x", 1j],
        lambda: {"t": torch.tensor([float("nan"), 1.0]), 3: np.arange(4), (): {1, 2}},
        lambda: (Opaque(), {Opaque(): 1}, {Opaque()}, Pair(1, Opaque()), np.array([Opaque()])),
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
        local_object,
    ):
        assert differing_results(make(), make()) is None


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (1, 2, "result"),
        (1, True, "result"),
        ([1, 2], [1], "result"),
        ((1, [2, 3]), (1, [2, 4]), "result[1][1]"),
        ({"a": 1}, {"b": 1}, "result"),
        ({1, 2}, {1, 3}, "result"),
        (Pair(1, 2.0), Pair(1, 3.0), "result.right"),
        (np.arange(3), np.arange(4), "result"),
        (torch.zeros(2), torch.ones(2), "result, first at [0]"),
        (torch.zeros(2), torch.zeros(3), "result"),
        (Path("a"), Path("b"), "result"),
    ],
)
def test_different_results_are_told_apart(first, second, what):
    finding = differing_results(first, second)
    assert finding.what == what
    assert finding.first != finding.second


def test_the_weights_of_a_returned_module_count():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.load_state_dict(first.state_dict())
    assert differing_results(first, second) is None
    with torch.no_grad():
        second.bias[1] += 1
    assert differing_results(first, second).what == "result.bias, first at [1]"


# -- the error ---------------------------------------------------------------------------------------------------------


def test_the_run_stops_where_it_differs():
    reached = []
    second = second_run()

    def body(rank):
        later = second()
        dist.all_reduce(torch.tensor([float(later)]))
        if later:
            reached.append(rank)

    world = SimWorld(3, check_determinism=True)
    with pytest.raises(NondeterminismError):
        world.run(session(body))
    assert reached == []
    assert len(world.trace) == 4  # three barriers, and the call that differs


def test_the_error_shows_rank_line_and_how_to_run_again():
    second = second_run()

    def body(rank):
        dist.all_reduce(torch.tensor([float(second())]))  # shown

    with pytest.raises(NondeterminismError, match="not deterministic") as caught:
        passes(body, seed=5, schedule="random")
    text = str(caught.value)
    assert f"rank {caught.value.report.rank} at " in text
    assert f"test_determinism.py:{line_of('shown')}" in text
    assert "first run   0.0" in text
    assert "second run  1.0" in text
    assert "SimWorld(3, seed=5, schedule='random')" in text
    (culprit,) = caught.value.report.culprits
    assert culprit.place.line == line_of("shown")
    assert str(pickle.loads(pickle.dumps(caught.value)).report) == str(caught.value.report)


def test_a_world_goes_on_after_a_difference():
    second = second_run(1)
    world = SimWorld(1, check_determinism=True)
    with pytest.raises(NondeterminismError):
        world.run(second)
    assert world.run(lambda: 3) == [3]
