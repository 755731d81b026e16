"""Checkpoints of ranks that stop in the middle, and of calls that fail."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch.distributed as dist
from checkpoint_ranks import (
    SIZES,
    caught,
    held,
    leftovers,
    on_ranks,
    quick_disk,  # noqa: F401 - a fixture of every test
    save,
    tags,
)
from programs.file_faults import fault

from lightrft.errors import CheckpointError, SimulationError
from lightrft.sim import SimWorld
from lightrft.strategy.utils.checkpoints import CheckpointFolder
from lightrft.strategy.utils.hidden_names import Owner

EVERY = {1: 1, 2: 3, 4: 7}
"""In a world of a size, each or each n-th call is made to fail."""


# -- the machine stops in the middle -----------------------------------------------------------------------------------


SITUATIONS = {
    "the first": ([], {"tag": "new"}),
    "another tag": (["old"], {"tag": "new"}),
    "the same tag": (["old"], {"tag": "old"}),
    "the same tag among others": (["other", "old"], {"tag": "old", "max_num": 2}),
    "rotation": (["older", "old"], {"tag": "new", "max_num": 1}),
    "latest stays": (["old"], {"tag": "new", "save_latest": False}),
}


def prepared(save_dir, existing):
    for number, tag in enumerate(existing):
        save(save_dir, tag, 10 + number)
    return 9 + len(existing) if existing else None


@pytest.mark.slow
@pytest.mark.parametrize("situation", SITUATIONS)
def test_k13_wherever_the_machine_stops_a_good_checkpoint_is_found_and_the_next_save_cleans_up(tmp_path, situation):
    existing, options = SITUATIONS[situation]
    found = set()
    for at in itertools.count():
        save_dir = tmp_path / str(at)
        save_dir.mkdir()
        last = prepared(save_dir, existing)
        with fault(save_dir, at, stops=True) as faults:
            save(save_dir, value=99, **options)
        value = found_after(save_dir, last, options)
        tag = value and CheckpointFolder(save_dir).info(CheckpointFolder(save_dir).find()).tag
        found.add(value)
        save(save_dir, "next", 50, max_num=None)
        assert held(save_dir) == 50
        assert leftovers(save_dir) == []
        assert value is None or held(save_dir, tag) == value
        if not faults.struck:
            break
    assert at > 25
    assert found == ({last} if situation == "latest stays" else {last, 99})


def found_after(save_dir, last, options):
    """What is found after the machine stopped: the last good one or the new one, whole."""
    if last is None and caught(lambda: CheckpointFolder(save_dir).find()):
        return None
    value = held(save_dir)
    assert value in (last, 99)
    for info in CheckpointFolder(save_dir).checkpoints():
        held(save_dir, info.tag)  # every one that is listed is whole
    return value


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_k13_wherever_a_rank_stops_the_last_good_one_is_found(tmp_path, size):
    found = set()
    for at in itertools.count(0, EVERY[size]):
        save_dir = tmp_path / str(at)
        save_dir.mkdir()
        on_ranks(size, lambda save_dir=save_dir: save(save_dir, "old", 10))
        with fault(save_dir, at, stops=True) as faults:
            try:
                on_ranks(size, lambda save_dir=save_dir: save(save_dir, "old", 99))
            except SimulationError:
                assert faults.struck
        values = on_ranks(size, lambda save_dir=save_dir: held(save_dir))
        assert values == [values[0]] * size
        found.add(values[0])
        on_ranks(size, lambda save_dir=save_dir: save(save_dir, "next", 50))
        assert leftovers(save_dir) == []
        if not faults.struck:
            break
    assert at > 30
    assert found == {10, 99}


KILLED = """
import os, signal, sys
from lightrft.strategy.utils.checkpoints import CheckpointFolder
with CheckpointFolder(sys.argv[1]).saving("new", backend="fsdp", steps=2) as path:
    (path / "weights").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_k13_what_a_killed_process_leaves_is_cleaned_by_the_next_save_on_this_machine(tmp_path):
    save(tmp_path, "old", 1)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    assert held(tmp_path) == 1
    save(tmp_path, "new", 2)
    assert leftovers(tmp_path) == []


def test_k13_leftovers_of_others_that_may_live_are_not_touched(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("RANK", "0")
    me = Owner.me()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owners = {
        "lives": f"77.{me.host}.{os.getppid()}-0",
        "other-rank": f"77.{me.host}.{me.pid}-1",
        "other-job": "78.elsewhere.5-0",
        "no-job": "none.elsewhere.5-0",
    }
    gone = {"dead": f"78.{me.host}.{ended.pid}-0", "earlier": "77.elsewhere.5-0", "me": f"77.{me.host}.{me.pid}-0"}
    for kind in ("saving", "deleting"):
        for tag, owner in (owners | gone).items():
            (tmp_path / f".lightrft-{kind}.{owner}.{tag}").mkdir()
    (tmp_path / f".lightrft-latest.{gone['me']}.me").write_text("me")
    (tmp_path / ".lightrft-notes").mkdir()
    (tmp_path / ".hidden").mkdir()
    save(tmp_path, "a", 1)
    stay = {f".lightrft-{kind}.{owner}.{tag}" for kind in ("saving", "deleting") for tag, owner in owners.items()}
    assert set(leftovers(tmp_path)) == stay | {".lightrft-notes", ".hidden"}


def test_k13_without_a_job_leftovers_of_other_machines_are_not_touched(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    (tmp_path / ".lightrft-saving.none.elsewhere.5-0.x").mkdir()
    save(tmp_path, "a", 1)
    assert leftovers(tmp_path) == [".lightrft-saving.none.elsewhere.5-0.x"]


def test_k13_one_that_another_process_is_replacing_is_found_and_left_alone(tmp_path):
    save(tmp_path, "a", 1)
    me = Owner.me()
    aside = tmp_path / f".lightrft-replaced.none.{me.host}.{os.getppid()}-0.a"
    (tmp_path / "a").rename(aside)
    assert held(tmp_path) == held(tmp_path, "a") == 1
    save(tmp_path, "b", 2)
    assert leftovers(tmp_path) == [aside.name]


def test_ranks_that_save_alone_into_one_folder_do_not_disturb_each_other(tmp_path):
    def body():
        folder = CheckpointFolder(tmp_path, rank=0, world_size=1)
        with folder.saving(f"rank{dist.get_rank()}", backend="fsdp", steps=0, max_num=None) as path:
            dist.barrier()
            (path / "weights").write_bytes(b"x")
            dist.barrier()

    on_ranks(4, body)
    assert sorted(tags(tmp_path)) == [f"rank{rank}" for rank in range(4)]


# -- something fails ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*could not be deleted", "ignore:.*old ones were not deleted")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tag", ["old", "new"])
def test_f19_whatever_call_fails_every_rank_raises_after_the_same_collectives_and_all_is_as_before(tmp_path, size, tag):
    outcomes = set()
    for at in itertools.count(0, EVERY[size]):
        save_dir = tmp_path / str(at)
        save_dir.mkdir()
        on_ranks(size, lambda save_dir=save_dir: save(save_dir, "old", 10))
        world = SimWorld(size, stall_limit=15)

        def main(save_dir=save_dir):
            dist.init_process_group("gloo")
            error = caught(lambda: save(save_dir, tag, 99, max_num=1))
            dist.destroy_process_group()
            return error

        with fault(save_dir, at, stops=False) as faults:
            errors = world.run(main)
        assert errors == [errors[0]] * size
        calls = [[event.operation for event in world.trace if event.rank == rank] for rank in range(size)]
        assert calls == [calls[0]] * size
        saved = errors[0] is None or "may not be on the disk" in errors[0][1]
        outcomes.add(saved)
        assert errors[0] is None or (errors[0][0] == "CheckpointError" and "injected" in errors[0][1])
        assert held(save_dir) == (99 if saved else 10)
        if not saved:
            assert (tags(save_dir), leftovers(save_dir)) == (["old"], [])
        if not faults.struck:
            break
    assert at > 25
    assert outcomes == {True, False}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("failing", [0, 1])
def test_f19_an_error_in_the_block_of_one_rank_is_an_error_of_all(tmp_path, size, failing):
    def body():
        folder = CheckpointFolder(tmp_path)
        with folder.saving("a", backend="fsdp", steps=0):
            if dist.get_rank() == failing:
                raise ZeroDivisionError("by zero")

    errors = on_ranks(size, lambda: caught(body))
    text = f"the checkpoint 'a' was not saved in {tmp_path}: rank {failing}: ZeroDivisionError: by zero"
    assert errors == [("CheckpointError", text)] * size
    assert list(tmp_path.iterdir()) == []


def test_f19_the_error_of_the_block_is_the_cause(tmp_path):
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(CheckpointError) as raised, folder.saving("a", backend="fsdp", steps=0):
        raise ZeroDivisionError("by zero")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_f19_many_failing_ranks_are_told_in_short(tmp_path):
    def body():
        with CheckpointFolder(tmp_path).saving("a", backend="fsdp", steps=0):
            raise OSError(f"disk {dist.get_rank()} full")

    (_, text), *others = on_ranks(7, lambda: caught(body))
    assert text.endswith(
        "rank 0: OSError: disk 0 full; rank 1: OSError: disk 1 full; rank 2: OSError: disk 2 full; "
        "rank 3: OSError: disk 3 full; and 3 more ranks"
    )
    assert all(other == ("CheckpointError", text) for other in others)


def test_f19_ranks_that_ask_for_different_checkpoints_are_told_so(tmp_path):
    def saving(**changed):
        settings = {"tag": "a", "steps": 1, "max_num": 3, **(changed if dist.get_rank() == 1 else {})}
        return caught(lambda: save(tmp_path, value=1, **settings))

    for changed in ({"tag": "b"}, {"steps": 2}, {"max_num": 2}, {"max_mem": 5}, {"save_latest": False}):
        name, value = next(iter(changed.items()))
        errors = on_ranks(2, lambda changed=changed: saving(**changed))
        assert errors[0] == errors[1]
        assert errors[0][0] == "ConfigError"
        assert f"{name} is " in errors[0][1]
        assert f"{value!r} on rank 1; expected the same on all ranks" in errors[0][1]
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, "a", 1)
    errors = on_ranks(2, lambda: caught(lambda: held(tmp_path, "a" if dist.get_rank() else None)))
    assert errors[0] == errors[1]
    assert "tag is None on rank 0 and 'a' on rank 1" in errors[0][1]


def test_f19_a_subset_of_the_ranks_that_saves_is_reported_and_nothing_is_saved(tmp_path):
    def body():
        if dist.get_rank() == 0:
            save(tmp_path, "a", 1)

    with pytest.raises(SimulationError):
        on_ranks(2, body)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [2, 4])
def test_f19_nodes_that_do_not_share_the_folder_are_told_so(tmp_path, size):
    """Each rank has a folder of its own, as on nodes that have only local disks."""

    def body():
        return caught(lambda: save(tmp_path / f"disk{dist.get_rank()}", "a", 1))

    errors = on_ranks(size, body)
    assert all(error is not None and error[0] == "CheckpointError" for error in errors)
    assert "save_dir has to be a folder on a file system that all nodes share" in errors[0][1]
    assert "rank 0: " not in errors[0][1]
    assert list((tmp_path / "disk0").iterdir()) == []


def test_f19_rank_0_tells_what_it_does_not_see_of_the_others(tmp_path):
    """The folder in which rank 1 has begun to write is replaced under its feet, as by a network that is cut."""

    def body():
        rank = dist.get_rank()
        folder = CheckpointFolder(tmp_path / ("link" if rank == 1 else "disk"))
        with folder.saving("a", backend="fsdp", steps=0) as path:
            dist.barrier()
            if rank == 1:
                (tmp_path / "link").unlink()
                (tmp_path / "link" / path.name).mkdir(parents=True)
            dist.barrier()

    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    errors = on_ranks(2, lambda: caught(body))
    said = "does not show what rank 1 wrote: save_dir has to be shared by all nodes"
    assert [error[1].endswith(said) for error in errors] == [True, True]
    assert list((tmp_path / "disk").iterdir()) == []


def test_f19_a_rank_that_does_not_see_what_is_loaded_is_told_so(tmp_path):
    save(tmp_path / "disk0", "a", 1)
    errors = on_ranks(2, lambda: caught(lambda: CheckpointFolder(tmp_path / f"disk{dist.get_rank()}").find()))
    assert ["which rank 0 sees on" in error[1] for error in errors] == [True, True]


def test_f19_a_file_system_that_shows_new_folders_late_is_waited_for(tmp_path):
    """Rank 1 looks through a link that comes into being while it waits."""
    (tmp_path / "disk").mkdir()

    def body():
        rank = dist.get_rank()
        folder = CheckpointFolder(tmp_path / ("late" if rank == 1 else "disk"))
        if rank == 0:
            import threading
            import time

            def show():
                time.sleep(5)
                (tmp_path / "late").symlink_to(tmp_path / "disk")

            threading.Thread(target=show).start()
        with folder.saving("a", backend="fsdp", steps=0) as path:
            (path / f"{rank}").write_bytes(b"x")
        return folder.find().name

    assert on_ranks(2, body) == ["a", "a"]


def test_f19_a_damaged_state_on_one_rank_is_an_error_of_all(tmp_path):
    on_ranks(2, lambda: save(tmp_path, "a", 1))
    (tmp_path / "a/random_state/rank_00001.pt").write_bytes(b"PK")

    def body():
        folder = CheckpointFolder(tmp_path)
        return caught(lambda: folder.restore_random_state(tmp_path / "a"))

    errors = on_ranks(2, body)
    assert errors[0] == errors[1]
    assert "rank 1: " in errors[0][1]
    assert "rank_00001.pt" in errors[0][1]
