"""``sglang.Engine``."""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from lightrft.errors import ConfigError, EngineStateError, WeightSyncError
from lightrft.sim.engine.building import build, model_config, positions, tokenizer_of
from lightrft.sim.engine.core import Core
from lightrft.sim.engine.lacking import ORDER, Refusing, Surface, lacks, lacks_text
from lightrft.sim.engine.media import expanded
from lightrft.sim.engine.numbers import digest
from lightrft.sim.engine.samples import Drawn, Medium, Sample
from lightrft.sim.engine.sglang_face.buckets import FlattenedTensorBucket, MultiprocessingSerializer
from lightrft.sim.engine.sglang_face.sampling_params import SamplingParams
from lightrft.sim.engine.sglang_face.server_args import ServerArgs, check, length
from lightrft.strategy.request_seeds import content_of, seeds_for
from lightrft.strategy.requests import Request
from lightrft.strategy.utils.agreement import Ranks
from lightrft.strategy.utils.call_sites import call_site

__all__ = ["Engine"]

_DEFAULT_SEED = 42

_THERE = ("prompt", "sampling_params", "input_ids", "image_data", "video_data", "return_logprob")
"""Arguments of ``generate`` that the fake engine heeds."""

_ARGUMENTS: dict[str, Any] = {
    "prompt": None,
    "sampling_params": None,
    "input_ids": None,
    "image_data": None,
    "audio_data": None,
    "video_data": None,
    "mm_hashes": None,
    "mm_content_hashes": None,
    "return_logprob": False,
    "logprob_start_len": None,
    "top_logprobs_num": None,
    "token_ids_logprob": None,
    "lora_path": None,
    "custom_logit_processor": None,
    "require_reasoning": False,
    "return_hidden_states": False,
    "return_routed_experts": False,
    "routed_experts_start_len": 0,
    "stream": False,
    "bootstrap_host": None,
    "bootstrap_port": None,
    "bootstrap_room": None,
    "routed_dp_rank": None,
    "disagg_prefill_dp_rank": None,
    "kv_hints": None,
    "data_parallel_rank": None,
    "external_trace_header": None,
    "rid": None,
    "session_params": None,
    "priority": None,
    "session_id": None,
    "cache_salt": None,
}

CALL = Surface(
    engine="SGLang",
    honoured=frozenset(_THERE),
    idle={
        "rid": "how a request is called",
        "priority": ORDER,
        "external_trace_header": "what is logged",
        "routed_experts_start_len": "where routed experts begin, which are not returned",
    },
)
"""Of ``generate``."""

_GENERATE = inspect.Signature(
    [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY if name == "cache_salt" else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default,
            )
            for name, default in _ARGUMENTS.items()
        ),
    ]
)

_TAGS = ("kv_cache", "weights", "cuda_graph")


@dataclass(frozen=True, slots=True)
class FlushCacheOutput:
    """What ``flush_cache`` returns."""

    success: bool
    message: str = ""


class Asked(NamedTuple):
    """One prompt."""

    tokens: tuple[int, ...]
    seen: tuple[int, ...]
    params: SamplingParams
    media: tuple[Medium, ...]


class Engine(Refusing):
    """The engine, in this process. What makes the scheduler of SGLang die makes this one dead.

    Args:
        kwargs: see ``ServerArgs``; or ``server_args``, which are those, and nothing else counts then.
    """

    _engine = "SGLang"

    def __init__(self, **kwargs: Any) -> None:
        self.server_args = given = kwargs["server_args"] if "server_args" in kwargs else ServerArgs(**kwargs)
        check(given)
        config = model_config(given.model_path)
        self._limit = length(given.context_length, positions(config))
        network = build(
            given.model_path,
            given.dtype,
            prefix_caching=not given.disable_radix_cache,
            dummy=given.load_format == "dummy",
        )
        self._core = Core(network, "the fake SGLang engine", Ranks(rank=0, world_size=1))
        self._tokenizer: Any = None
        if not given.skip_tokenizer_init:
            self._tokenizer = tokenizer_of(given.tokenizer_path or given.model_path)
            if self._tokenizer is None and config:  # in hash mode there need not be a model at all
                raise ConfigError(f"there is no tokenizer in {given.model_path}: set skip_tokenizer_init")
            network.decode = getattr(self._tokenizer, "decode", None)
        self._media_tokens = {kind: config.get(f"{kind}_token_id") for kind in ("image", "video")}
        self._deterministic = given.enable_deterministic_inference or given.rl_on_policy_target is not None
        self._released: dict[str, str] = {}
        self._updating = ""
        self._arrived: set[str] = set()
        self._lost = False
        self._dirty = False
        self._requests = 0
        self._calls = 0
        self._raw = os.environ.get("SGLANG_RETURN_ORIGINAL_LOGPROB", "").lower() in ("1", "true")

    # -- Generation ---------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Completions: a dictionary for one prompt, a list for several, samples of one prompt beside each other.

        ``Engine.generate.__signature__`` has the arguments.
        """
        bound = _GENERATE.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        CALL.check({name: given[name] for name in _ARGUMENTS}, _ARGUMENTS)
        return self._generate(*(given[name] for name in _THERE))

    def _generate(
        self, prompt: Any, sampling_params: Any, input_ids: Any, image_data: Any, video_data: Any, return_logprob: Any
    ) -> Any:
        self._check_awake("generate")
        if (prompt is None) == (input_ids is None):
            raise ValueError("expected prompt or input_ids, and not both")
        if input_ids is not None and not input_ids:
            raise ValueError("input_ids cannot be empty")
        single = isinstance(prompt, str) or (input_ids is not None and isinstance(input_ids[0], int))
        texts = [prompt] if isinstance(prompt, str) else prompt
        several: Any = [input_ids] if single else input_ids
        if texts is not None:
            several = [self._encode(text) for text in texts]
        asked = self._asked(several, sampling_params, image_data, video_data, single)
        wanted = [return_logprob] * len(asked) if not isinstance(return_logprob, list) else return_logprob
        samples = [
            self._sample(one, seed + index)
            for one, seed in zip(asked, self._seeds(asked), strict=True)
            for index in range(one.params.n)
        ]
        drawn = self._core.generate(samples) if samples else []
        self._dirty = True
        owners = [
            (one, bool(log_probs)) for one, log_probs in zip(asked, wanted, strict=True) for _ in range(one.params.n)
        ]
        outputs = [self._output(one, log_probs, each) for (one, log_probs), each in zip(owners, drawn, strict=True)]
        return outputs[0] if single and len(outputs) == 1 else outputs

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise ValueError("a prompt is text, and there is no tokenizer: pass input_ids")
        found: list[int] = self._tokenizer.encode(text)
        return found

    def _asked(
        self, prompts: Sequence[Sequence[int]], given: Any, images: Any, videos: Any, single: bool
    ) -> list[Asked]:
        params = list(given) if isinstance(given, list) else [given] * len(prompts)
        if len({(one or {}).get("n", 1) for one in params}) > 1:
            raise ValueError("n differs from prompt to prompt: expected the same in one call")
        media = [[one] if single else one or [None] * len(prompts) for one in (images, videos)]
        found = []
        for tokens, one, *several in zip(prompts, params, *media, strict=True):
            made = SamplingParams(**(one or {}))
            made.verify(self._core.model.vocabulary)
            if made.texts and self._tokenizer is None:
                raise ConfigError(lacks_text("SGLang", f"stop={made.stop!r}"))
            digests, seen = self._media(tuple(tokens), *several)
            self._check(seen, (one or {}).get("max_new_tokens"))
            found.append(Asked(tuple(tokens), seen, made, digests))
        return found

    def _media(self, tokens: tuple[int, ...], images: Any, videos: Any) -> tuple[tuple[Medium, ...], tuple[int, ...]]:
        found: list[Medium] = []
        for kind, given in (("image", images), ("video", videos)):
            several = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
            token = self._media_tokens[kind]
            if several and token is None:
                raise ValueError(f"this model takes no {kind}s")
            if token is not None and tokens.count(token) != len(several):
                self._die(
                    f"was given {tokens.count(token)} {kind} tokens for {len(several)} {kind}s, and waits for ever"
                )
            media = [self._core.model.medium(kind, one) for one in several]
            tokens = tokens if token is None else expanded(tokens, token, [one.tokens for one in media])
            found += media
        return tuple(found), tokens

    def _check(self, tokens: Sequence[int], most: int | None) -> None:
        """Refuse a prompt, or one that is too long with as many new tokens as the request itself asks for."""
        if not tokens:
            self._die("was given an empty prompt")
        if len(tokens) >= self._limit:
            raise ValueError(f"a prompt of {len(tokens)} tokens is as long as the context, {self._limit}")
        if len(tokens) + (most or 0) > self._limit:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and max_new_tokens={most} are more than the context, {self._limit}"
            )
        if not 0 <= min(tokens) <= max(tokens) < self._core.model.vocabulary:
            self._die(f"was given a token outside of its vocabulary of {self._core.model.vocabulary}")

    def _seeds(self, asked: Sequence[Asked]) -> list[int]:
        """One for each prompt. Where it draws by them, its own or SGLang's default, else one that the call adds to."""
        if self._deterministic:
            seeds = [one.params.sampling_seed for one in asked]
            return [_DEFAULT_SEED if seed is None else seed for seed in seeds]
        self._calls += 1
        contents = [
            content_of(Request(prompt_token_ids=one.seen)) + repr([medium.digest for medium in one.media]).encode()
            for one in asked
        ]
        return seeds_for(contents, digest([self.server_args.random_seed, self._calls]))

    def _sample(self, asked: Asked, seed: int) -> Sample:
        self._requests += 1
        ours = asked.params.ours(self._limit - len(asked.seen))
        return Sample(tokens=asked.seen, params=ours, seed=seed, media=asked.media, penalties="SGLang")

    def _output(self, asked: Asked, log_probs: bool, drawn: Drawn) -> dict[str, Any]:
        kept = drawn.tokens
        stopped = drawn.finish_reason == "stop"
        reason: dict[str, Any] = {"type": "length", "length": len(kept)}
        if stopped:
            reason = {"type": "stop", "matched": kept[-1] if drawn.stop is None else drawn.stop}
        meta: dict[str, Any] = {
            "id": f"{self._requests}",
            "finish_reason": reason,
            "prompt_tokens": len(asked.seen),
            "weight_version": self.server_args.weight_version,
            "completion_tokens": len(kept),
            "cached_tokens": 0,
        }
        if log_probs:
            found = drawn.raw if self._raw else drawn.tempered
            meta["output_token_logprobs"] = [(value, token, None) for value, token in zip(found, kept, strict=True)]
        output: dict[str, Any] = {
            "output_ids": list(kept),
            "prompt_token_ids": list(asked.seen),
            "meta_info": meta,
        }
        if self._tokenizer is not None:
            output["text"] = self._text(asked.params, kept, reason.get("matched"))
        return output

    def _text(self, params: SamplingParams, tokens: Sequence[int], matched: int | str | None) -> str:
        """Without what ended the completion, unless ``no_stop_trim`` asks for it."""
        trims = not params.no_stop_trim
        kept = tokens[:-1] if trims and isinstance(matched, int) else tokens
        text: str = self._tokenizer.decode(list(kept), skip_special_tokens=params.skip_special_tokens)
        if not isinstance(matched, str) or (place := text.find(matched)) < 0:
            return text
        return text[: place + (0 if trims else len(matched))]

    def flush_cache(self) -> FlushCacheOutput:
        """Forget prompts, images and videos that were seen."""
        self._check_alive("flush_cache")
        self._core.reset_caches()
        self._dirty = False
        return FlushCacheOutput(success=True)

    # -- Memory -------------------------------------------------------------------------------------------------------

    def release_memory_occupation(self, tags: list[str] | None = None) -> None:
        """Free memory; the caches have to be empty."""
        self._check_alive("release_memory_occupation")
        wanted = self._tags(tags)
        if "kv_cache" in wanted and self._dirty:
            self._die("was told to release caches that are in use: flush_cache comes before")
        twice = [tag for tag in wanted if tag in self._released]
        if twice:
            self._die(f"was told to release {', '.join(twice)} twice, since {self._released[twice[0]]}")
        for tag in wanted:
            self._released[tag] = call_site()
        saves = self.server_args.enable_memory_saver
        if "weights" in wanted and saves and not self.server_args.enable_weights_cpu_backup:
            self._core.model.drop()
            self._lost, self._arrived = True, set()

    def resume_memory_occupation(self, tags: list[str] | None = None) -> None:
        """Take memory again."""
        self._check_alive("resume_memory_occupation")
        wanted = self._tags(tags)
        missing = [tag for tag in wanted if tag not in self._released]
        if missing:
            self._die(f"was told to resume {', '.join(missing)}, which was never released")
        for tag in wanted:
            del self._released[tag]

    @staticmethod
    def _tags(tags: list[str] | None) -> list[str]:
        wanted = list(_TAGS if tags is None else tags)
        unknown = [tag for tag in wanted if tag not in _TAGS]
        if unknown:
            raise ValueError(f"tag {unknown[0]!r}: expected some of {', '.join(_TAGS)}")
        return wanted

    # -- Weights ------------------------------------------------------------------------------------------------------

    def begin_weight_update(self, selector: str = "all") -> tuple[bool, str]:
        """Updates come after it."""
        if selector != "all":
            raise ConfigError(lacks("SGLang", f"selector={selector!r} in begin_weight_update: there is one model"))
        self._check_alive("begin_weight_update")
        if self._updating:
            return False, f"an update is in progress, since {self._updating}"
        self._updating = call_site()
        return True, "begun"

    def update_weights_from_tensor(
        self, named_tensors: list[Any], load_format: str | None = None, flush_cache: bool = True
    ) -> tuple[bool, str]:
        """Replace some weights by those in payloads, one for each rank of the engine."""
        self._check_alive("update_weights_from_tensor")
        if not self._updating:
            return False, "no update is in progress: begin_weight_update comes before"
        if "weights" in self._released:
            self._die(f"was sent weights while its own are released, since {self._released['weights']}")
        if load_format in (self.server_args.custom_weight_loader or ()):
            pkgutil.resolve_name(str(load_format))(self._core.model.module(), named_tensors)
            return True, "loaded"
        if load_format not in (None, "flattened_bucket"):
            raise ConfigError(lacks("SGLang", f"load_format={load_format!r} in update_weights_from_tensor"))
        if load_format is None:
            weights = named_tensors
        else:
            if len(named_tensors) != self.server_args.tp_size:
                return False, f"{len(named_tensors)} payloads for {self.server_args.tp_size} ranks of the engine"
            weights, *_ = [_unpacked(payload) for payload in named_tensors]  # each is read
        try:
            self._core.model.load(weights, whole=False)
        except WeightSyncError as error:
            self._die(f"was sent weights that do not fit: {error}")
        self._arrived |= {name for name, _ in weights}
        if flush_cache:
            self.flush_cache()
        return True, "updated"

    def end_weight_update(self) -> tuple[bool, str]:
        """No more updates come."""
        self._check_alive("end_weight_update")
        if not self._updating:
            return False, "no update is in progress"
        self._updating = ""
        needed = set(self._core.model.shapes()) - self._core.model.optional()
        if needed <= self._arrived:
            self._lost = False
        return True, "ended"

    def shutdown(self) -> None:
        """End the engine."""
        self._core.state.end("was shut down")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        self.shutdown()

    def _check_alive(self, call: str) -> None:
        self._core.state.check(call)

    def _check_awake(self, call: str) -> None:
        self._check_alive(call)
        for tag, where in self._released.items():
            raise EngineStateError(
                f"{call} at {call_site()}: the {tag} of the fake SGLang engine are released, since {where}; a real one "
                "would wait for ever"
            )
        if self._lost:
            raise EngineStateError(
                f"{call} at {call_site()}: the fake SGLang engine has lost its weights in a release without backup, "
                "and not all were sent again; a real one would return nonsense"
            )

    def _die(self, why: str) -> None:
        """End as the scheduler of a real one does, and say what real ones do not."""
        self._core.state.end(why)
        raise EngineStateError(f"the fake SGLang engine {why}, at {call_site()}; a real one dies of it, or hangs")


def _unpacked(payload: Any) -> list[tuple[str, Any]]:
    found = MultiprocessingSerializer.deserialize(payload)
    bucket = FlattenedTensorBucket(flattened_tensor=found["flattened_tensor"], metadata=found["metadata"])
    return bucket.reconstruct_tensors()


Engine.generate.__signature__ = _GENERATE  # type: ignore[attr-defined]
Engine.__module__ = "sglang.srt.entrypoints.engine"
