"""Ways to break an engine: each takes a function of one, and gives a wrong one to put in its place."""

import dataclasses
import itertools

import numpy as np
import torch
import torch.distributed as dist

from lightrft.errors import ConfigError, EngineStateError, LightRFTError
from lightrft.strategy.engine_state import TAGS
from lightrft.strategy.requests import Request


def returns(value):
    """A function that only returns ``value``."""
    return lambda original: lambda *args, **kwargs: value


def says(value):
    """A property that is always ``value``."""
    return lambda original: property(lambda self: value)


# -- Completions ------------------------------------------------------------------------------------------------------


def completed(**changes):
    """Each completion with some of its fields made by functions of it."""

    def broken(completions_of):
        def made(*args, **kwargs):
            for one in completions_of(*args, **kwargs):
                yield dataclasses.replace(one, **{name: make(one) for name, make in changes.items()})

        return made

    return broken


def numbers_of_numpy(one):
    return tuple(np.int64(token) for token in one.output_token_ids)


def drawn_with(change):
    """Sampling parameters that ``change`` has changed, or dropped."""
    return lambda sampling_for: lambda params, seeds, cls, **more: sampling_for(change(params), seeds, cls, **more)


def replaced(**changes):
    return drawn_with(lambda params: dataclasses.replace(params, **changes))


def without_stops_beyond_the_end(params):
    return dataclasses.replace(params, stop_token_ids=()) if params.ignore_eos else params


def never_greedy(params):
    return dataclasses.replace(params, temperature=params.temperature or 1.0)


def sixteen(params):
    return dataclasses.replace(params, max_tokens=16) if params.max_tokens == 8 else params


def anything_is_a_request(request_of):
    def made(entry):
        try:
            return request_of(entry)
        except ConfigError:
            return Request(prompt_token_ids=(7,))

    return made


def one_request_at_least(generate):
    return lambda self, requests, params: generate(self, requests or [{"prompt_token_ids": (7,)}], params)


def bad_ones_left_out(generate):
    def generated(self, requests, params):
        try:
            return generate(self, requests, params)
        except ConfigError:
            return generate(self, requests[:-1], params)

    return generated


def unknown_options_left_out(made):
    def making(cls, given, engine):
        known = {field.name for field in dataclasses.fields(cls)}
        return made(cls, {name: value for name, value in given.items() if name in known}, engine)

    return making


def cut_off_later(generate):
    def generated(self, samples):
        return [dataclasses.replace(one, processed=one.tempered) for one in generate(self, samples)]

    return generated


# -- Seeds ------------------------------------------------------------------------------------------------------------


def counted(seeds_for):
    count = itertools.count()
    return lambda contents, seed: [next(count) << 8 for _ in contents]


def by_place(seeds_for):
    return lambda contents, seed: [seed + (place << 8) for place in range(len(contents))]


def by_content_alone(seeds_for):
    return lambda contents, seed: [seeds_for([content], seed)[0] for content in contents]


def always_seed_0(generate):
    def generated(self, requests, params):
        return generate(self, requests, dataclasses.replace(params, seed=params.seed or 0))

    return generated


def draws_a_number(call):
    def drawing(*args, **kwargs):
        torch.rand(1)
        return call(*args, **kwargs)

    return drawing


# -- States -----------------------------------------------------------------------------------------------------------


def begins_at_1(init):
    def begun(self, name="the engine"):
        init(self, name)
        self.weight_version = 1

    return begun


def any_level(sleep):
    return lambda self, level, carry_out: sleep(self, min(max(level, 1), 2), carry_out)


def as_level_1(sleep):
    return lambda self, level, carry_out: sleep(self, 1, carry_out)


def woken_first(update):
    def updated(self, *args, **kwargs):
        self.wake_up()
        update(self, *args, **kwargs)

    return updated


def wholly(wake_up):
    return lambda self, tags, carry_out: wake_up(self, tags and list(TAGS), carry_out)


def once_only(wake_up):
    def woken(self, tags, carry_out):
        if not self.asleep:
            raise EngineStateError("wake_up: it is awake already")
        wake_up(self, tags, carry_out)

    return woken


def awake_only(reset):
    def emptied(self):
        if self.asleep:
            raise EngineStateError("reset_caches: it sleeps")
        reset(self)

    return emptied


def counts_failures(update):
    def updated(self, version, carry_out):
        try:
            update(self, version, carry_out)
        except LightRFTError:
            self.weight_version = version
            raise

    return updated


def any_version(update):
    return lambda self, version, carry_out: update(self, max(version, self.weight_version + 1), carry_out)


def forgives_failures(update):
    def updated(self, version, carry_out):
        try:
            update(self, version, carry_out)
        finally:
            self._stale = ""

    return updated


def ahead_on_rank_1(update):
    def updated(self, version, carry_out):
        update(self, version, carry_out)
        self.weight_version += dist.is_initialized() and dist.get_rank()

    return updated


def dead_or_not(check):
    def checked(self, move):
        if self._dead:
            check(self, move)

    return checked


# -- Weights ----------------------------------------------------------------------------------------------------------


def reads_only(load):
    def loaded(self, buckets):
        for _ in buckets:
            pass

    return loaded


def keeps_buckets(load):
    return lambda self, buckets: load(self, iter([list(bucket) for bucket in buckets]))


def aliased(put):
    def kept(self, name, tensor):
        put(self, name, tensor)
        for mine in (self.held[name], self._used[name]):
            mine.data = tensor.detach()

    return kept


def without_gradients(load):
    def loaded(self, buckets):
        with torch.no_grad():
            load(self, buckets)

    return loaded


def swallows(load):
    def until_it_fails(buckets):
        try:
            yield from buckets
        except OSError:
            return

    return lambda self, buckets: load(self, until_it_fails(buckets))


def any_dtype(fits):
    return lambda self, name, shape, dtype=None: fits(self, name, shape)


def single_dtype(fits):
    return lambda self, name, shape, dtype=None: fits(self, name, shape, None if dtype == torch.float32 else torch.int8)


def forgetful(fits):
    def fitting(self, name, shape, dtype=None):
        known = set(self._seen)
        self._seen.clear()
        found = fits(self, name, shape, dtype)
        self._seen |= known
        return found

    return fitting


def halves(name):
    """One weight arrives with half of its value."""

    def broken(copied):
        def made(bucket, coverage, **how):
            for each, tensor in copied(bucket, coverage, **how):
                yield each, tensor / 2 if each == name else tensor

        return made

    return broken


def keeping(copied):
    kept = []

    def made(bucket, coverage, **how):
        kept.extend(tensor for _, tensor in bucket)
        yield from copied(bucket, coverage, **how)

    return made


def one_by_one(in_buckets):
    return lambda parameters, limit, **kwargs: in_buckets(parameters, 1, **kwargs)


def dtype_left_out(in_buckets):
    return lambda parameters, limit, dtype=None, **kwargs: in_buckets(parameters, limit, **kwargs)


def one_further(update):
    def updated(self, version, carry_out):
        update(self, version, carry_out)
        self.weight_version += 1

    return updated


def not_drained(send):
    def sent(engine, parameters, *, bucket_bytes, **kwargs):
        parameters = iter(parameters)
        first = list(itertools.islice(parameters, 2))
        return send(engine, first, bucket_bytes=bucket_bytes, **kwargs)

    return sent


def never_verified(send):
    def sent(*args, verify=False, **kwargs):
        return send(*args, **kwargs)

    return sent


def names_may_collide(noted):
    def made(sent, parameters, *dtypes):
        yield from dict(noted(sent, dict(parameters).items(), *dtypes)).items()

    return made


def not_merged(value):
    return lambda self: self.parts[self.base]


def outermost(savable):
    return lambda model: ("", None)


# -- Ranks ------------------------------------------------------------------------------------------------------------


def backwards(generate):
    return lambda *args, **kwargs: generate(*args, **kwargs)[::-1]


def silent_on_rank_0(generate):
    def generated(*args, **kwargs):
        try:
            return generate(*args, **kwargs)
        except LightRFTError:
            if dist.get_rank() == 0:
                return []
            raise

    return generated


def with_the_group(shutdown):
    def ended(self):
        shutdown(self)
        if dist.is_initialized():
            dist.destroy_process_group()

    return ended
