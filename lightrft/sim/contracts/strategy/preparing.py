"""ST601 and on: what ``prepare`` takes and gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from lightrft.errors import ConfigError
from lightrft.sim.contracts.strategy import sequences, workload
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.subject import Make, Subject, refused
from lightrft.sim.contracts.strategy.workload import Recipe

SGD = Recipe()


def _step(strategy: Any, model: Any, optimizer: Any, scheduler: Any = None) -> float | None:
    norm = None
    for ids in workload.micro_batches(strategy, 0, strategy.groups.dp_size):
        strategy.backward(workload.loss_of(model(ids), ids), model, optimizer)
        norm = strategy.optimizer_step(optimizer, model, scheduler, name="actor")
    return norm


def _four(make: Make) -> list[Any]:
    strategy = make(max_norm=0.0)
    models = [workload.transformer(seed) for seed in range(4)]
    for frozen in models[2:]:
        frozen.requires_grad_(False)
    actor, critic, reward, reference = strategy.prepare(*models, is_rlhf=True)
    trained = []
    for model in (actor, critic):
        optimizer = strategy.create_optimizer(model, lr=0.01)
        trained.append((_step(strategy, model, optimizer) or 0.0) > 0)
    ids = workload.batch(0, 2)
    with torch.no_grad():
        outputs = [float(model(ids).float().sum()) for model in (reward, reference)]
        expected = [float(workload.transformer(seed)(ids).sum()) for seed in (2, 3)]
    close = all(abs(one - other) < 1e-3 for one, other in zip(outputs, expected, strict=True))
    inside = [strategy.unwrap_model(model) is given for model, given in zip((actor, reward), models[::2], strict=True)]
    return [trained, close, inside]


@contract.check(601)
def check_models_without_optimizers(subject: Subject) -> None:
    """Several models are prepared at once; those with trainable parameters can be trained with an optimizer made later, and frozen ones evaluate as before (K29)."""  # noqa: E501
    for found in subject.run(_four):
        if found != [[True, True], True, [True, True]]:
            raise AssertionError(f"trained, evaluated alike, unwrapped: {found}")


def _forms(make: Make) -> list[Any]:
    strategy = make()
    pair = workload.transformer()
    optimizer = SGD.make(pair.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    triple = workload.transformer()
    found = strategy.prepare(
        workload.transformer(), (pair, optimizer), (triple, SGD.make(triple.parameters()), scheduler), None,
        (None, None, None),
    )  # fmt: skip
    single = strategy.prepare(workload.transformer())
    return [
        [type(one) is tuple for one in found],
        [len(one) for one in found if isinstance(one, tuple)],
        found[2][2] is scheduler,
        found[3] is None and found[4] == (None, None, None),
        isinstance(single, torch.nn.Module),
        "once" in refused(lambda: strategy.prepare(single), ConfigError),
        "tuple of 4" in refused(lambda: strategy.prepare((pair, optimizer, scheduler, 1)), ConfigError),
    ]


@contract.check(602)
def check_what_is_prepared_keeps_its_form(subject: Subject) -> None:
    """A model, a pair, a triple, None and a tuple of Nones come back in the form that they were given in (K29)."""
    for found in subject.run(_forms):
        if found != [[False, True, True, False, True], [2, 3, 3], True, True, True, True, True]:
            raise AssertionError(f"found {found}")


def _whole_run(make: Make) -> list[Any]:
    strategy = make(critic_learning_rate=0.02)
    args = SimpleNamespace(actor_learning_rate=0.01, critic_learning_rate=0.02, lr_warmup_ratio=0.0)
    prepared = strategy.prepare_models_and_optimizers(
        workload.transformer(0),
        workload.transformer(1),
        [workload.transformer(2), len],
        workload.transformer(3),
        args,
        10,
    )
    (actor, optimizer, scheduler), (critic, other, _), (reward, service), initial = prepared
    rates = [one.param_groups[0]["lr"] for one in (optimizer, other)]
    norm = _step(strategy, actor, optimizer, scheduler)
    frozen = [not any(p.requires_grad for p in strategy.unwrap_model(one).parameters()) for one in (reward, initial)]
    without = strategy.prepare_models_and_optimizers(workload.transformer(4), None, None, None, None, 10)
    return [
        rates,
        (norm or 0) > 0 and strategy.gradient_norms["actor"] == norm,
        optimizer.param_groups[0]["lr"] < 0.01,
        frozen,
        service is len,
        without[1] == (None, None, None) and without[2:] == (None, None),
        critic is not None,
    ]


@contract.check(603)
def check_all_models_of_a_run(subject: Subject) -> None:
    """Optimizers, schedules, reward models and the reference of a whole run are made in one call; what is absent stays absent."""  # noqa: E501
    for found in subject.run(_whole_run):
        if found != [[0.01, 0.02], True, True, [True, True], True, True, True]:
            raise AssertionError(f"found {found}")


def _sharded(make: Make, shard_size: int) -> bool:
    strategy = make()
    model = strategy.prepare_model(workload.transformer().requires_grad_(False), shard_size=shard_size)
    ids = workload.batch(0, 2)
    with torch.no_grad():
        return torch.allclose(model(ids).float(), workload.transformer()(ids), atol=1e-5)


@contract.check(604)
def check_shards_over_all_ranks_or_one(subject: Subject) -> None:
    """A frozen model computes the same, whether all ranks share it or each has it whole (K19)."""
    for shard_size in (-1, 1, subject.size):
        if not all(subject.run(_sharded, shard_size)):
            raise AssertionError(f"other outputs with shard_size={shard_size}")


@contract.check(605, "shards_partly")
def check_shards_over_some_ranks(subject: Subject) -> None:
    """Groups of `shard_size` ranks may share a model."""
    subject.needs(4)
    if not all(subject.run(_sharded, 2)):
        raise AssertionError("other outputs with shard_size=2")


def _in_context(make: Make, meta_init: bool) -> dict[str, torch.Tensor]:
    strategy = make(max_norm=0.0)
    with strategy.init_model_context(meta_init=meta_init):
        torch.manual_seed(0)
        built = workload.Transformer()
    model = strategy.prepare_model(built, is_training=True)
    optimizer = strategy.create_optimizer(model, lr=0.01)
    found = workload.weights(strategy, model)
    _step(strategy, model, optimizer)
    return found


@contract.check(606)
def check_models_built_in_context(subject: Subject) -> None:
    """A model built in `init_model_context` has the weights that it would have had outside, and trains."""
    expected = {name: value.detach() for name, value in workload.transformer(0).named_parameters()}
    for meta_init in (False, True):
        for found in subject.run(_in_context, meta_init):
            workload.same(found, expected, what=f"built with meta_init={meta_init}", within=1e-7)


def _pretrained(make: Make, folder: str) -> list[tuple[dict[str, torch.Tensor], float, bool]]:
    from transformers import LlamaForCausalLM

    strategy = make(max_norm=0.0)
    found = []
    for meta_init in (False, True):
        with strategy.init_model_context(meta_init=meta_init):
            settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
            built = LlamaForCausalLM.from_pretrained(folder, **settings)
        model = strategy.prepare_model(built, is_training=True)
        ids = workload.batch(0, 2).to(strategy.device)
        logits = model(input_ids=ids).logits
        expected = sequences.llama(tied=True)(input_ids=workload.batch(0, 2)).logits
        weights = workload.weights(strategy, model)
        optimizer = strategy.create_optimizer(model, lr=0.01)
        strategy.backward(workload.loss_of(logits, ids), model, optimizer)
        norm = strategy.optimizer_step(optimizer, model) or 0.0
        found.append((weights, float((logits.cpu() - expected).abs().max()), norm > 0))
    return found


@contract.check(607)
def check_pretrained_models_in_context(subject: Subject) -> None:
    """`from_pretrained` in `init_model_context` gives exactly the weights of the files to a model, tied where they are, that computes as it does elsewhere and trains (K18)."""  # noqa: E501
    whole = sequences.llama(tied=True)
    expected = {name: weight.detach() for name, weight in whole.named_parameters()}
    with subject.folder() as folder:
        whole.save_pretrained(folder)
        results = subject.run(_pretrained, folder)
    for found in results:
        for meta_init, (weights, off, trained) in zip((False, True), found, strict=True):
            what = f"from_pretrained with meta_init={meta_init}"
            workload.same(weights, expected, what=what, within=0.0)
            if not off <= 1e-5 or not trained:
                raise AssertionError(f"{what}: logits differ by {off}, and it was trained: {trained}")
