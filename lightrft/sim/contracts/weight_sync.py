"""The contract of sending weights: what ``weight_sync.send`` and an engine together promise a trainer.

It is checked of the ``Subject`` of the contract of engines. ``docs/contracts.md`` shows how it is bound.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightrft.errors import ConfigError, EngineStateError, StaleWeightsError, WeightSyncError
from lightrft.sim.contracts.contract import Contract
from lightrft.sim.contracts.engine import reference
from lightrft.sim.contracts.engine.capabilities import CAPABILITIES
from lightrft.sim.contracts.findings import expect, refused
from lightrft.strategy import weight_sync
from lightrft.strategy.engine import EngineStatus, RolloutEngine
from lightrft.strategy.utils.checkpoint_form import in_checkpoint_form
from lightrft.strategy.utils.fingerprints import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lightrft.sim.contracts.engine.subject import Subject

__all__ = ["CHECKS", "contract", "parametrize"]

contract = Contract("sending weights", prefix="WS", capabilities=CAPABILITIES)

Named = tuple[str, Tensor]


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


# -- What arrives -----------------------------------------------------------------------------------------------------


@contract.check(101, "language_model")
def check_every_weight_arrives(subject: Subject) -> None:
    """After an update log-probs are those of the new weights, closer than they would be if any single weight were still the former one (F06)."""  # noqa: E501
    subject.fresh()
    sent = subject.send(1)
    subject.holds(subject.models[1], "after an update of all weights")
    first, second = subject.weights(0), subject.weights(1)
    expect(sent.names == list(second), f"sent were {sent.names}, expected {list(second)}")
    one = max(subject.generate(logprobs=0, ignore_eos=True), key=lambda each: len(each.prompt_token_ids))
    model = copy.deepcopy(subject.models[1])
    own = {fingerprint(parameter): parameter for parameter in model.parameters()}
    for name, weight in second.items():
        parameter = own.get(fingerprint(weight))
        if parameter is None:
            raise AssertionError(f"{name} is no parameter of the model, so that it cannot be seen whether it arrives")
        with torch.no_grad():
            kept = parameter.clone()
            parameter.copy_(first[name])
            without = reference.log_probs(model, one.prompt_token_ids, one.output_token_ids)
            parameter.copy_(kept)
        far = float((torch.tensor(one.log_probs) - without).abs().max())
        if not far > 2 * subject.within:
            raise AssertionError(
                f"{name} makes a difference of {far} to log-probs: too little to see whether it arrived"
            )


@contract.check(102)
def check_a_tied_output_layer_may_be_sent_or_not(subject: Subject) -> None:
    """An output layer that is the embedding may be sent beside it or left out, in turn; both change with it (K18)."""
    names = set(dict(subject.models[0].state_dict())) - set(subject.weights(0))
    heads = [name for name in names if name.endswith("head.weight")]
    subject.needs(heads, "its models have no output layer that is the embedding")
    subject.fresh()
    for index in (1, 0):
        subject.send({**subject.weights(index), heads[0]: subject.models[index].state_dict()[heads[0]]})
        subject.holds(index, "sent with its output layer")
        subject.send(1 - index)
        subject.holds(1 - index, "sent without its output layer")


@contract.check(103, "language_model")
def check_weights_of_another_dtype_are_converted(subject: Subject) -> None:
    """Weights of another floating-point dtype are converted to that of the engine, and `dtype=` rounds matrices on the way."""  # noqa: E501
    subject.fresh()
    weights = subject.weights(1)
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    model = _loaded(subject.models[1], rounded)
    subject.send(rounded)
    subject.holds(model, "sent in bfloat16")
    subject.send({name: weight.double() for name, weight in weights.items()})
    subject.holds(1, "sent in float64")
    subject.send(weights, dtype=torch.bfloat16)
    matrices = {name: rounded[name] if weight.dim() > 1 else weight for name, weight in weights.items()}
    subject.holds(_loaded(subject.models[1], matrices), "sent with dtype=bfloat16")


def _loaded(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of ``model`` with other values, in its own dtype."""
    changed = copy.deepcopy(model)
    by_value = {fingerprint(one): name for name, one in in_checkpoint_form(model, model.named_parameters())}
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.copy_(weights[by_value[fingerprint(parameter)]])
    return changed


class _Wrapper(nn.Module):
    """A trainer's module around the model, with something of its own beside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.actor = model
        self.value_head = nn.Linear(2, 1)


@contract.check(104)
def check_names_are_those_of_the_checkpoint(subject: Subject) -> None:
    """A model of transformers inside of another module is sent under the names of its files, and what is beside it is left out (F06)."""  # noqa: E501
    subject.needs(hasattr(subject.models[0], "save_pretrained"), "its models are not of transformers")
    subject.fresh()
    around = _Wrapper(subject.models[1])
    sent = subject.send(dict(in_checkpoint_form(around, around.named_parameters())))
    expect(sent.names == list(subject.weights(1)), f"sent were {sent.names}, expected {list(subject.weights(1))}")
    subject.holds(1, "sent from inside of another module")


@contract.check(105, "language_model")
def check_adapters_are_merged(subject: Subject) -> None:
    """A model with LoRA adapters of PEFT is sent with these merged, and is left as it was (F06)."""
    subject.needs(importlib.util.find_spec("peft"), "PEFT is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        _sent_merged(subject)


def _sent_merged(subject: Subject) -> None:
    from peft import LoraConfig, get_peft_model

    subject.fresh()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(copy.deepcopy(subject.models[1]), config).eval()  # type: ignore[arg-type, unused-ignore]
    before = [fingerprint(parameter) for parameter in adapted.parameters()]
    sent = subject.send(dict(in_checkpoint_form(adapted, adapted.named_parameters())))
    expect(sorted(sent.names) == sorted(subject.weights(1)), f"sent were {sorted(sent.names)}")
    subject.holds(adapted, "sent with its adapters merged")
    expect(before == [fingerprint(parameter) for parameter in adapted.parameters()], "the model was changed by it")


# -- How it travels ---------------------------------------------------------------------------------------------------


class _Watching:
    """An engine behind which the real one is: counts calls, and changes one weight on its way if it is told to.

    Args:
        engine: that does the work.
        change: name of a weight, of which 1 is added to the first number.
    """

    def __init__(self, engine: RolloutEngine, change: str = "") -> None:
        self.engine = engine
        self.calls: list[str] = []
        self.sizes: list[int] = []
        self._change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def update_weights(self, buckets: Iterable[Sequence[Named]], version: int) -> None:
        """Pass them on."""
        self.calls.append("update_weights")
        self.engine.update_weights((self._passed(bucket) for bucket in buckets), version)

    def _passed(self, bucket: Sequence[Named]) -> Sequence[Named]:
        self.sizes.append(_bytes(tensor for _, tensor in bucket))
        if self._change not in dict(bucket):
            return bucket  # itself, as it is emptied when it is spent
        return [(name, self._changed(name, tensor)) for name, tensor in bucket]

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        if name == self._change:
            tensor = tensor.clone()
            tensor.view(-1)[0] += 1
        return tensor

    def reset_caches(self) -> None:
        """Pass it on."""
        self.calls.append("reset_caches")
        self.engine.reset_caches()


@contract.check(201)
def check_buckets_are_bounded(subject: Subject) -> None:
    """No bucket is larger than `bucket_bytes`, unless one weight is; no more than two buckets and one weight exist at a time while the engine reads (F07, K09)."""  # noqa: E501
    engine = subject.fresh()
    weights = subject.weights(1)
    largest = max(_bytes([weight]) for weight in weights.values())
    limit = largest + 1000
    alive, most = 0, 0

    def died(size: int) -> None:
        nonlocal alive
        alive -= size

    def gathered() -> Iterator[Named]:
        nonlocal alive, most
        for name, weight in weights.items():
            tensor = weight.clone()
            size = _bytes([tensor])
            alive += size
            most = max(most, alive)
            weakref.finalize(tensor.untyped_storage(), died, size)
            yield name, tensor
            del tensor

    watching: Any = _Watching(engine)
    weight_sync.send(watching, gathered(), bucket_bytes=limit, poison=False)
    expect(max(watching.sizes) <= limit, f"buckets of {watching.sizes} bytes, expected {limit} at most")
    expected = 2 * limit + largest
    expect(most <= expected, f"{most} bytes of gathered weights were kept, expected {expected} at most")
    expect(alive == 0, f"{alive} bytes of gathered weights are still kept after the update")
    subject.holds(1, "after an update in bounded buckets")


@contract.check(202)
def check_buckets_are_poisoned(subject: Subject) -> None:
    """An engine holds what was sent although all of it is overwritten with NaN as soon as the update has ended (F08)."""  # noqa: E501
    subject.fresh()
    for size in (1, 1 << 15):
        subject.send(1, bucket_bytes=size, poison=True)
        subject.holds(1, f"sent in buckets of {size} bytes that are overwritten afterwards")
        subject.send(0, bucket_bytes=size, poison=False)
        subject.holds(0, f"sent in buckets of {size} bytes that are not overwritten")


@contract.check(203)
def check_calls_are_far_fewer_than_weights(subject: Subject) -> None:
    """An update is one `update_weights` and one `reset_caches`; the library is called once for each bucket at most, and not once for each weight (K09)."""  # noqa: E501
    engine = subject.fresh()
    weights = subject.weights(1)
    before = subject.library_calls(engine) if subject.library_calls is not None else 0
    watching: Any = _Watching(engine)
    sent = weight_sync.send(watching, weights.items(), bucket_bytes=_bytes(weights.values()) // 2)
    expect(watching.calls == ["update_weights", "reset_caches"], f"the engine was asked {watching.calls}")
    expect(sent.buckets <= 3, f"{sent.buckets} buckets for twice as much as one holds")
    if subject.library_calls is not None:
        calls = subject.library_calls(engine) - before
        expect(0 < calls <= sent.buckets, f"{calls} calls of the library for {sent.buckets} buckets")
    subject.holds(1, "after an update in few buckets")


@contract.check(204)
def check_what_was_sent_is_told(subject: Subject) -> None:
    """`send` tells version, names in their order, bytes and buckets; the version is one more than before, on the engine and on completions."""  # noqa: E501
    engine = subject.fresh()
    version = engine.weight_version
    weights = subject.weights(1)
    total = _bytes(weights.values())
    for count, size in enumerate((total, 1), 1):
        sent = subject.send(1, bucket_bytes=size)
        found = sent.version, sent.names, sent.bytes, sent.buckets
        expected = version + count, list(weights), total, 1 if size == total else len(weights)
        expect(found == expected, f"told was {found}, expected {expected}")
        versions = {engine.weight_version, *(one.weight_version for one in subject.generate())}
        expect(versions == {version + count}, f"the versions are {versions}, expected {version + count}")


@contract.check(205)
def check_sending_empties_the_caches(subject: Subject) -> None:
    """Nothing that was computed with former weights is used after `send` (F05)."""
    subject.fresh()
    subject.holds(0, "before an update")
    for index in (1, 0):
        subject.send(index)
        subject.holds(index, "at its first completions after an update")


# -- What goes wrong --------------------------------------------------------------------------------------------------


@contract.check(301)
def check_a_failed_update_is_gathered_to_its_end(subject: Subject) -> None:
    """If the engine refuses an update, all weights are gathered nevertheless, since other ranks wait for it; the engine is stale until the next update (F06, F17)."""  # noqa: E501
    engine = subject.fresh()
    weights = subject.weights(1)
    gathered: list[str] = []

    def source() -> Iterator[Named]:
        for name, weight in [("extra.weight", torch.zeros(3)), *weights.items()]:
            gathered.append(name)
            yield name, weight

    message = refused(lambda: weight_sync.send(engine, source(), bucket_bytes=1), WeightSyncError)
    expect("extra.weight" in message, f"the error does not name the weight: {message}")
    expect(len(gathered) == len(weights) + 1, f"{len(gathered)} weights of {len(weights) + 1} were gathered")
    expect(engine.status is EngineStatus.STALE, f"it is {engine.status}, expected stale")
    subject.send(1)
    subject.holds(1, "after a failed update and a whole one")


@contract.check(302)
def check_nothing_is_sent_to_an_engine_that_sleeps(subject: Subject) -> None:
    """`send` to an engine whose weights sleep is refused, and all weights are gathered nevertheless (F02)."""
    engine = subject.fresh()
    engine.sleep(1)
    gathered: list[str] = []
    weights = subject.weights(1)

    def source() -> Iterator[Named]:
        for name, weight in weights.items():
            gathered.append(name)
            yield name, weight

    message = refused(lambda: weight_sync.send(engine, source(), bucket_bytes=1), EngineStateError)
    expect("wake" in message, f"the message says not what to do: {message}")
    expect(gathered == list(weights), f"{len(gathered)} weights of {len(weights)} were gathered")
    engine.wake_up()
    subject.holds(0, "after an update that was refused")


@contract.check(303)
def check_names_that_collide_are_an_error(subject: Subject) -> None:
    """Two weights under one name are a WeightSyncError that names it (F06)."""
    engine = subject.fresh()
    weights = list(subject.weights(1).items())
    message = refused(lambda: weight_sync.send(engine, [*weights, weights[0]], bucket_bytes=1 << 16), WeightSyncError)
    expect(weights[0][0] in message and "twice" in message, f"the error is {message!r}")
    expect(engine.status is EngineStatus.STALE, f"it is {engine.status}, expected stale")


class _Silent(_Watching):
    """One that does not tell."""

    tells_weights = False


# -- Verifying --------------------------------------------------------------------------------------------------------


@contract.check(401, "tells_weights")
def check_the_engine_tells_what_it_holds(subject: Subject) -> None:
    """`fingerprints` gives those of all weights that were sent, under their names, bit by bit (F06)."""
    engine = subject.fresh()
    for index in (0, 1):
        if index:
            subject.send(index)
        held = engine.fingerprints()
        if held is None:
            raise AssertionError(f"{subject.name} cannot tell")
        wanted = {name: fingerprint(weight) for name, weight in subject.weights(index).items()}
        other = sorted(name for name in wanted if held.get(name) != wanted[name])
        expect(not other, f"it holds others than were sent: {', '.join(other)}")
        expect(not set(held) - set(subject.models[index].state_dict()), f"it holds {sorted(set(held) - set(wanted))}")


@contract.check(402, "tells_weights")
def check_verify_finds_what_arrived_otherwise(subject: Subject) -> None:
    """`verify=True` passes if all arrived, with weights of another dtype too, and names a weight of which one number arrived otherwise; the engine is stale then, until the next update (F06)."""  # noqa: E501
    engine = subject.fresh()
    weights = subject.weights(1)
    subject.send(1, verify=True)
    subject.send({name: weight.double() for name, weight in weights.items()}, verify=True)
    subject.send(weights, verify=True, dtype=torch.bfloat16)
    for name in list(weights)[:: math.ceil(len(weights) / 6)]:
        watching: Any = _Watching(engine, change=name)
        send = functools.partial(weight_sync.send, watching, weights.items(), bucket_bytes=1 << 16, verify=True)
        message = refused(send, WeightSyncError)
        expect(message.endswith(f": {name}"), f"{name} arrived otherwise, and the error is {message!r}")
        expect(engine.is_stale, f"{name} arrived otherwise, and the engine is {engine.status}")
        refused(subject.generate, StaleWeightsError)
    subject.send(1, verify=True)
    subject.holds(1, "verified")


@contract.check(403)
def check_an_engine_that_cannot_tell_is_not_verified(subject: Subject) -> None:
    """`verify=True` of an engine that cannot tell what it holds is a ConfigError, before anything is sent."""
    engine = subject.fresh()
    watching: Any = _Silent(engine)
    weights = subject.weights(1)
    message = refused(
        lambda: weight_sync.send(watching, weights.items(), bucket_bytes=1 << 16, verify=True), ConfigError
    )
    expect("verify" in message and watching.calls == [], f"{message!r}, and the engine was asked {watching.calls}")
    subject.holds(0, "after an update that was refused")


CHECKS = contract.checks
parametrize = contract.parametrize
