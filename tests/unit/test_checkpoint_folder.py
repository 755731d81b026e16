"""Checkpoints in a folder: saved, found, rotated."""

from __future__ import annotations

import json
import os

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

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.utils.checkpoints import CheckpointFolder

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
