"""Ways to break a strategy: each takes a function of one, and gives a wrong one to put in its place."""

from contextlib import contextmanager

import torch

from lightrft.errors import ConfigError
from lightrft.strategy.backend_strategy import Step
from lightrft.strategy.packing import packed
from lightrft.strategy.utils.agreement import Outcome, Ranks


def returns(value):
    """A function that only returns ``value``."""
    return lambda original: lambda *args, **kwargs: value


# -- Training ---------------------------------------------------------------------------------------------------------


def doubled(reduce):
    return lambda self, divisor: reduce(self, divisor / 2)


def added_up(reduce):
    return lambda self, divisor: reduce(self, self._world_size)


def own_norm(reduce):
    def reduced(self, divisor):
        reduce(self, divisor)
        return self._gradient.square().sum()

    return reduced


def applied(step):
    def stepped(self, prepared):
        found = step(self, prepared)
        return Step(norm=found.norm, applied=True)

    return stepped


def without_decay(apply):
    def applied(self, prepared, flat, norm):
        for group in prepared.optimizer.param_groups:
            group["weight_decay"] = 0.0
        apply(self, prepared, flat, norm)

    return applied


def untied(shard):
    def sharded(self, model, *given, **more):
        model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
        return shard(self, model, *given, **more)

    return sharded


def rate_of_the_start(apply):
    def applied(self, prepared, flat, norm):
        groups = prepared.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        apply(self, prepared, flat, norm)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    return applied


def steps_nevertheless(step):
    def stepped(self, prepared):
        found = step(self, prepared)
        if not found.applied:
            for one in self._flat(prepared):
                for piece in one.pieces:
                    piece.master.grad = torch.zeros_like(piece.master)
            self._apply(prepared, self._flat(prepared), 0.0)
        return found

    return stepped


def counted_in(reduce):
    def reduced(self, divisor):
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.ones_like(parameter)
        return reduce(self, divisor)

    return reduced


def first_model_only(apply):
    def applied(self, prepared, flat, norm):
        if self.__dict__.setdefault("first", prepared) is prepared:
            apply(self, prepared, flat, norm)

    return applied


def with_the_loss_scale(step):
    def stepped(self, prepared):
        found = step(self, prepared)
        return Step(norm=found.norm * self._loss_scale(prepared), applied=found.applied)

    return stepped


# -- Checkpoints ------------------------------------------------------------------------------------------------------


def without_states(part):
    return lambda optimizer, flat: part(None, flat)


def whatever_is_asked(load):
    return lambda self, model, folder, **options: load(self, model, folder)


def of_rank_0(load):
    return lambda path, *, rank, **kwargs: load(path, rank=0, **kwargs)


# -- Moving -----------------------------------------------------------------------------------------------------------


def forgets_states(move):
    def moved(self, prepared, device):
        move(self, prepared, device)
        prepared.optimizer.state.clear()

    return moved


def rounds(move):
    def moved(self, prepared, device):
        move(self, prepared, device)
        for parameter in prepared.module.parameters():
            parameter.data.copy_(parameter.data.bfloat16())

    return moved


def moves_and_refuses(offload):
    def offloaded(self, optimizer):
        try:
            offload(self, optimizer)
        except Exception:
            self._of_optimizer(optimizer).optimizer.state.clear()
            raise

    return offloaded


# -- Engines ----------------------------------------------------------------------------------------------------------


def first_only(parameters):
    return lambda self, model: list(parameters(self, model))[:1]


def prefixed(parameters):
    return lambda self, model: ((f"module.{name}", tensor) for name, tensor in parameters(self, model))


def trained_only(parameters):
    def found(self, model):
        trained = {name for name, one in self.unwrap_model(model).named_parameters() if one.requires_grad}
        return ((name, tensor) for name, tensor in parameters(self, model) if name in trained)

    return found


def tied_ones_twice(parameters):
    return lambda self, model: self.unwrap_model(model).named_parameters(remove_duplicate=False)


def as_at_first(parameters):
    def found(self, model):
        known = self.__dict__.setdefault("known", {})
        if model not in known:
            known[model] = [(name, tensor.clone()) for name, tensor in parameters(self, model)]
        return known[model]

    return found


def first_actor_for_ever(update):
    return lambda self, actor: update(self, self.__dict__.setdefault("actor", actor))


class KeepsCaches:
    """An engine whose caches are not reset."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def reset_caches(self):
        pass


def without_reset(send):
    return lambda engine, *args, **kwargs: send(KeepsCaches(engine), *args, **kwargs)


def one_bucket(in_buckets):
    return lambda parameters, limit, **kwargs: in_buckets(parameters, 1 << 30, **kwargs)


def backwards(generate):
    return lambda *args, **kwargs: generate(*args, **kwargs)[::-1]


def own_prompts_only(sent):
    def exchanged(data, sizes, ranks, device, **more):
        sent(data, sizes, ranks, device, **more)
        return [data if rank == ranks.rank else packed([]) for rank in range(ranks.world_size)]

    return exchanged


class Alone(Ranks):
    """Ranks that do not tell each other what has failed."""

    @contextmanager
    def together(self, what, otherwise=None):
        yield Outcome()


# -- Preparing, and the rest ------------------------------------------------------------------------------------------


def listed(prepare):
    def prepared(self, *given, **more):
        found = prepare(self, *given, **more)
        return [list(one) if isinstance(one, tuple) else one for one in found] if isinstance(found, list) else found

    return prepared


def nearly_the_same(reduce):
    def reduced(data, *given, **more):
        try:
            return reduce(data, *given, **more)
        except ConfigError:
            return data

    return reduced


def of_dicts_backwards(gather):
    def gathered(data, **more):
        found = gather(data, **more)
        return {name: rows.flip(0) for name, rows in found.items()} if isinstance(found, dict) else found

    return gathered


def rounding(tensors):
    def broken(cast):
        def rounded(self, model):
            for tensor in tensors(model):
                tensor.data.copy_(tensor.data.bfloat16())
            cast(self, model)

        return rounded

    return broken


def unscaled(gather):
    def gathered(values, group):
        found = gather(values, group)
        return found.detach() + (found - found.detach()) / group.size()

    return gathered


def shifted(make):
    def made(cls, world_size, rank, **sizes):
        return make.__func__(cls, world_size, world_size - 1 - rank, **sizes)

    return classmethod(made)
