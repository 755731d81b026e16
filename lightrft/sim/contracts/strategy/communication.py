"""ST201 and on: what all ranks compute together, and what they know of each other."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from lightrft.errors import ConfigError
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.subject import Make, Subject, refused

BF16_MOVES = 60


def _reduced(make: Make) -> list[Any]:
    strategy = make()
    rank = strategy.get_rank()
    data = {"loss": float(rank), "tokens": rank + 1, "norm": torch.tensor(2.0 * rank), "flags": torch.tensor([rank, 1])}
    kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in data.items()}
    found = [strategy.all_reduce(data, op) for op in ("mean", "max", "min", "sum")]
    for name, value in kept.items():
        assert torch.equal(torch.as_tensor(data[name]), torch.as_tensor(value)), f"all_reduce changed {name}"
    return [{name: torch.as_tensor(value).tolist() for name, value in one.items()} for one in found]


@contract.check(201)
def check_all_reduce_of_a_dict(subject: Subject) -> None:
    """Numbers and tensors in a dict are reduced one by one; what was passed stays as it was (K12)."""
    ranks = range(subject.size)
    mean, top = sum(ranks) / subject.size, subject.size - 1
    expected = [
        {"loss": mean, "tokens": mean + 1, "norm": 2 * mean, "flags": [mean, 1.0]},
        {"loss": float(top), "tokens": top + 1, "norm": 2.0 * top, "flags": [top, 1]},
        {"loss": 0.0, "tokens": 1, "norm": 0.0, "flags": [0, 1]},
        {"loss": mean * subject.size, "tokens": sum(ranks) + subject.size, "norm": 2 * mean * subject.size,
         "flags": [sum(ranks), subject.size]},
    ]  # fmt: skip
    for found in subject.run(_reduced):
        if found != expected:
            raise AssertionError(f"mean, max, min and sum are\n  {found}\nand should be\n  {expected}")


def _other_keys(make: Make) -> str:
    strategy = make()
    name = "reward" if strategy.get_rank() == strategy.world_size - 1 else "loss"
    message = refused(lambda: strategy.all_reduce({name: 1.0, "kl": 2.0}), ConfigError)
    total = strategy.all_reduce(1, op="sum")
    assert total == strategy.world_size, "the ranks are out of step after an error"
    return message


@contract.check(202)
def check_other_keys_are_named(subject: Subject) -> None:
    """Ranks that reduce dicts with other keys get an error with these keys, all of them, and can go on (K12)."""
    subject.needs(2)
    for message in subject.run(_other_keys):
        if "reward" not in message or "loss" not in message:
            raise AssertionError(f"expected the keys reward and loss in {message!r}")


def _gathered(make: Make) -> list[Any]:
    strategy = make()
    rank = strategy.get_rank()
    uneven = strategy.all_gather(torch.full((rank + 1, 2), float(rank)))
    both = strategy.all_gather({"rank": rank, "row": torch.tensor([[rank, -rank]])})
    return [uneven.tolist(), both["rank"].tolist(), both["row"].tolist()]


@contract.check(203)
def check_all_gather_is_in_the_order_of_ranks(subject: Subject) -> None:
    """Tensors of all ranks follow each other along the first dimension, also where its size differs."""
    ranks = range(subject.size)
    uneven = [[float(rank)] * 2 for rank in ranks for _ in range(rank + 1)]
    expected = [uneven, list(ranks), [[rank, -rank] for rank in ranks]]
    for found in subject.run(_gathered):
        if found != expected:
            raise AssertionError(f"gathered {found}, expected {expected}")


def _knows(make: Make) -> dict[str, Any]:
    strategy = make(engine_tp_size=max(1, make.world_size // 2))
    before = dist.group.WORLD if dist.is_initialized() else None
    strategy.setup_distributed()
    assert before is (dist.group.WORLD if dist.is_initialized() else None), "setup_distributed made a second group"
    return {
        "rank": strategy.get_rank(),
        "first": strategy.is_rank_0(),
        "size": strategy.world_size,
        "engine": _members(strategy.engine_mp_group),
        "engines": _members(strategy.engine_dp_group),
        "device": str(strategy.device.type) in ("cpu", "cuda"),
        "args": strategy.args["engine_tp_size"] == strategy.config.engine_tp_size,
    }


def _members(group: Any) -> list[int]:
    return [0] if group is None else dist.get_process_group_ranks(group)


@contract.check(204)
def check_ranks_know_their_groups(subject: Subject) -> None:
    """Rank, size and engine groups are as the settings say, and setting up again changes nothing (K28)."""
    tp = max(1, subject.size // 2)
    for rank, found in enumerate(subject.run(_knows)):
        first = rank - rank % tp
        expected = {
            "rank": rank,
            "first": rank == 0,
            "size": subject.size,
            "engine": list(range(first, first + tp)),
            "engines": list(range(rank % tp, subject.size, tp)),
            "device": True,
            "args": True,
        }
        if found != expected:
            raise AssertionError(f"rank {rank} knows {found}, expected {expected}")


def _misfits(make: Make) -> list[str]:
    size = make.world_size
    return [
        refused(lambda: make(engine_tp_size=size + 1), ConfigError),
        refused(lambda: make(sp_size=size + 1, train_batch_size=8), ConfigError),
        refused(lambda: make(train_batch_size=3 * size, micro_train_batch_size=2), ConfigError),
        refused(lambda: make(bf16=True, fp16=True), ConfigError),
    ]


@contract.check(205)
def check_settings_that_do_not_fit_the_world(subject: Subject) -> None:
    """Sizes that do not divide the world, and settings that contradict each other, are refused by name (K19, K20)."""
    for found in subject.run(_misfits):
        for message, word in zip(found, ("engine_tp_size", "sp_size", "train_batch_size", "fp16"), strict=True):
            if word not in message:
                raise AssertionError(f"expected {word!r} in {message!r}")


def _random(make: Make) -> list[float]:
    strategy = make(seed=7)
    first = torch.rand(1).item()
    strategy.set_seed(7)
    return [first, torch.rand(1).item()]


@contract.check(206)
def check_every_rank_has_the_same_seed(subject: Subject) -> None:
    """The constructor seeds as `set_seed` does, each rank alike."""
    found = subject.run(_random)
    values = {value for pair in found for value in pair}
    if len(values) != 1:
        raise AssertionError(f"random numbers after seeding: {found}")


def _loaded(make: Make, consumed: int) -> list[list[int]]:
    strategy = make(sp_size=2 if make.world_size > 1 else 1)
    loader = strategy.setup_dataloader(list(range(32)), 2, consumed_samples=consumed)
    return [batch.tolist() for batch in loader]


@contract.check(207)
def check_a_loader_shares_out_the_data(subject: Subject) -> None:
    """Data-parallel ranks get disjoint shares, ranks of one sequence-parallel group the same, and a loader goes on after what was consumed (K16)."""  # noqa: E501
    sp = 2 if subject.size > 1 else 1
    found = subject.run(_loaded, 0)
    for first in range(0, subject.size, sp):
        if any(found[first] != found[first + other] for other in range(sp)):
            raise AssertionError(f"ranks of one sequence-parallel group have other data: {found}")
    seen = sorted(one for rank in range(0, subject.size, sp) for batch in found[rank] for one in batch)
    if seen != list(range(32)):
        raise AssertionError(f"all ranks together had {seen}")
    half = [batches[len(batches) // 2 :] for batches in found]
    if subject.run(_loaded, 16) != half:
        raise AssertionError("a loader that begins after 16 examples does not go on where the other one was")


def _moved(make: Make) -> list[float]:
    from lightrft.sim.contracts.strategy import workload

    strategy = make()
    model = strategy.prepare_model(workload.transformer(0), is_training=True)
    average = strategy.prepare_model(workload.transformer(1).requires_grad_(False))
    plain = workload.transformer(1)
    strategy.moving_average(model, average, beta=0.75)
    strategy.moving_average(model, plain, beta=0.75)
    expected = 0.75 * workload.transformer(1).head.weight + 0.25 * workload.transformer(0).head.weight
    found = (workload.weights(strategy, average)["head.weight"], plain.head.weight)
    return [float((one - expected).abs().max()) for one in found]


@contract.check(208)
def check_moving_average(subject: Subject) -> None:
    """The weights of a prepared or plain model move to `beta` times theirs plus the rest of the other's (K02)."""
    for found in subject.run(_moved):
        if not max(found) <= 1e-6 or math.isnan(sum(found)):
            raise AssertionError(f"a prepared and a plain average are off by {found}")


def _moved_in_bf16(make: Make) -> list[float]:
    from lightrft.sim.contracts.strategy import workload

    strategy = make(bf16=True, actor_learning_rate=0.0)
    model = strategy.prepare_model(workload.transformer(0), is_training=True)
    frozen = strategy.prepare_model(workload.transformer(1).requires_grad_(False))
    trained = strategy.prepare_model(workload.transformer(1), is_training=True)
    plain = workload.transformer(1).bfloat16()
    for average in (frozen, trained, plain):
        for _ in range(BF16_MOVES):
            strategy.moving_average(model, average, beta=0.998)
    found = [workload.weights(strategy, average)["head.weight"] for average in (frozen, trained)]
    stays = 0.998**BF16_MOVES
    expected = stays * workload.transformer(1).head.weight + (1 - stays) * workload.transformer(0).head.weight
    return [float((one.detach().float() - expected).abs().max()) for one in (*found, plain.head.weight)]


@contract.check(209, "bf16")
def check_moving_average_in_bfloat16(subject: Subject) -> None:
    """In bfloat16 an average of weights adds up steps that are smaller than its weights can show."""
    for found in subject.run(_moved_in_bf16):
        if not max(found) <= 2e-3:
            raise AssertionError(f"a frozen, a trained and a plain average are off by {found}")
