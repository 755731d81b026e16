"""Checkpoints that real strategies wrote, converted, and loaded by the other one on another number of ranks."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import lightrft
from lightrft import cli
from lightrft.errors import CheckpointError, ConfigError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import SETTINGS, Subject, workload
from lightrft.strategy.utils.ckpt_scripts import conversion, hf_writer
from lightrft.strategy.utils.ckpt_scripts.contents import Contents, Place, Spec
from lightrft.strategy.utils.ckpt_scripts.conversion import Conversion, convert
from lightrft.strategy.utils.ckpt_scripts.deepspeed_writer import Flattened
from lightrft.strategy.utils.ckpt_scripts.source import contents_of

pytestmark = pytest.mark.slow

ROOT = Path(lightrft.__file__).parents[1]
BACKENDS = {"FSDP": "fsdp", "ZeRO-1": "deepspeed", "ZeRO-2": "deepspeed", "ZeRO-3": "deepspeed"}
BEFORE, AFTER = 2, 4
"""Steps until the checkpoint, and in all."""


class Around(nn.Module):
    """A model in another one, with what is frozen, what is a buffer, and what no loss reaches."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.inner = workload.transformer(tied=tied)
        self.inner.blocks[0].outputs.weight.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("mean", torch.full((3,), 0.25))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, ids):
        return self.inner(ids)


def plain(seed: int, tied: bool) -> nn.Module:
    return workload.transformer(seed, tied=tied)


def around(seed: int, tied: bool) -> nn.Module:
    model = Around(tied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + seed)
        model.mean.mul_(1 + seed)
    return model


class Training:
    """A run with a schedule, random numbers and two parameter groups, or one of the ``whole`` model, frozen or not."""

    def __init__(self, make, build=plain, seed: int = 0, tied: bool = False, whole=False, **settings) -> None:
        micro = workload.BATCH // make.world_size
        settings = {"max_norm": 0.05, "weight_decay": 0.1, "actor_learning_rate": 0.01, **settings}
        self.strategy = make(train_batch_size=workload.BATCH, micro_train_batch_size=micro, **settings)
        torch.manual_seed(seed)
        model = build(seed, tied)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if whole else self.strategy.create_optimizer(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        self.model, self.optimizer, self.scheduler = self.strategy.prepare((model, optimizer, scheduler))

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            for ids in workload.micro_batches(self.strategy, step):
                loss = workload.loss_of(self.model(ids), ids)
                self.strategy.backward(loss, self.model, self.optimizer)
                self.strategy.optimizer_step(self.optimizer, self.model, self.scheduler)

    @property
    def weights(self):
        return workload.weights(self.strategy, self.model)

    @property
    def buffers(self):
        return {name: value.tolist() for name, value in self.strategy.unwrap_model(self.model).named_buffers()}


def saving(make, folder, build=plain, tied=False, settings=None):
    """Saves after some steps and goes on."""
    run = Training(make, build, tied=tied, **(settings or {}))
    run.train(0, BEFORE)
    run.strategy.save_ckpt(run.model, folder, client_state={"consumed": 64})
    saved, drawn = run.weights, torch.rand(1).item()
    run.train(BEFORE, AFTER)
    return saved, run.weights, drawn


def going_on(make, folder, build=plain, tied=False, settings=None):
    """Loads into other weights and trains as many steps as the run that saved."""
    run = Training(make, build, seed=1, tied=tied, **(settings or {}))
    _, client = run.strategy.load_ckpt(run.model, folder)
    loaded, drawn = run.weights, torch.rand(1).item()
    buffers = run.buffers
    rates = [group["lr"] for group in run.optimizer.param_groups]
    run.train(BEFORE, AFTER)
    return loaded, run.weights, drawn, client, buffers, rates


def subject(name: str, size: int) -> Subject:
    return Subject(world=lambda ranks: SimWorld(ranks, stall_limit=120), settings=SETTINGS[name], name=name, size=size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes a checkpoint of two ranks once; its folder, and what came of the run that saved it."""
    known = {}

    def checkpoint(name, build=plain, *, tied=False, **settings):
        key = (name, build, tied, *settings.items())
        if key not in known:
            folder = tmp_path_factory.mktemp("saved")
            known[key] = folder, *subject(name, 2).run(saving, str(folder), build, tied, settings)[0]
        return known[key]

    return checkpoint


def converted(source, target, **wanted):
    return convert(Conversion(source=Path(source), target=Path(target), **wanted))


def files_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- going on with the other strategy ---------------------------------------------------------------------------------

PAIRS = [("FSDP", "ZeRO-1", 1), ("FSDP", "ZeRO-2", 4), ("FSDP", "ZeRO-3", 4)]
PAIRS += [("ZeRO-1", "FSDP", 4), ("ZeRO-2", "FSDP", 1), ("ZeRO-3", "FSDP", 4), ("ZeRO-3", "ZeRO-1", 1)]


@pytest.mark.parametrize(("source", "target", "size"), PAIRS)
def test_training_goes_on_with_the_other_strategy_on_other_ranks(saved, tmp_path, source, target, size):
    folder, weights, ended, _ = saved(source)
    done = converted(folder, tmp_path / "new", to=BACKENDS[target])
    assert done.comparison.tensors == 4 * len(weights)
    assert done.comparison.worst == 0
    for loaded, end, _, client, _, rates in subject(target, size).run(going_on, str(tmp_path / "new")):
        workload.same(loaded, weights, what="loaded", within=0.0)
        workload.same(end, ended, what="trained on")
        assert client == {"consumed": 64}
        assert rates == pytest.approx([0.01 * 0.9**BEFORE] * 2, rel=1e-12)


@pytest.mark.parametrize(("source", "target"), [("FSDP", "ZeRO-3"), ("ZeRO-2", "FSDP")])
def test_on_as_many_ranks_each_goes_on_with_its_random_numbers(saved, tmp_path, source, target):
    folder, *_, drawn = saved(source)
    converted(folder, tmp_path / "new", to=BACKENDS[target])
    assert subject(target, 2).run(going_on, str(tmp_path / "new"))[0][2] == drawn


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_layout_of_zero_is_read_by_deepspeed_itself_and_by_every_stage(saved, tmp_path, stage):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder, weights, ended, _ = saved("FSDP")
    converted(folder, tmp_path / "new", to="deepspeed", zero_stage=stage)
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "new"))
    workload.same(found, weights, what="read by DeepSpeed", within=0.0)
    for _, end, *_ in subject(f"ZeRO-{4 - stage}", 1).run(going_on, str(tmp_path / "new")):
        workload.same(end, ended, what="trained on")


def reached(weights):
    """Those that the loss reaches; of the others, ZeRO decays the weights and FSDP does not."""
    return {name: value for name, value in weights.items() if not name.startswith("unused.")}


@pytest.mark.parametrize(
    ("source", "target", "size"), [("FSDP", "ZeRO-2", 1), ("FSDP", "ZeRO-3", 4), ("ZeRO-3", "FSDP", 1)]
)
def test_frozen_and_unused_and_tied_parameters_and_buffers_go_along(saved, tmp_path, source, target, size):
    folder, weights, ended, _ = saved(source, around, tied=True)
    converted(folder, tmp_path / "new", to=BACKENDS[target])
    for loaded, end, _, _, buffers, _ in subject(target, size).run(going_on, str(tmp_path / "new"), around, True):
        workload.same(loaded, weights, what="loaded", within=0.0)
        workload.same(reached(end), reached(ended), what="trained on")
        assert buffers == {"mean": [0.25] * 3, "count": 7}


@pytest.mark.parametrize("target", ["ZeRO-1", "ZeRO-3"])
def test_an_optimizer_may_hold_frozen_parameters(saved, tmp_path, target):
    folder, weights, ended, _ = saved("FSDP", around, whole=True)
    converted(folder, tmp_path / "new", to="deepspeed")
    settings = {"whole": True}
    for loaded, end, *_ in subject(target, 2).run(going_on, str(tmp_path / "new"), around, False, settings):
        workload.same(loaded, weights, what="loaded", within=0.0)
        workload.same(reached(end), reached(ended), what="trained on")


IN_16_BITS = [("FSDP", "ZeRO-2", {}), ("ZeRO-3", "FSDP", {}), ("FSDP", "ZeRO-3", {"use_mp_opt": True})]


@pytest.mark.parametrize(("source", "target", "more"), IN_16_BITS)
def test_in_bfloat16_the_masters_go_along(saved, tmp_path, source, target, more):
    folder, weights, ended, _ = saved(source, bf16=True, **more)
    converted(folder, tmp_path / "new", to=BACKENDS[target])
    new = contents_of(BACKENDS[target], tmp_path / "new" / "global_step2")
    for name, value in weights.items():
        assert new.specs[Place(name)].dtype == torch.float32
        assert torch.equal(new.read(Place(name)).bfloat16().float(), value)
    settings = {"bf16": True}
    for loaded, end, *_ in subject(target, 2).run(going_on, str(tmp_path / "new"), plain, False, settings):
        workload.same(loaded, weights, what="loaded", within=0.0)
        workload.same(end, ended, what="trained on", within=0.03)


def test_hyper_parameters_go_along_and_how_an_optimizer_computes_does_not(saved, tmp_path):
    folder, *_ = saved("FSDP")
    converted(folder, tmp_path / "new", to="deepspeed")
    groups = contents_of("deepspeed", tmp_path / "new" / "global_step2").groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {"lr", "initial_lr", "betas", "eps"} < groups[0].keys()
    assert not {"fused", "foreach", "capturable", "decays"} & groups[0].keys()


def test_there_and_back_is_what_it_was(saved, tmp_path):
    folder, *_ = saved("FSDP", around, tied=True)
    converted(folder, tmp_path / "there", to="deepspeed", zero_stage=3)
    converted(tmp_path / "there", tmp_path / "back", to="fsdp")
    first, last = (contents_of("fsdp", one / "global_step2") for one in (folder, tmp_path / "back"))
    unused = {place for place in last.specs if place.name.startswith("unused.") and place.key}
    assert unused
    assert last.specs.keys() == first.specs.keys() | unused  # ZeRO has states of what was never stepped: zeros
    assert all(torch.equal(first.read(place), last.read(place)) for place in first.specs)
    assert not any(last.read(place).any() for place in unused if place.key != "step")
    assert first.groups == last.groups


def with_loss_scale(make, folder, *, load):
    run = Training(make, fp16=True, max_norm=0.0)
    if load:
        run.strategy.load_ckpt(run.model, folder)
    run.train(BEFORE if load else 0, BEFORE + 1)
    scaler = getattr(getattr(run.model, "optimizer", None), "loss_scaler", None)
    if scaler is not None:
        found = scaler.cur_scale, scaler.cur_iter - scaler.last_overflow_iter - 1
    else:
        kept = run.strategy.prepared.of(run.model).backend.values()
        found = next((one.loss_scale.scale, one.loss_scale.good_steps) for one in kept if hasattr(one, "loss_scale"))
    run.strategy.save_ckpt(run.model, folder, "again")
    return found


@pytest.mark.parametrize(("source", "target"), [("FSDP", "ZeRO-2"), ("ZeRO-3", "FSDP")])
def test_the_loss_scale_of_fp16_goes_along(tmp_path, source, target):
    first, new = tmp_path / "first", tmp_path / "new"

    def save(make):
        return with_loss_scale(make, str(first), load=False)

    def load(make):
        return with_loss_scale(make, str(new), load=True)

    before = subject(source, 1).run(save)[0]
    converted(first, new, to=BACKENDS[target])
    assert subject(target, 1).run(load)[0] == (before[0], before[1] + 1)


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def llama(seed: int, tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=workload.VOCABULARY, tie_word_embeddings=tied, max_position_embeddings=16, **sizes)
    return LlamaForCausalLM(config)


class Critic(nn.Module):
    """A transformers model inside, as actors and critics have it, and a head around it."""

    def __init__(self, seed: int, tied: bool) -> None:
        super().__init__()
        self.model = llama(seed, tied)
        self.value_head = nn.Linear(workload.VOCABULARY, workload.VOCABULARY, bias=False)

    def forward(self, ids):
        return self.value_head(self.model(ids).logits)


def critic(seed: int, tied: bool) -> nn.Module:
    return Critic(seed, tied)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folders of the model of ``Critic`` before training, with and without tied weights, as they are downloaded."""
    folders = {}
    for tied in (False, True):
        folders[tied] = tmp_path_factory.mktemp("pretrained")
        llama(5, tied).save_pretrained(folders[tied])
        (folders[tied] / "tokenizer.json").write_text("{}")
        (folders[tied] / "chat_template.jinja").write_text("{{ messages }}")
        (folders[tied] / "pytorch_model.bin").write_bytes(b"old weights")
    return folders


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("source", BACKENDS)
def test_a_run_becomes_a_model_that_transformers_loads(saved, pretrained, tmp_path, source, tied):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder, weights, *_ = saved(source, critic, tied=tied)
    converted(folder, tmp_path / "hf", to="hf", model=pretrained[tied])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    inside = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    found = {name: value.detach() for name, value in model.named_parameters()}
    workload.same(found, inside, what="loaded", within=0.0)
    assert ("lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")) == (not tied)
    outside = load_file(tmp_path / "hf" / "outside.safetensors")
    assert outside.keys() == {"value_head.weight"}
    assert torch.equal(outside["value_head.weight"], weights["value_head.weight"])
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} < names
    assert "pytorch_model.bin" not in names


@pytest.mark.parametrize("source", BACKENDS)
def test_without_a_model_the_names_are_those_of_the_run(saved, tmp_path, source):
    from safetensors.torch import load_file

    folder, weights, *_ = saved(source, around, tied=True)
    converted(folder, tmp_path / "hf", to="hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.pop("mean").tolist() == [0.25] * 3
    assert found.pop("count").item() == 7
    workload.same(found, weights, what="weights, tied ones once", within=0.0)
    assert "inner.head.weight" not in found


def test_weights_are_rounded_as_asked_and_the_configuration_says_so(saved, pretrained, tmp_path):
    from safetensors.torch import load_file

    folder, weights, *_ = saved("ZeRO-2", critic)
    done = converted(folder, tmp_path / "hf", to="hf", model=pretrained[False], dtype="bf16")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], weights["model.lm_head.weight"].bfloat16())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert done.comparison.worst == 0


def test_large_models_are_spread_over_files(saved, pretrained, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hf_writer, "LARGEST_FILE", 5000)
    folder, weights, *_ = saved("FSDP", critic)
    converted(folder, tmp_path / "hf", to="hf", model=pretrained[False])
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 5000 + 2000 for file in files)  # headers come on top
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.lm_head.weight, weights["model.lm_head.weight"])
    done = converted(tmp_path / "hf", tmp_path / "again", to="hf", dtype="fp16")
    assert done.comparison.tensors == len(weights)


def loads_weights(make, folder):
    strategy = make(actor_learning_rate=0.01)
    model = strategy.prepare(llama(1, False))
    optimizer = strategy.create_optimizer(model)
    messages = []
    try:
        strategy.load_ckpt(model, folder, optimizer=optimizer)
    except CheckpointError as error:
        messages.append(str(error))
    strategy.load_ckpt(model, folder, load_module_only=True)
    first = workload.weights(strategy, model)
    other = strategy.prepare(llama(2, False))
    strategy.create_optimizer(other)
    strategy.load_ckpt(other, folder, load_optimizer_states=False)
    return messages, first, workload.weights(strategy, other)


def test_a_model_of_hugging_face_is_loaded_by_fsdp(pretrained, tmp_path):
    converted(pretrained[False], tmp_path / "new", to="fsdp")
    expected = {name: value.detach() for name, value in llama(5, False).named_parameters()}
    for messages, first, second in subject("FSDP", 2).run(loads_weights, str(tmp_path / "new")):
        assert "holds no optimizer: pass load_optimizer_states=False" in messages[0]
        workload.same(first, expected, what="weights alone", within=0.0)
        workload.same(second, expected, what="without optimizer states", within=0.0)


def test_weights_alone_do_not_become_a_checkpoint_of_deepspeed(pretrained, tmp_path):
    with pytest.raises(ConfigError, match="no optimizer.*convert to hf"):
        converted(pretrained[False], tmp_path / "new", to="deepspeed")
    assert not any(tmp_path.iterdir())


def test_a_model_that_is_not_the_one_that_was_trained_is_refused(saved, pretrained, tmp_path):
    folder, *_ = saved("FSDP")
    with pytest.raises(ConfigError, match=r"has no model\.embed_tokens\.weight, .*leave --model out"):
        converted(folder, tmp_path / "hf", to="hf", model=pretrained[False])


# -- what cannot be held ----------------------------------------------------------------------------------------------


class Made(Contents):
    """Contents made of tensors."""

    def __init__(self, tensors, groups=None) -> None:
        self._tensors = tensors
        self.specs = {place: Spec.of(tensor) for place, tensor in tensors.items()}
        self.groups = groups

    def read(self, place):
        return self._tensors[place]


def test_different_counts_of_steps_in_a_group_are_refused():
    tensors = {Place(name): torch.ones(3) for name in "ab"}
    tensors |= {Place("a", "step"): torch.tensor(2.0), Place("b", "step"): torch.tensor(5.0)}
    with pytest.raises(CheckpointError, match="a was stepped 2 times and b, of the same parameter group, 5 times"):
        Flattened(Made(tensors, [{"lr": 0.1, "params": ["a", "b"]}]))


def test_states_of_another_shape_are_refused():
    tensors = {Place("a"): torch.ones(3, 4), Place("a", "row"): torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"row of a has shape \(3,\), and the parameter \(3, 4\)"):
        Flattened(Made(tensors, [{"lr": 0.1, "params": ["a"]}]))


LARGE = """
import resource, sys
from pathlib import Path
import torch
from lightrft.strategy.utils.ckpt_scripts import fsdp_writer
from lightrft.strategy.utils.ckpt_scripts.contents import Contents, Place, Spec
from lightrft.strategy.utils.ckpt_scripts.progress import Progress

class Large(Contents):
    specs = {Place(f"p{number}"): Spec((2_000_000,), torch.float32) for number in range(25)}

    def read(self, place):
        return torch.full((2_000_000,), float(place.name[1:]))

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fsdp_writer.write(Large(), Path(sys.argv[1]), Progress("written", 1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_fsdp_is_written_one_tensor_after_the_other(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LARGE, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80_000  # KiB: 200 MB are written, in tensors of 8 MB
    found = contents_of("fsdp", tmp_path)
    for number in (0, 13, 24):
        assert torch.equal(found.read(Place(f"p{number}")), torch.full((2_000_000,), float(number)))


# -- damage, and what is no source ------------------------------------------------------------------------------------


def copied(saved, tmp_path, name, *wanted):
    """A copy of a checkpoint, to be damaged; its folder and the folder with the file that is named."""
    import shutil

    folder, *_ = saved(name)
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", *(tmp_path / "copy" / "global_step2" / one for one in wanted)


DAMAGED = {"FSDP": "dcp/__1_0.distcp", "ZeRO-2": "zero_pp_rank_1_mp_rank_00_optim_states.pt"}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("to", ["hf", "fsdp", "deepspeed"])
def test_a_truncated_source_is_refused(saved, tmp_path, name, to):
    copy, file = copied(saved, tmp_path, name, DAMAGED[name])
    file.write_bytes(file.read_bytes()[:-100])
    for source in (copy, copy / "global_step2"):
        with pytest.raises(CheckpointError, match=f"incomplete: {DAMAGED[name]} has .* expected"):
            converted(source, tmp_path / "new", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("to", ["hf", "fsdp", "deepspeed"])
def test_a_source_with_other_bytes_is_refused(saved, tmp_path, name, to):
    copy, file = copied(saved, tmp_path, name, DAMAGED[name])
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=file.parent.name):
        converted(copy, tmp_path / "new", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_rank_without_its_states_is_noticed(saved, tmp_path):
    copy, file, info = copied(saved, tmp_path, "ZeRO-3", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "lightrft.json")
    states = torch.load(file, weights_only=False)
    del states["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["exp_avg"]
    torch.save(states, file)
    known = json.loads(info.read_text())
    known["files"][file.name] = file.stat().st_size
    info.write_text(json.dumps(known))
    with pytest.raises(CheckpointError, match="rank 1 saved no exp_avg"):
        converted(copy, tmp_path / "new", to="fsdp")


def test_a_file_that_index_names_is_missing(saved, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer, "LARGEST_FILE", 5000)
    converted(pretrained[False], tmp_path / "hf", to="hf")
    next((tmp_path / "hf").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of"):
        converted(tmp_path / "hf", tmp_path / "new", to="fsdp")


def saves_fake(make, folder):
    run = Training(make)
    run.strategy.save_ckpt(run.model, folder)


def test_what_is_no_source_is_refused(saved, pretrained, tmp_path):
    subject("fake, as FSDP", 1).run(saves_fake, str(tmp_path / "fake"))
    (tmp_path / "empty").mkdir()
    folder, *_ = saved("FSDP")
    for wanted, message in [
        ({"source": tmp_path / "fake"}, "written by the fake backend"),
        ({"source": tmp_path / "empty"}, "holds no checkpoint that lightrft wrote"),
        ({"source": tmp_path / "nothing"}, "is no folder"),
        ({"source": folder, "kind": "deepspeed"}, "is of kind fsdp, expected deepspeed"),
        ({"source": folder / "global_step2", "tag": "other"}, "is the checkpoint 'global_step2', not 'other'"),
        ({"source": pretrained[False], "tag": "one"}, "leave --tag out"),
        ({"source": folder, "dtype": "bf16"}, "--dtype is for weights alone"),
        ({"source": folder, "zero_stage": 3}, "--zero_stage is for --to deepspeed"),
        ({"source": folder, "model": pretrained[False]}, "--model is for --to hf"),
        ({"source": folder, "to": "megatron"}, "expected one of hf, fsdp, deepspeed"),
    ]:
        with pytest.raises(ConfigError, match=message):
            convert(Conversion(**{"to": "fsdp", "target": tmp_path / "new", **wanted}))
    with pytest.raises(CheckpointError, match="no checkpoint 'other'.*global_step2"):
        converted(folder, tmp_path / "new", to="fsdp", tag="other")
    assert not (tmp_path / "new").exists()


# -- the target -------------------------------------------------------------------------------------------------------


def test_a_target_that_exists_is_replaced_only_if_asked_for_and_only_by_a_complete_one(saved, tmp_path, monkeypatch):
    folder, *_ = saved("FSDP")
    other, *_ = saved("ZeRO-3")
    target = tmp_path / "target"
    converted(folder, target, to="fsdp")
    first = files_below(target)
    with pytest.raises(ConfigError, match="exists: .*--overwrite"):
        converted(other, target, to="fsdp")
    read = contents_of

    def damaged(kind, place):
        found = read(kind, place)
        if "converting" in str(place):
            found.specs = {one: spec for one, spec in found.specs.items() if one != Place("head.weight", "exp_avg")}
        return found

    monkeypatch.setattr(conversion, "contents_of", damaged)
    with pytest.raises(CheckpointError, match=r"not what the source holds: exp_avg of head\.weight is missing"):
        converted(other, target, to="fsdp", overwrite=True)
    monkeypatch.undo()
    assert files_below(target) == first
    converted(other, target, to="hf", overwrite=True)
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_target_comes_back_if_the_new_one_cannot_take_its_place(saved, tmp_path, monkeypatch):
    folder, *_ = saved("FSDP")
    target = tmp_path / "target"
    converted(folder, target, to="fsdp")
    first = files_below(target)
    rename = Path.rename

    def fails(path, to):
        if path.name.startswith(".lightrft-converting"):
            raise OSError("no more room")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no more room"):
        converted(folder, target, to="hf", overwrite=True)
    assert files_below(target) == first
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_one_element_that_differs_is_an_error(saved, tmp_path, monkeypatch):
    folder, *_ = saved("ZeRO-1")
    read = contents_of

    def changed(kind, place):
        found = read(kind, place)
        if kind == "hf":
            whole = found.read

            def moved(one):
                tensor = whole(one)
                if one.name == "head.weight":
                    tensor[1, 1] += 0.5
                return tensor

            found.read = moved
        return found

    monkeypatch.setattr(conversion, "contents_of", changed)
    with pytest.raises(CheckpointError, match=r"head\.weight differs by 0\.5"):
        converted(folder, tmp_path / "hf", to="hf")
    assert not any(tmp_path.iterdir())


def test_other_folders_are_never_overwritten(saved, tmp_path):
    folder, *_ = saved("FSDP")
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="something else than checkpoints"):
        converted(folder, home, to="hf", overwrite=True)
    for target in (folder, folder / "inside", folder.parent):
        with pytest.raises(ConfigError, match="in one another"):
            converted(folder, target, to="hf", overwrite=True)
    assert (home / "letter.txt").read_text() == "dear"


# -- the command line -------------------------------------------------------------------------------------------------


def command(*words, module="lightrft"):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], env=env, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    return done


def test_the_command_converts_and_shows(saved, tmp_path):
    folder, *_ = saved("ZeRO-3")
    done = command("ckpt", "convert", folder, tmp_path / "new", "--to", "fsdp")
    assert done.returncode == 0, done.stderr
    count = len(list(workload.transformer().parameters()))
    assert done.stdout.splitlines()[0].endswith(f"(fsdp): {count} weights, {3 * count} optimizer states")
    assert done.stdout.splitlines()[1:] == [f"checked: {4 * count} tensors, largest difference 0"]
    assert "written: " in done.stderr
    shown = command("ckpt", "show", tmp_path / "new")
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[1].split()[:4] == ["global_step2", "fsdp", "2", "2"]
    assert shown.stdout.splitlines()[1].endswith("latest")


def test_a_script_converts_one_kind_only(saved, tmp_path):
    module = "lightrft.strategy.utils.ckpt_scripts.deepspeed_to_hf"
    folder, *_ = saved("FSDP")
    refused = command(folder, tmp_path / "new", module=module)
    assert refused.returncode == 2
    assert "is of kind fsdp, expected deepspeed" in refused.stderr
    folder, *_ = saved("ZeRO-2")
    done = command(folder, tmp_path / "new", "--no-check", module=module)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1] == "not checked"
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_exit_statuses(saved, tmp_path, capsys):
    copy, file = copied(saved, tmp_path, "FSDP", DAMAGED["FSDP"])
    file.unlink()
    assert cli.main(["ckpt", "convert", str(copy), str(tmp_path / "new"), "--to", "hf"]) == 1
    assert "lightrft ckpt convert: error: " in capsys.readouterr().err
    assert cli.main(["ckpt", "show", str(copy)]) == 0
    assert "damaged: " in capsys.readouterr().out
    assert cli.main(["ckpt", "convert", str(copy), str(copy), "--to", "hf"]) == 2
    assert cli.main(["ckpt", "convert", str(copy)]) == 2
    assert cli.main(["ckpt", "show", str(tmp_path / "nothing")]) == 2
    assert cli.main(["ckpt", "--help"]) == 0
    (tmp_path / "file").write_text("")
    assert cli.main(["ckpt", "convert", str(saved("FSDP")[0]), str(tmp_path / "file" / "new"), "--to", "hf"]) == 1
    counted = Counter(capsys.readouterr().err.splitlines())
    assert all(count == 1 for line, count in counted.items() if "error" in line)
