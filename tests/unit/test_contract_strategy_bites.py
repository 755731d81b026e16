"""Strategies that are wrong in one way each are caught by the contract, with a message that says what is wrong."""

from contextlib import contextmanager

import pytest
import torch

from lightrft.sim import SimWorld, fake_checkpoints, flat_parameters
from lightrft.sim import strategy as fake
from lightrft.sim.contracts.strategy import CHECKS, SETTINGS, Subject
from lightrft.strategy import backend_strategy, engine, engine_calls, rollout, weight_sync
from lightrft.strategy.groups import ParallelGroups
from lightrft.strategy.utils import checkpoint_store, checkpoints, collectives, moving_average
from lightrft.strategy.utils.agreement import Outcome, Ranks
from lightrft.strategy.utils.sequence_parallel import exchange, processor

Flat, Fake, Backend = flat_parameters.FlatParameters, fake.FakeStrategy, backend_strategy.BackendStrategy
CHECK = {check.number: check for check in CHECKS}


def _returns(value):
    """In place of a function: one that only returns ``value``."""
    return lambda original: lambda *args, **kwargs: value


# -- Training ---------------------------------------------------------------------------------------------------------


def _doubled(reduce):
    return lambda self, divisor: reduce(self, divisor / 2)


def _own_norm(reduce):
    def reduced(self, divisor):
        reduce(self, divisor)
        return self._gradient.square().sum()

    return reduced


def _applied(step):
    def stepped(self, prepared):
        found = step(self, prepared)
        return backend_strategy.Step(norm=found.norm, applied=True)

    return stepped


def _rate_of_the_start(apply):
    def applied(self, prepared, flat, norm):
        groups = prepared.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        apply(self, prepared, flat, norm)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    return applied


def _steps_nevertheless(step):
    def stepped(self, prepared):
        found = step(self, prepared)
        if not found.applied:
            for one in self._flat(prepared):
                for piece in one.pieces:
                    piece.master.grad = torch.zeros_like(piece.master)
            self._apply(prepared, self._flat(prepared), 0.0)
        return found

    return stepped


def _counted_in(reduce):
    def reduced(self, divisor):
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.ones_like(parameter)
        return reduce(self, divisor)

    return reduced


def _first_model_only(apply):
    def applied(self, prepared, flat, norm):
        if self.__dict__.setdefault("first", prepared) is prepared:
            apply(self, prepared, flat, norm)

    return applied


def _with_the_loss_scale(step):
    def stepped(self, prepared):
        found = step(self, prepared)
        return backend_strategy.Step(norm=found.norm * self._loss_scale(prepared), applied=found.applied)

    return stepped


# -- Checkpoints ------------------------------------------------------------------------------------------------------


def _without_states(part):
    return lambda optimizer, flat: part(None, flat)


def _of_rank_0(load):
    return lambda path, *, rank, **kwargs: load(path, rank=0, **kwargs)


# -- Moving -----------------------------------------------------------------------------------------------------------


def _forgets_states(move):
    def moved(self, prepared, device):
        move(self, prepared, device)
        prepared.optimizer.state.clear()

    return moved


def _rounds(move):
    def moved(self, prepared, device):
        move(self, prepared, device)
        for parameter in prepared.module.parameters():
            parameter.data.copy_(parameter.data.bfloat16())

    return moved


def _moves_and_refuses(offload):
    def offloaded(self, optimizer):
        try:
            offload(self, optimizer)
        except Exception:
            self._of_optimizer(optimizer).optimizer.state.clear()
            raise

    return offloaded


# -- Engines ----------------------------------------------------------------------------------------------------------


def _first_only(parameters):
    return lambda self, model: list(parameters(self, model))[:1]


def _prefixed(parameters):
    return lambda self, model: ((f"module.{name}", tensor) for name, tensor in parameters(self, model))


def _trained_only(parameters):
    def found(self, model):
        trained = {name for name, one in self.unwrap_model(model).named_parameters() if one.requires_grad}
        return ((name, tensor) for name, tensor in parameters(self, model) if name in trained)

    return found


def _tied_ones_twice(parameters):
    return lambda self, model: self.unwrap_model(model).named_parameters(remove_duplicate=False)


def _as_at_first(parameters):
    def found(self, model):
        known = self.__dict__.setdefault("known", {})
        if model not in known:
            known[model] = [(name, tensor.clone()) for name, tensor in parameters(self, model)]
        return known[model]

    return found


def _first_actor_for_ever(update):
    return lambda self, actor: update(self, self.__dict__.setdefault("actor", actor))


class _KeepsCaches:
    """An engine whose caches are not reset."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def reset_caches(self):
        pass


def _without_reset(send):
    return lambda engine, *args, **kwargs: send(_KeepsCaches(engine), *args, **kwargs)


def _one_bucket(in_buckets):
    return lambda parameters, limit, **kwargs: in_buckets(parameters, 1 << 30, **kwargs)


def _backwards(generate):
    return lambda *args, **kwargs: generate(*args, **kwargs)[::-1]


def _own_prompts_only(gather):
    def gathered(make_requests, ranks, device):
        found = gather(make_requests, ranks, device)
        return [each if rank == ranks.rank else [] for rank, each in enumerate(found)]

    return gathered


class _Alone(Ranks):
    """Ranks that do not tell each other what has failed."""

    @contextmanager
    def together(self, what, otherwise=None):
        yield Outcome()


# -- Preparing, and the rest ------------------------------------------------------------------------------------------


def _listed(prepare):
    def prepared(self, *given, **more):
        found = prepare(self, *given, **more)
        return [list(one) if isinstance(one, tuple) else one for one in found] if isinstance(found, list) else found

    return prepared


def _rounding(tensors):
    def broken(cast):
        def rounded(self, model):
            for tensor in tensors(model):
                tensor.data.copy_(tensor.data.bfloat16())
            cast(self, model)

        return rounded

    return broken


def _unscaled(gather):
    def gathered(values, group):
        found = gather(values, group)
        return found.detach() + (found - found.detach()) / group.size()

    return gathered


def _shifted(make):
    def made(cls, world_size, rank, **sizes):
        return make.__func__(cls, world_size, world_size - 1 - rank, **sizes)

    return classmethod(made)


MUTATIONS = {
    # what is wrong: the check that sees it, its message, what is replaced, and how the original becomes the broken one
    "gradients are twice as large": (
        "ST101", "rank 0: the loss of step 1", Flat, "reduce_gradients", _doubled,
    ),
    "ranks keep their own weights": (
        "ST101", "rank 0: the loss of step 1", Flat, "_gather", _returns(None),
    ),
    "the norm is that of one rank": ("ST103", "rank 0: the loss of step 1", Flat, "reduce_gradients", _own_norm),
    "nothing is clipped": ("ST103", "the loss of step 1 is", Flat, "scale_gradients", _returns(None)),
    "dropped gradients stay": (
        "ST106", "dropped 1 micro-batches, with the warnings \\[\\]", Backend, "drop_partial_accumulation", _returns(1),
    ),
    "rates reach no weight": ("ST107", "the loss of step 2 is", Fake, "_apply", _rate_of_the_start),
    "a skipped step counts as one": (
        "ST108", r"each of two steps: \[0.005, 0.0, 0.0025", Fake, "_step", _applied,
    ),
    "a skipped step moves weights": (
        "ST108", "after a step that is skipped: .* differs", Fake, "_step", _steps_nevertheless,
    ),
    "what is not reached counts": (
        "ST109", "the norm is .* without the parameter", Flat, "reduce_gradients", _counted_in,
    ),
    "only the first model is trained": (
        "ST112", "the second of two models: .* differs", Fake, "_apply", _first_model_only,
    ),
    "16 bits are asked for and not used": (
        "ST113", "expected torch.bfloat16, and the model computes in torch.float32", Fake, "_compute_dtype",
        lambda original: None,
    ),
    "16 bits train nothing": ("ST113", "losses .* in float32", Fake, "_apply", _returns(None)),
    "norms have the loss scale": ("ST114", "norms .* in float32", Fake, "_step", _with_the_loss_scale),
    "a mean is a sum": (
        "ST201", "mean, max, min and sum are", collectives, "all_reduce",
        lambda f: lambda data, op, **k: f(data, "sum", **k),
    ),
    "ranks are counted from the end": ("ST204", "rank 0 knows", ParallelGroups, "make", _shifted),
    "averages move too fast": (
        "ST208", "average are off by", moving_average, "update", lambda f: lambda a, b, beta, d: f(a, b, 1 - beta, d),
    ),
    "checkpoints lack the optimizer": (
        "ST301", "resumed after step 1: .* differs", fake_checkpoints, "optimizer_part", _without_states,
    ),
    "random numbers start anew": (
        "ST301", "resumed after step 1: .* differs", checkpoints.CheckpointFolder, "restore_random_state",
        _returns(None),
    ),
    "all ranks go on with the random numbers of the first": (
        "ST301", "resumed after step 1: .* differs", checkpoints, "load_random_state", _of_rank_0,
    ),
    "schedules start anew": (
        "ST301", "resumed after step 1: .* differs", backend_strategy, "_resume_schedule", _returns(None),
    ),
    "the first rank's part is everybody's": (
        "ST302", "loaded by 1 ranks: .* differs", fake_checkpoints, "joined",
        lambda f: lambda parts: f(parts[:1] * len(parts)),
    ),
    "a model is saved in part": ("ST307", "expected weights", Fake, "full_parameters", _first_only),
    "checkpoints are of any size": (
        "ST308", "room for 2, 2, 1 and no checkpoint leaves", checkpoint_store, "_small", _returns(True),
    ),
    "an optimizer that is moved forgets": (
        "ST401", "at each move: \\[False", Fake, "_move_optimizer", _forgets_states,
    ),
    "micro-batches survive a move of the optimizer": (
        "ST401", "with moves: .* differs", Backend, "drop_partial_accumulation", _returns(0),
    ),
    "micro-batches survive a move of the model": (
        "ST402", "moved out and back: .* differs", Backend, "drop_partial_accumulation", _returns(0),
    ),
    "a model that is moved is rounded": ("ST402", "moved out and back: .* differs", Fake, "_move_model", _rounds),
    "moves are not counted": (
        "ST403", "expected OffloadStateError, and it returned None", Backend, "_refuse_offloaded", _returns(None),
    ),
    "a refused move is made": (
        "ST403", "after moves that were refused: .* differs", Backend, "maybe_offload_optimizer", _moves_and_refuses,
    ),
    "models are trained while they are away": (
        "ST404", "expected OffloadStateError, and it returned None", Backend, "_refuse_offloaded", _returns(None),
    ),
    "sleep is asked for twice": (
        "ST502", "'sleep 1', 'sleep 1'", engine, "put_to_sleep", lambda f: lambda engine: engine.sleep(),
    ),
    "weights are sent under other names": (
        "ST503", "update 1, .* module.embedding.weight", Fake, "full_parameters", _prefixed,
    ),
    "frozen weights are not sent": (
        "ST503", "update 2, .*: blocks.0.inputs.weight", Fake, "full_parameters", _trained_only,
    ),
    "tied weights are sent twice": (
        "ST503", "update 1, tied=True: .*: head.weight", Fake, "full_parameters", _tied_ones_twice,
    ),
    "former weights are sent": (
        "ST503", "after a step the engine still has the former", Fake, "full_parameters", _as_at_first,
    ),
    "the first actor is sent for ever": (
        "ST503", "update 2, tied=False", engine_calls.EngineCalls, "update_engine_weights", _first_actor_for_ever,
    ),
    "caches outlive their weights": ("ST503", "the engine was asked", weight_sync, "send", _without_reset),
    "weights are sent to an engine that sleeps": (
        "ST503", "update_weights: the engine is asleep", engine, "wake", _returns(None),
    ),
    "all weights are one bucket": ("ST504", "buckets of \\[1920000\\] bytes", weight_sync, "in_buckets", _one_bucket),
    "completions are in another order": ("ST505", "rank 1 got", rollout, "gather_and_generate", _backwards),
    "prompts are not gathered": ("ST505", "the engine of rank 0 got", rollout, "gather", _own_prompts_only),
    "an error of an engine stays with its rank": ("ST506", "no memory left", engine_calls, "Ranks", lambda f: _Alone),
    "tuples become lists": ("ST602", "found \\[\\[False, False", Backend, "prepare", _listed),
    "pretrained weights are rounded": (
        "ST607", "meta_init=False: .* differs", Fake, "_cast", _rounding(torch.nn.Module.parameters),
    ),
    "buffers of pretrained models are rounded": (
        "ST607", "meta_init=False: logits differ", Fake, "_cast", _rounding(torch.nn.Module.buffers),
    ),
    "gathered log-probs have a share of the gradient": (
        "ST801", "two ranks a sequence: the loss of step 1", processor, "gather_sequence", _unscaled,
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_strategy_is_caught(wrong, monkeypatch):
    number, message, owner, name, broken = MUTATIONS[wrong]
    subject = Subject(world=SimWorld, settings=SETTINGS["fake, as DeepSpeed"], name="broken", size=2)
    monkeypatch.setattr(owner, name, broken(owner.__dict__[name]))
    with pytest.raises(Exception, match=f"(?s){message}"):
        CHECK[number](subject)


def test_the_gathering_that_is_broken_above_is_the_real_one():
    assert processor.gather_sequence is exchange.gather_sequence
    assert torch.is_grad_enabled()
