"""What DeepspeedStrategy writes and reads: frozen parameters, earlier checkpoints, frozen models, files that fail."""

import functools

import pytest
import torch
import torch.distributed as dist
from programs import tiny
from programs.zero_strategy import farthest, make, run, train, weights
from safetensors.torch import load_file

from lightrft.errors import CheckpointError
from lightrft.strategy.deepspeed import saved
from lightrft.strategy.fsdp.fsdp_checkpoint import read_metadata
from lightrft.strategy.utils.ckpt_scripts.conversion import Conversion, convert

pytestmark = pytest.mark.filterwarnings("ignore")  # of deepspeed, and of torch about what it calls
STAGES = pytest.mark.parametrize("stage", [1, 2, 3])


def _frozen_first(model):
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)


def _prepared(strategy, seed=0, freeze=None):
    model = tiny.transformer(seed=seed)
    if freeze is not None:
        freeze(model)
    return strategy.prepare((model, strategy.create_optimizer(model, lr=0.01), None))[:2]


# -- Other parameters are trained -------------------------------------------------------------------------------------


def _trains_what_was_frozen(stage, other, folder):
    strategy = make(stage)
    model, optimizer = _prepared(strategy, 1, _frozen_first)
    train(strategy, model, optimizer)
    strategy.save_ckpt(model, folder)
    expected = weights(strategy, model)
    strategy = make(other)
    model, optimizer = _prepared(strategy)
    strategy.load_ckpt(model, folder)
    loaded = farthest(weights(strategy, model), expected)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-7
    train(strategy, model, optimizer, steps=1)
    return loaded, farthest(weights(strategy, model), expected)


@STAGES
@pytest.mark.parametrize("other", [1, 3])
def test_a_parameter_that_was_frozen_when_saved_is_restored_where_it_is_trained(stage, other, tmp_path):
    loaded, after_a_step = run(2, _trains_what_was_frozen, stage, other, tmp_path)
    assert loaded == 0
    assert after_a_step < 1e-5


# -- Going back -------------------------------------------------------------------------------------------------------


def _goes_back(stage, offload, folder):
    strategy = make(stage, adam_offload=offload)
    model, optimizer = _prepared(strategy)
    strategy.save_ckpt(model, folder, "start")
    train(strategy, model, optimizer, steps=3)
    first = weights(strategy, model)
    strategy.load_ckpt(model, folder, "start")
    train(strategy, model, optimizer, steps=3)
    return farthest(weights(strategy, model), first)


@STAGES
@pytest.mark.parametrize("offload", [False, True])
def test_f18_after_going_back_to_the_start_the_optimizer_has_no_states_of_later_steps(stage, offload, tmp_path):
    assert run(2, _goes_back, stage, offload, tmp_path) == 0


# -- Frozen models ----------------------------------------------------------------------------------------------------


def _frozen_model(stage, other, trained, folder):
    strategy = make(stage)
    if trained:
        model, optimizer = _prepared(strategy, 1)
        train(strategy, model, optimizer, steps=1)
    else:
        model = strategy.prepare(tiny.transformer(seed=1).requires_grad_(False))
    strategy.save_ckpt(model, folder, client_state={"step": 1})
    expected = weights(strategy, model)
    strategy = make(other)
    reference = strategy.prepare(tiny.transformer().requires_grad_(False))
    ids = tiny.batch(0, 0)
    with torch.no_grad():
        reference(ids)
        _, client = strategy.load_ckpt(reference, folder)
        plain = tiny.transformer()
        plain.load_state_dict(expected)
        same = torch.equal(reference(ids), plain(ids))
    return farthest(weights(strategy, reference), expected), same, client


@STAGES
@pytest.mark.parametrize("other", [1, 3])
@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_model_takes_weights_from_a_checkpoint(stage, other, trained, tmp_path):
    assert run(2, _frozen_model, stage, other, trained, tmp_path) == (0, True, {"step": 1})


def _needs_states(stage, folder):
    strategy = make(stage)
    strategy.save_ckpt(strategy.prepare(tiny.transformer(seed=1).requires_grad_(False)), folder)
    model, _ = _prepared(strategy)
    with pytest.raises(CheckpointError, match=r"no optimizer: pass load_optimizer_states=False"):
        strategy.load_ckpt(model, folder)
    strategy.load_ckpt(model, folder, load_optimizer_states=False)
    return farthest(weights(strategy, model), tiny.weights(tiny.transformer(seed=1)))


@STAGES
def test_weights_of_a_frozen_model_begin_a_training_without_states(stage, tmp_path):
    assert run(2, _needs_states, stage, tmp_path) == 0


def _saves_frozen(stage, folder):
    strategy = make(stage)
    strategy.save_ckpt(strategy.prepare(tiny.transformer(seed=1).requires_grad_(False)), folder)


@STAGES
def test_the_checkpoint_of_a_frozen_model_is_converted(stage, tmp_path):
    run(2, _saves_frozen, stage, tmp_path / "run")
    for target in ("hf", "fsdp"):
        convert(Conversion(source=tmp_path / "run", target=tmp_path / target, to=target))
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert farthest(found, tiny.weights(tiny.transformer(seed=1))) == 0
    assert set(read_metadata(tmp_path / "fsdp" / "global_step0")) == {f"model.{name}" for name in found}


# -- Files that fail --------------------------------------------------------------------------------------------------


def _on_rank(rank, works, fails):
    """``works``, and ``fails`` on one rank."""

    @functools.wraps(works)
    def called(*args, **kwargs):
        return (fails if dist.get_rank() == rank else works)(*args, **kwargs)

    return called


def _damaged(path):
    raise CheckpointError(f"{path} is damaged")


def _full(*_, **__):
    raise OSError(28, "No space left on device")


def _loads(stage, folder, patch):
    strategy = make(stage)
    model, optimizer = _prepared(strategy, 1, _frozen_first)
    strategy.save_ckpt(model, folder)
    train(strategy, model, optimizer)
    before = weights(strategy, model)
    dist.barrier()
    patch()
    with pytest.raises(CheckpointError, match=r"rank 1: .*is damaged"):
        strategy.load_ckpt(model, folder)
    return farthest(weights(strategy, model), before)


@STAGES
def test_k10_a_file_that_is_damaged_for_one_rank_is_an_error_on_all_and_changes_nothing(stage, tmp_path, monkeypatch):
    broken = _on_rank(1, saved._load, _damaged)
    assert run(2, _loads, stage, tmp_path, lambda: monkeypatch.setattr(saved, "_load", broken)) == 0


def _saves(stage, folder, rank, frozen, patch):
    strategy = make(stage)
    model = strategy.prepare(tiny.transformer().requires_grad_(False)) if frozen else _prepared(strategy)[0]
    strategy.save_ckpt(model, folder, "good")
    dist.barrier()
    undo = patch()
    with pytest.raises(CheckpointError, match=f"rank {rank}: .*No space left on device"):
        strategy.save_ckpt(model, folder, "bad")
    dist.barrier()
    undo()
    strategy.save_ckpt(model, folder, "again")
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@STAGES
@pytest.mark.parametrize(("name", "rank"), [("torch.save", 0), ("torch.save", 1), ("shutil.copyfile", 0)])
def test_k10_a_disk_that_is_full_for_one_rank_is_an_error_on_all(stage, name, rank, tmp_path, monkeypatch):
    _fails_to_save(stage, name, rank, tmp_path, monkeypatch, frozen=False)


@STAGES
def test_k10_a_frozen_model_that_cannot_be_written_is_an_error_on_all(stage, tmp_path, monkeypatch):
    _fails_to_save(stage, "torch.save", 0, tmp_path, monkeypatch, frozen=True)


def _fails_to_save(stage, name, rank, folder, monkeypatch, *, frozen):
    from deepspeed.runtime import engine

    owner, attribute = (torch, "save") if name == "torch.save" else (engine, "copyfile")
    broken = _on_rank(rank, getattr(owner, attribute), _full)

    def patch():
        monkeypatch.setattr(owner, attribute, broken)
        return monkeypatch.undo

    assert run(2, _saves, stage, folder, rank, frozen, patch) == ["again", "good"]
