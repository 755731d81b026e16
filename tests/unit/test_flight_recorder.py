"""``world.dump_flight_record``: torch's own analyzer reads what the simulator writes."""

from __future__ import annotations

import gc
import logging
import pickle
import time

import pytest
import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError, DeadlockError, SimWarning
from lightrft.sim import SimWorld


@pytest.fixture
def analyze(tmp_path, caplog):
    """Writes the record of a world and reads it with torch's analyzer: what it says, and its table of collectives."""
    from torch.distributed.flight_recorder import fr_trace

    def read(world):
        folder = tmp_path / "record"
        names = world.dump_flight_record(folder / "rank_")
        assert names == [f"{folder}/rank_{rank}" for rank in range(world.size)]
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="Flight Recorder"):
            fr_trace.main([str(folder), "-o", str(tmp_path / "table")])
        with (tmp_path / "table").open("rb") as file:
            _, table = pickle.load(file)
        return caplog.text, table

    yield read
    gc.enable()  # the analyzer leaves the garbage collector switched off


def session(body, backend="nccl"):
    def run():
        dist.init_process_group(backend, device_id=torch.device("cuda", 0) if backend == "nccl" else None)
        body(dist.get_rank())
        dist.destroy_process_group()

    return run


def dumps(world, folder):
    found = []
    for name in world.dump_flight_record(folder / "x"):
        with open(name, "rb") as file:
            found.append(pickle.load(file))
    return found


def test_a_rank_that_skips_a_collective_is_named_by_the_analyzer(analyze):
    def body(rank):
        dist.all_reduce(torch.ones(2, 3))
        if rank != 3:
            dist.all_reduce(torch.ones(5))

    world = SimWorld(4)
    with pytest.raises(DeadlockError):
        world.run(session(body))
    said, table = analyze(world)
    assert "Not all ranks joining collective, sequence number: 2" in said
    assert "missing ranks: {3}" in said
    assert "collective: nccl:all_reduce" in said
    assert f"body at {__file__}:" in said
    done, stuck = table.collectives
    assert (done.collective_seq_id, done.collective_state, done.missing_ranks) == (1, "completed", None)
    assert (stuck.collective_seq_id, stuck.collective_state, stuck.missing_ranks) == (2, "scheduled", {3})


def test_a_clean_run_is_read_as_all_matched(analyze):
    def body(rank):
        x, y = torch.ones(4, 2), torch.ones(2)
        root = rank == 1
        dist.all_reduce(x)
        dist.barrier()
        dist.broadcast(x, 1)
        dist.reduce(x, 2)
        dist.all_gather([torch.empty(4, 2) for _ in range(4)], x)
        dist.all_gather_single(torch.empty(16, 2), x)
        dist.reduce_scatter([torch.empty(4, 2)][0], [x.clone() for _ in range(4)])
        dist.reduce_scatter_single(torch.empty(1, 2), x)
        dist.gather(x, [torch.empty(4, 2) for _ in range(4)] if root else None, dst=1)
        dist.scatter(x, [torch.ones(4, 2) for _ in range(4)] if root else None, src=1)
        dist.all_to_all_single(torch.empty(4, 2), x)
        dist.all_to_all_single(torch.empty(10), torch.ones(4 * (rank + 1)), [1, 2, 3, 4], [rank + 1] * 4)
        dist.all_to_all([torch.empty(i + 1) for i in range(4)], [torch.ones(rank + 1) for _ in range(4)])
        dist.all_gather_object([None] * 4, "x" * rank)
        with dist._coalescing_manager(device=torch.device("cpu")):
            dist.all_reduce(x)
            dist.all_reduce(y)
        dist.all_reduce(x.to(torch.bfloat16), async_op=True).wait()
        dist.all_reduce(torch.tensor(1.0))

    world = SimWorld(4)
    world.run(session(body))
    said, table = analyze(world)
    assert said == ""
    assert len(table.collectives) == 18
    assert all(c.pass_check and c.collective_state == "completed" for c in table.collectives)
    assert all(call.collective_id is not None for call in table.ncclcalls)
    assert len(table.ncclcalls) == len(world.trace) == 4 * 18


def test_groups_are_kept_apart_even_under_one_name(analyze):
    def body(rank):
        halves = dist.split_group(None, [[0, 1], [2, 3]])
        pair = dist.new_group([0, 2], group_desc="dp")
        if rank in (0, 2):
            dist.all_reduce(torch.ones(1), group=pair)
        dist.all_reduce(torch.ones(2), group=halves)
        dist.destroy_process_group()
        dist.init_process_group("nccl")
        dist.all_reduce(torch.ones(3))

    world = SimWorld(4)
    world.run(session(body))
    said, table = analyze(world)
    assert said == ""
    assert sorted(sorted(c.expected_ranks) for c in table.collectives) == [
        [0, 1],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 2],
        [2, 3],
    ]
    assert "dp" in {group.desc for group in table.groups}


def test_uneven_parts_are_read_as_matched(analyze):
    def body(rank):
        parts = [torch.ones(1), torch.ones(2), torch.ones(3)]
        dist.all_gather([torch.empty_like(part) for part in parts], parts[rank])
        dist.reduce_scatter(torch.empty(rank + 1), parts)

    world = SimWorld(3, profile="nccl")
    world.run(session(body))
    said, table = analyze(world)
    assert said == ""
    assert [c.collective_name for c in table.collectives] == ["nccl:_broadcast_oop", "nccl:_reduce_oop"]
    assert [c.input_sizes for c in table.collectives] == [[[1], [2], [3]]] * 2


def test_messages_in_a_ring_are_read_as_matched(analyze):
    def body(rank):
        dist.all_reduce(torch.ones(1))
        for _ in range(2):
            sent = dist.isend(torch.ones(2), (rank + 1) % 4)
            dist.recv(torch.empty(2), (rank - 1) % 4)
            sent.wait()
        both = [
            dist.P2POp(dist.irecv, torch.empty(2), (rank - 1) % 4),
            dist.P2POp(dist.isend, torch.ones(2), (rank + 1) % 4),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    world = SimWorld(4)
    world.run(session(body))
    said, table = analyze(world)
    assert said == ""
    assert len(table.collectives) == 1 + 4 * 3
    assert all(call.collective_id is not None for call in table.ncclcalls)


def test_messages_by_tag_and_from_anybody_are_read_as_matched(analyze):
    def body(rank):
        if rank == 0:
            for _ in range(2):
                dist.recv(torch.empty(2))
            dist.recv(torch.empty(3), 1, tag=8)
            dist.recv(torch.empty(4), 1, tag=7)
        elif rank == 1:
            dist.send(torch.ones(2), 0)
            messages = [dist.isend(torch.ones(4), 0, tag=7), dist.isend(torch.ones(3), 0, tag=8)]
            for message in messages:
                message.wait()
        else:
            dist.send(torch.ones(2), 0)

    world = SimWorld(3, profile="gloo")
    world.run(session(body, "gloo"))
    said, table = analyze(world)
    assert said == ""
    assert len(table.collectives) == 4


def test_a_receive_without_a_send_is_named_by_the_analyzer(analyze):
    def body(rank):
        if rank == 2:
            dist.recv(torch.empty(2), 1)

    world = SimWorld(4)
    with pytest.raises(DeadlockError):
        world.run(session(body))
    said, _ = analyze(world)
    assert "missing ranks: {1}" in said
    assert "default_pg, 1 to 2" in said


def test_a_receive_from_anybody_without_a_send_names_all_others(analyze):
    def body(rank):
        if rank == 2:
            dist.recv(torch.empty(2))

    world = SimWorld(3, profile="gloo")
    with pytest.raises(DeadlockError):
        world.run(session(body, "gloo"))
    said, _ = analyze(world)
    assert "missing ranks: {0, 1}" in said


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda rank: dist.all_reduce(torch.ones(3 + (rank == 2))), "SIZE_OR_SYNTAX_MISMATCH"),
        (lambda rank: dist.all_reduce(torch.ones(3, dtype=[torch.float32, torch.int32][rank == 2])), "DTYPE_MISMATCH"),
        (lambda rank: dist.barrier() if rank == 2 else dist.all_reduce(torch.ones(3)), "COLLECTIVE_TYPE_MISMATCH"),
    ],
)
def test_a_mismatch_is_named_by_the_analyzer(call, error, analyze):
    world = SimWorld(4)
    with pytest.raises(CollectiveMismatchError):
        world.run(session(call))
    said, _ = analyze(world)
    assert "Culprit rank 2" in said
    assert error in said


def test_sizes_that_do_not_fit_in_an_all_to_all_are_named_by_the_analyzer(analyze):
    def body(rank):
        sent = [1, 1] if rank == 0 else [1, 2]
        dist.all_to_all_single(torch.empty(2), torch.ones(sum(sent)), [1, 1], sent)

    world = SimWorld(2)
    with pytest.raises(CollectiveMismatchError):
        world.run(session(body))
    said, _ = analyze(world)
    assert "Input/output mismatch" in said
    assert "total input numel: 5" in said
    assert "total output numel: 4" in said


def test_an_operation_is_complete_when_everybody_has_come_and_not_when_somebody_waits(tmp_path):
    def body(rank):
        work = dist.all_reduce(torch.ones(1), async_op=True)
        if rank == 0:
            work.wait()
        dist.monitored_barrier() if rank < 5 else None
        left = dist.isend(torch.ones(1), 1) if rank == 0 else dist.irecv(torch.empty(1), 0)
        dist.barrier()
        if rank == 0:
            left.wait()
            dist.all_reduce(torch.ones(1), async_op=True)

    world = SimWorld(2)
    with pytest.warns(SimWarning):
        world.run(session(body, "gloo"))
    states = [
        [(e["profiling_name"], e["state"], e["retired"]) for e in dump["entries"]] for dump in dumps(world, tmp_path)
    ]
    assert states[0] == [
        ("nccl:all_reduce", "completed", True),
        ("nccl:all_reduce_barrier", "completed", True),
        ("nccl:send 0->1", "completed", True),
        ("nccl:all_reduce_barrier", "completed", True),
        ("nccl:all_reduce", "scheduled", False),
    ]
    assert [state for _, state, _ in states[1]] == ["completed"] * 4


def states(world, folder):
    return [[entry["state"] for entry in dump["entries"]] for dump in dumps(world, folder)]


def test_an_operation_that_nobody_waits_for_is_complete_when_everybody_has_come(tmp_path):
    world = SimWorld(2)
    with pytest.warns(SimWarning):
        world.run(session(lambda rank: dist.all_reduce(torch.ones(1), async_op=True)))
    assert states(world, tmp_path) == [["completed"], ["completed"]]


def exchange_other_sizes(rank):
    sent = [1, 1] if rank == 0 else [1, 2]
    dist.all_to_all_single(torch.empty(2), torch.ones(sum(sent)), [1, 1], sent, async_op=True)


def reduce_other_shapes(rank):
    dist.all_reduce(torch.ones(1 + rank), async_op=True)


@pytest.mark.parametrize("call", [exchange_other_sizes, reduce_other_shapes])
def test_an_operation_that_does_not_fit_is_not_complete_though_everybody_has_come(call, tmp_path):
    world = SimWorld(2)
    with pytest.raises(CollectiveMismatchError):
        world.run(session(call))
    assert states(world, tmp_path) == [["scheduled"], ["scheduled"]]


def test_a_send_and_a_receive_with_different_tags_are_kept_apart(analyze):
    def body(rank):
        if rank == 0:
            dist.send(torch.ones(2), 1, tag=4)
        else:
            dist.recv(torch.ones(2), 0, tag=5)

    world = SimWorld(2, profile="gloo")
    with pytest.raises(DeadlockError):
        world.run(session(body, "gloo"))
    said, _ = analyze(world)
    assert "default_pg, 0 to 1, tag 4" in said
    assert "default_pg, 0 to 1, tag 5" in said


def test_lists_of_equal_tensors_are_recorded_as_one_tensor(tmp_path):
    def body(rank):
        root = rank == 1
        dist.gather(torch.ones(3), [torch.empty(3) for _ in range(2)] if root else None, dst=1)
        dist.scatter(torch.empty(3), [torch.ones(3) for _ in range(2)] if root else None, src=1)
        dist.reduce_scatter(torch.empty(3), [torch.ones(3) for _ in range(2)])
        dist.reduce_scatter_single(torch.empty(2), torch.ones(4))
        dist.all_gather_single(torch.empty(2, 3), torch.ones(1, 3))
        dist.all_to_all([torch.empty(rank + 1)] * 2, [torch.ones(1), torch.ones(2)])
        dist.all_reduce(torch.tensor(1.0))

    world = SimWorld(2)
    world.run(session(body))
    sizes = [[(e["input_sizes"], e["output_sizes"]) for e in dump["entries"]] for dump in dumps(world, tmp_path)]
    both = [([[2, 3]], [[3]]), ([[4]], [[2]]), ([[1, 3]], [[2, 1, 3]])]
    assert sizes[0] == [([[3]], []), ([], [[3]]), *both, ([[3]], [[2]]), ([[]], [[]])]
    assert sizes[1] == [([[3]], [[2, 3]]), ([[2, 3]], [[3]]), *both, ([[3]], [[4]]), ([[]], [[]])]


def test_entries_look_as_torch_writes_them(tmp_path):
    def body(rank):
        group = dist.new_group([1, 0], group_desc="tp")
        time.sleep(0 if rank else 5)
        dist.all_gather(
            [torch.empty(3, 2, dtype=torch.float16) for _ in range(2)], torch.ones(3, 2).half(), group=group
        )

    world = SimWorld(2)
    world.run(session(body))
    dump = dumps(world, tmp_path)[1]
    assert dump["version"] == "2.10"
    assert dump["pg_config"]["0"] == {"name": "0", "desc": "default_pg", "ranks": "[0, 1]"}
    name = next(name for name, config in dump["pg_config"].items() if config["desc"] == "tp")
    assert dump["pg_status"]["1"] == {
        "last_enqueued_collective": 1,
        "last_started_collective": 1,
        "last_completed_collective": 1,
    }
    (entry,) = dump["entries"]
    (frame,) = entry.pop("frames")
    assert (frame["name"], frame["filename"]) == ("body", __file__)
    created, completed = entry.pop("time_created_ns"), entry.pop("time_discovered_completed_ns")
    assert entry.pop("time_discovered_started_ns") == completed
    assert completed - created == pytest.approx(5e9, rel=0.01)
    assert entry == {
        "record_id": 0,
        "pg_id": 1,
        "process_group": (name, "tp"),
        "collective_seq_id": 1,
        "p2p_seq_id": 0,
        "op_id": 1,
        "profiling_name": "nccl:all_gather",
        "input_sizes": [[3, 2]],
        "input_dtypes": ["Half"],
        "output_sizes": [[2, 3, 2]],
        "output_dtypes": ["Half"],
        "state": "completed",
        "retired": True,
        "timeout_ms": 600_000,
        "is_p2p": False,
        "thread_id": "1",
        "thread_name": "rank 1",
    }


def test_entries_have_the_fields_that_torch_itself_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "10")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(1))
    real = pickle.loads(torch._C._distributed_c10d._dump_fr_trace())
    dist.destroy_process_group()
    world = SimWorld(1)
    world.run(session(lambda rank: dist.all_reduce(torch.ones(1))))
    (ours,) = dumps(world, tmp_path)
    assert ours.keys() == real.keys()
    assert ours["version"] == real["version"]
    assert ours["entries"][0].keys() == real["entries"][0].keys()
    (theirs,) = real["pg_config"].values()
    assert {key: type(value) for key, value in ours["pg_config"]["0"].items()} == dict.fromkeys(theirs, str)
    assert ours["pg_status"]["0"].keys() == real["pg_status"]["0"].keys()


def test_every_rank_has_a_file_even_if_it_did_nothing(tmp_path):
    world = SimWorld(3)
    assert [dump["entries"] for dump in dumps(world, tmp_path / "before")] == [[], [], []]
    world.run(session(lambda rank: None))
    after = dumps(world, tmp_path / "after")
    assert [dump["entries"] for dump in after] == [[], [], []]
    assert [list(dump["pg_config"]) for dump in after] == [["0"]] * 3
