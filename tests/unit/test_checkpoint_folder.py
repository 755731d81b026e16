"""The folder layer of checkpoints: whole or not there, rotated, found, the same on every rank."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from programs.file_faults import fault

from lightrft.errors import CheckpointError, ConfigError, RankFailedError, SimulationError
from lightrft.sim import SimWorld
from lightrft.strategy.utils.checkpoint_store import CheckpointStore
from lightrft.strategy.utils.checkpoints import CheckpointFolder
from lightrft.strategy.utils.hidden_names import Owner

SIZES = [1, 2, 4]
EVERY = {1: 1, 2: 3, 4: 7}
"""In a world of a size, each or each n-th call is made to fail."""


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test waits for a disk: what would be lost without syncing is told by the faults."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def save(save_dir, tag, value, *, steps=0, **options):
    """Save a checkpoint that holds ``value`` in a file of each rank and in the client state."""
    folder = CheckpointFolder(save_dir)
    options = {"backend": "fsdp", "client_state": {"value": value}, **options}
    with folder.saving(tag, steps=steps, **options) as path:
        (path / "shards").mkdir(exist_ok=True)
        (path / f"shards/{folder.ranks.rank}.bin").write_bytes(bytes([value]) * 1000)


def held(save_dir, tag=None):
    """The value that is found, having looked at every file of it."""
    folder = CheckpointFolder(save_dir)
    path = folder.find(tag)
    value = folder.load_client_state(path)["value"]
    shards = sorted((path / "shards").iterdir())
    assert len(shards) == folder.info(path).world_size
    assert all(shard.read_bytes() == bytes([value]) * 1000 for shard in shards)
    return value


def tags(save_dir):
    return [info.tag for info in CheckpointFolder(save_dir).checkpoints()]


def leftovers(save_dir):
    return sorted(path.name for path in Path(save_dir).iterdir() if path.name.startswith("."))


def on_ranks(size, body, **options):
    """Run ``body()`` on ``size`` ranks that have a group; what it returns, by rank."""

    def main():
        dist.init_process_group("gloo")
        result = body()
        dist.destroy_process_group()
        return result

    return SimWorld(size, stall_limit=15, **options).run(main)


def caught(body):
    """Class and text of the error that ``body()`` raises; ``None`` if it raises none."""
    try:
        body()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return type(error).__name__, str(error)
    return None


# -- saved and found ---------------------------------------------------------------------------------------------------


def test_a_rank_alone_saves_and_finds_without_a_process_group(tmp_path):
    assert not dist.is_initialized()
    folder = CheckpointFolder(tmp_path / "deep" / "down")
    with folder.saving("step1", backend="fsdp", steps=7) as path:
        assert path.parent == folder.save_dir
        assert not (folder.save_dir / "step1").exists()
        (path / "weights").write_bytes(b"abc")
    assert folder.find() == folder.find("step1") == tmp_path / "deep" / "down" / "step1"
    assert (folder.find() / "weights").read_bytes() == b"abc"
    assert (tmp_path / "deep/down/latest").read_text() == "step1\n"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("schedule", ["fifo", "random"])
def test_all_ranks_save_into_one_folder_and_find_it(tmp_path, size, schedule):
    def body():
        save(tmp_path, "a", 1)
        save(tmp_path, "b", 2)
        return held(tmp_path), held(tmp_path, "a")

    assert on_ranks(size, body, schedule=schedule, seed=size) == [(2, 1)] * size
    assert leftovers(tmp_path) == []


def test_lightrft_json_says_what_the_folder_holds(tmp_path):
    on_ranks(2, lambda: save(tmp_path, "a", 1, steps=9, backend="deepspeed"))
    info = CheckpointFolder(tmp_path).info(tmp_path / "a")
    assert (info.tag, info.backend, info.world_size, info.steps) == ("a", "deepspeed", 2, 9)
    sizes = {name: (tmp_path / "a" / name).stat().st_size for name in info.files}
    assert info.files == sizes
    expected = {"client_state.pt", "random_state/rank_00000.pt", "random_state/rank_00001.pt"}
    assert set(sizes) == expected | {"shards/0.bin", "shards/1.bin"}
    written = json.loads((tmp_path / "a/lightrft.json").read_text())
    assert written["bytes"] == info.bytes == sum(sizes.values())
    assert written["format_version"] == 1


@pytest.mark.parametrize(("size", "later"), [(1, 4), (4, 2), (2, 1)])
def test_f19_what_one_world_saved_another_finds(tmp_path, size, later):
    on_ranks(size, lambda: save(tmp_path, "a", 7))
    assert on_ranks(later, lambda: (held(tmp_path), CheckpointFolder(tmp_path).find().name)) == [(7, "a")] * later


def test_a_subgroup_saves_for_itself(tmp_path):
    def body():
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        which = dist.get_rank() // 2
        folder = CheckpointFolder(tmp_path / str(which), pairs[which])
        with folder.saving("a", backend="fsdp", steps=0, client_state={"pair": which}):
            pass
        path = folder.find()
        return folder.info(path).world_size, folder.load_client_state(path)

    assert on_ranks(4, body) == [(2, {"pair": 0})] * 2 + [(2, {"pair": 1})] * 2


def test_several_ranks_need_a_process_group(tmp_path):
    with pytest.raises(ConfigError, match="world_size=2, but there is no process group"):
        CheckpointFolder(tmp_path, rank=0, world_size=2)
    with pytest.raises(ConfigError, match="rank=2: expected a rank of a world of 2"):
        CheckpointFolder(tmp_path, rank=2, world_size=2)


@pytest.mark.parametrize(
    "tag",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/abs",
        "latest",
        "Latest",
        ".hidden",
        "-rf",
        "a b",
        "a\n",
        "x" * 101,
        "é",
        7,
    ],
)
def test_k13_an_unsafe_tag_is_refused_before_anything_is_written(tmp_path, tag):
    folder = CheckpointFolder(tmp_path / "new")
    with (
        pytest.raises(ConfigError, match="cannot name a checkpoint"),
        folder.saving(tag, backend="fsdp", steps=0),
    ):
        pytest.fail("the block was entered")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="cannot name a checkpoint"):
        folder.find(tag)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num": 0}, "max_num=0: expected at least 1"),
        ({"max_num": True}, "max_num=True"),
        ({"max_mem": 0}, "max_mem=0: expected a number of GB above 0"),
        ({"max_mem": float("nan")}, "max_mem=nan"),
        ({"steps": -1}, "steps=-1"),
        ({"client_state": [1]}, "client_state is a list: expected a mapping"),
    ],
)
def test_k13_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        save(tmp_path / "new", "a", 1, **options)
    assert not (tmp_path / "new").exists()


def test_k13_what_lightrft_did_not_write_is_not_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/text").write_text("mine")
    (tmp_path / "file").write_text("mine")
    save(tmp_path / "elsewhere", "a", 1)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/a")
    for tag in ("notes", "file", "link"):
        with pytest.raises(ConfigError, match=f"{tag} exists and is no checkpoint of lightrft"):
            save(tmp_path, tag, 1)
    assert (tmp_path / "notes/text").read_text() == (tmp_path / "file").read_text() == "mine"
    assert held(tmp_path / "elsewhere") == 1
    assert leftovers(tmp_path) == []


def test_k13_a_place_that_is_taken_meanwhile_is_not_replaced(tmp_path):
    folder = CheckpointFolder(tmp_path)

    def body():
        with folder.saving("a", backend="fsdp", steps=0):
            (tmp_path / "a").mkdir()
            (tmp_path / "a/text").write_text("mine")

    with pytest.raises(ConfigError, match="is no checkpoint of lightrft"):
        body()
    assert (tmp_path / "a/text").read_text() == "mine"
    assert leftovers(tmp_path) == []


# -- what find says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_k13_every_rank_is_told_what_is_there_when_nothing_is_found(tmp_path, size):
    def said(save_dir, tag=None):
        errors = on_ranks(size, lambda: caught(lambda: CheckpointFolder(save_dir).find(tag)))
        assert errors == [errors[0]] * size
        assert errors[0] is not None
        assert errors[0][0] == "CheckpointError"
        return errors[0][1]

    assert "nowhere is no folder" in said(tmp_path / "nowhere")
    assert "has no file 'latest': there is none" in said(tmp_path)
    assert "has no checkpoint 'x': there is none" in said(tmp_path, "x")
    save(tmp_path, "a", 1)
    save(tmp_path, "b", 2)
    assert "has no checkpoint 'x': complete checkpoints there are a, b; pass one as tag" in said(tmp_path, "x")
    (tmp_path / "plain").mkdir()
    assert "it has no lightrft.json" in said(tmp_path, "plain")
    (tmp_path / "latest").write_text("gone\n")
    assert "has no checkpoint 'gone', which the file 'latest' names: complete checkpoints there are a, b" in said(
        tmp_path
    )
    (tmp_path / "latest").write_text("../../etc\n")
    assert "latest holds no tag of a checkpoint" in said(tmp_path)
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert "latest holds no tag of a checkpoint" in said(tmp_path)


def test_k13_without_latest_the_newest_that_was_to_be_latest_is_found(tmp_path):
    for value, tag in enumerate("ab"):
        save(tmp_path, tag, value)
    save(tmp_path, "c", 2, save_latest=False)
    (tmp_path / "latest").unlink()
    assert held(tmp_path) == 1
    save(tmp_path / "other", "c", 2, save_latest=False)
    with pytest.raises(CheckpointError, match="has no file 'latest': complete checkpoints there are c"):
        held(tmp_path / "other")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], r"lightrft\.json cannot be read"),
        (lambda _: "", r"lightrft\.json cannot be read"),
        (lambda _: "[]", r"lightrft\.json has format version None, expected 1"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "has format version 2, expected 1"),
        (lambda text: text.replace('"world_size": 1', '"world_size": "1"'), "is damaged: world_size is '1'"),
        (lambda text: text.replace('"steps"', '"stops"'), "is damaged: steps is None"),
        (lambda text: text.replace('"files": {', '"files": {"a": "b",'), "files has sizes that are no numbers"),
    ],
)
def test_k13_a_damaged_lightrft_json_is_named(tmp_path, damage, message):
    save(tmp_path, "good", 1)
    save(tmp_path, "bad", 2)
    file = tmp_path / "bad/lightrft.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(CheckpointError, match=message) as raised:
        held(tmp_path)
    assert "complete checkpoints there are good" in str(raised.value)
    with pytest.raises(CheckpointError, match=message):
        CheckpointFolder(tmp_path).load_client_state(tmp_path / "bad")
    assert held(tmp_path, "good") == 1


def test_k13_files_that_are_cut_or_gone_are_named(tmp_path):
    save(tmp_path, "a", 1)
    os.truncate(tmp_path / "a/shards/0.bin", 999)
    with pytest.raises(CheckpointError, match=r"a is incomplete: shards/0.bin has 999 bytes, expected 1000"):
        held(tmp_path)
    (tmp_path / "a/shards/0.bin").unlink()
    with pytest.raises(CheckpointError, match=r"a is incomplete: shards/0.bin is missing, expected 1000 bytes"):
        held(tmp_path)


# -- rotation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_k13_max_num_counts_the_new_one_and_the_oldest_go_first(tmp_path, size):
    def body():
        for value, tag in enumerate(["z", "a", "m", "b"]):
            save(tmp_path, tag, value, steps=100 - value, max_num=2)

    on_ranks(size, body)
    assert tags(tmp_path) == ["m", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "latest", "m"]


def test_k13_an_unlimited_number_is_kept_when_asked(tmp_path):
    for value in range(5):
        save(tmp_path, f"t{value}", value, max_num=None, max_mem=None)
    assert len(tags(tmp_path)) == 5


def test_k13_the_order_is_that_of_saving_also_when_the_clock_goes_back(tmp_path, monkeypatch):
    for value, now in enumerate([3000.0, 2000.0, 1000.0]):
        monkeypatch.setattr("time.time", lambda now=now: now)
        save(tmp_path, f"t{value}", value, steps=10 - value, max_num=2)
    assert tags(tmp_path) == ["t1", "t2"]


def test_k13_max_mem_counts_the_bytes_of_all(tmp_path):
    save(tmp_path, "a", 1)
    one = CheckpointFolder(tmp_path).checkpoints()[0].bytes
    for tag in "bcd":
        save(tmp_path, tag, 2, max_num=None, max_mem=2.5 * one / 10**9)
    assert tags(tmp_path) == ["c", "d"]
    save(tmp_path, "e", 3, max_num=None, max_mem=3 * one / 10**9)
    assert tags(tmp_path) == ["c", "d", "e"]


def test_k13_the_newest_is_kept_even_if_it_is_too_large_and_that_is_said(tmp_path):
    save(tmp_path, "a", 1)
    with pytest.warns(UserWarning, match=r"have to stay in .* \(b\) are larger together than max_mem allows"):
        save(tmp_path, "b", 2, max_mem=1e-9)
    assert tags(tmp_path) == ["b"]
    assert held(tmp_path) == 2


def test_k13_save_latest_false_leaves_latest_and_what_it_names(tmp_path):
    save(tmp_path, "a", 1, max_num=1)
    for value, tag in enumerate("bcd"):
        save(tmp_path, tag, value, max_num=1, save_latest=False)
        assert (tmp_path / "latest").read_text() == "a\n"
        assert tags(tmp_path) == ["a", tag]
    assert held(tmp_path) == 1


def test_k13_rotation_deletes_only_what_lightrft_wrote_here(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("x")
    save(tmp_path, "a", 1)
    save(tmp_path / "elsewhere", "linked", 5)
    (tmp_path / "a").rename(tmp_path / "best")  # whoever renames one wants to keep it
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere/linked")
    save(tmp_path, "damaged", 2)
    (tmp_path / "damaged/lightrft.json").write_text("{")
    save(tmp_path, "newer", 2)
    newer = tmp_path / "newer/lightrft.json"
    newer.write_text(newer.read_text().replace('"format_version": 1', '"format_version": 2'))
    for value, tag in enumerate("uvw"):
        save(tmp_path, tag, value, max_num=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mine", "best", "linked", "elsewhere", "damaged", "newer", "w", "latest"}
    assert held(tmp_path, "best") == 1
    assert held(tmp_path / "elsewhere") == 5


def test_k13_old_ones_go_only_after_the_new_one_is_complete(tmp_path):
    save(tmp_path, "a", 1, max_num=1)
    folder = CheckpointFolder(tmp_path)
    with folder.saving("b", backend="fsdp", steps=1, max_num=1):
        assert held(tmp_path) == 1
    with pytest.raises(CheckpointError), folder.saving("c", backend="fsdp", steps=1, max_num=1):
        raise OSError("disk full")
    assert tags(tmp_path) == ["b"]


def test_k13_one_that_cannot_be_deleted_is_a_warning_and_the_new_one_is_saved(tmp_path, monkeypatch):
    save(tmp_path, "a", 1, max_num=1)

    def refuse(path):
        raise PermissionError(13, "not yours", str(path))

    monkeypatch.setattr("lightrft.strategy.utils.checkpoint_store.delete", refuse)
    with pytest.warns(UserWarning, match=r"deleting.*\.a could not be deleted .*not yours"):
        save(tmp_path, "b", 2, max_num=1)
    assert held(tmp_path) == 2
    monkeypatch.undo()
    save(tmp_path, "c", 3, max_num=1)
    assert leftovers(tmp_path) == []


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


# -- client state and scheduler ----------------------------------------------------------------------------------------


class Settings:
    """An object that only pickle can bring back."""

    def __init__(self, rate):
        self.rate = rate


@pytest.mark.parametrize("size", SIZES)
def test_k14_client_state_and_scheduler_are_written_once_and_come_back_on_every_rank(tmp_path, size):
    weight = torch.nn.Parameter(torch.ones(1))

    def body():
        scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([weight], lr=0.5), 3)
        state = {"samples": 7, "name": "x", "nested": {"t": torch.arange(3), "list": [1, None, 2.5]}}
        folder = CheckpointFolder(tmp_path)
        settings = {"client_state": state, "scheduler_state": scheduler.state_dict()}
        with folder.saving("a", backend="fsdp", steps=0, **settings):
            pass
        path = folder.find()
        return folder.load_client_state(path), folder.load_scheduler_state(path)

    for client, scheduler in on_ranks(size, body):
        assert torch.equal(client["nested"].pop("t"), torch.arange(3))
        assert client == {"samples": 7, "name": "x", "nested": {"list": [1, None, 2.5]}}
        assert scheduler["step_size"] == 3
        assert scheduler["base_lrs"] == [0.5]
    info = CheckpointFolder(tmp_path).checkpoints()[0]
    assert sorted(name for name in info.files if "/" not in name) == ["client_state.pt", "scheduler.pt"]
    assert info.pickled == ()


def test_k14_the_client_state_of_rank_0_is_the_one_that_is_written(tmp_path):
    def body():
        rank = dist.get_rank()
        folder = CheckpointFolder(tmp_path)
        with folder.saving("a", backend="fsdp", steps=0, client_state={"rank": rank}):
            pass
        return folder.load_client_state(folder.find())

    assert on_ranks(2, body) == [{"rank": 0}] * 2


def test_k14_without_client_state_and_scheduler_nothing_is_written_for_them(tmp_path):
    save(tmp_path, "a", 1, client_state=None)
    folder = CheckpointFolder(tmp_path)
    assert folder.load_client_state(folder.find()) == {}
    assert folder.load_scheduler_state(folder.find()) is None
    assert not list(tmp_path.glob("a/*.pt"))


def test_k14_objects_that_need_pickle_come_back_and_are_marked(tmp_path):
    args = argparse.Namespace(rate=3)
    save(tmp_path, "a", 1, client_state={"args": args}, scheduler_state={"rate": 1})
    folder = CheckpointFolder(tmp_path)
    assert folder.load_client_state(folder.find()) == {"args": args}
    assert folder.info(folder.find()).pickled == ("client_state.pt",)
    assert folder.load_scheduler_state(folder.find()) == {"rate": 1}


def test_k14_a_file_that_was_saved_plain_is_never_unpickled(tmp_path):
    save(tmp_path, "a", 1)
    torch.save({"args": argparse.Namespace()}, tmp_path / "a/client_state.pt")
    with pytest.raises(CheckpointError, match=r"client_state\.pt cannot be read"):
        CheckpointFolder(tmp_path).load_client_state(tmp_path / "a")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["client_state", "scheduler_state"])
def test_k14_a_state_that_cannot_be_pickled_is_an_error_before_anything_is_written(tmp_path, size, name):
    def body():
        state = {name: {"f": lambda: 1}}
        return caught(lambda: save(tmp_path / "new", "a", 1, **state))

    errors = on_ranks(size, body)
    assert errors == [errors[0]] * size
    assert errors[0] is not None
    assert errors[0][0] == "CheckpointError"
    file = "client_state.pt" if name == "client_state" else "scheduler.pt"
    assert f"what is to be written to {file} cannot be pickled" in errors[0][1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["client_state.pt", "scheduler.pt"])
def test_k14_a_damaged_state_is_named(tmp_path, name):
    save(tmp_path, "a", 1, scheduler_state={"rate": 1})
    (tmp_path / "a" / name).write_bytes(b"nothing")
    folder = CheckpointFolder(tmp_path)
    load = folder.load_client_state if name == "client_state.pt" else folder.load_scheduler_state
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        load(tmp_path / "a")


def test_the_store_can_be_used_by_a_script_without_ranks(tmp_path):
    save(tmp_path, "a", 1)
    assert CheckpointStore(tmp_path).find(None) == tmp_path / "a"


def test_an_interrupt_is_not_made_an_error_of_the_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt), folder.saving("a", backend="fsdp", steps=0):
        raise KeyboardInterrupt
    assert tags(tmp_path) == []
    save(tmp_path, "a", 1)
    assert leftovers(tmp_path) == []


def test_rank_failures_outside_of_the_block_stay_what_they_are(tmp_path):
    def body():
        save(tmp_path, "a", 1)
        raise ZeroDivisionError

    with pytest.raises(RankFailedError):
        on_ranks(2, body)
    assert held(tmp_path) == 1
