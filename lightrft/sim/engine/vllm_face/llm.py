"""``vllm.LLM``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightrft.errors import ConfigError, EngineStateError
from lightrft.sim.engine.building import build, model_config, positions, sampling_defaults, tokenizer_of
from lightrft.sim.engine.core import Core
from lightrft.sim.engine.lacking import Refusing, Surface, lacks, lacks_text
from lightrft.sim.engine.numbers import digest
from lightrft.sim.engine.samples import Drawn, Sample
from lightrft.sim.engine.vllm_face import arguments
from lightrft.sim.engine.vllm_face.arguments import EngineArgs
from lightrft.sim.engine.vllm_face.exceptions import VLLMValidationError
from lightrft.sim.engine.vllm_face.outputs import CompletionOutput, FlatLogprobs, Logprob, RequestOutput
from lightrft.sim.engine.vllm_face.prompts import Prompt, Prompts, media_limits
from lightrft.sim.engine.vllm_face.sampling_params import SamplingParams
from lightrft.strategy.engine_state import EngineStatus
from lightrft.strategy.utils.agreement import Ranks

if TYPE_CHECKING:
    from lightrft.strategy import sampling

__all__ = ["LLM", "EngineArgs"]

_GENERATE = Surface(engine="vLLM", honoured=frozenset(), idle={})
"""Arguments of ``generate`` that there are not."""

_FUSED = re.compile(r"\.([qkv]|gate|up)_proj\.(weight|bias)$")
_PARTS = {"qkv": 3, "gate_up": 2}


class LLM(Refusing):
    """The engine in this process.

    With ``tensor_parallel_size`` above 1 the executor has to be ``"external_launcher"``: consecutive ranks of the
    default group share an engine, all of them make it and all of them generate.
    """

    _engine = "vLLM"

    def __init__(self, model: str, **kwargs: Any) -> None:
        given = arguments.read(kwargs)
        config = model_config(model)
        self._given = given
        self._limit = arguments.length(given["max_model_len"], positions(config))
        caching = given["enable_prefix_caching"] in (None, True)
        network = build(model, given["dtype"], prefix_caching=caching, dummy=given["load_format"] == "dummy")
        self._core = Core(network, "the fake vLLM engine", _ranks(given))
        tokenizer = None if given["skip_tokenizer_init"] else tokenizer_of(given["tokenizer"] or model)
        limits = media_limits(given["limit_mm_per_prompt"])
        self._prompts = Prompts(tokenizer, network.vocabulary, self._limit, config, limits, network.medium)
        network.decode = None if tokenizer is None else tokenizer.decode
        self._defaults = sampling_defaults(model) if given["generation_config"] == "auto" else {}
        self._requests = 0
        self.model_config = ModelConfig(self._limit, network.vocabulary)
        self.llm_engine = LLMEngine(self._core, tokenizer, self.model_config)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,  # noqa: ARG002 - there is no bar
        lora_request: Any = None,
        priority: Any = None,  # noqa: ARG002 - all run at once
        tokenization_kwargs: Any = None,
        mm_processor_kwargs: Any = None,
    ) -> list[RequestOutput]:
        """Completions of the prompts, in their order."""
        _GENERATE.check(
            {
                "lora_request": lora_request,
                "tokenization_kwargs": tokenization_kwargs,
                "mm_processor_kwargs": mm_processor_kwargs,
            },
            {"lora_request": None, "tokenization_kwargs": None, "mm_processor_kwargs": None},
        )
        wanted = self._prompts.read(prompts)
        several = self._params_of(sampling_params, len(wanted))
        for params in {id(one): one for one in several}.values():
            params.verify(self._core.model.vocabulary)
        samples, owners = self._samples(wanted, several)
        drawn = self._core.generate(samples) if samples else []
        found: list[list[Drawn]] = [[] for _ in wanted]
        for owner, one in zip(owners, drawn, strict=True):
            found[owner].append(one)
        return [self._output(*each) for each in zip(wanted, several, found, strict=True)]

    def _params_of(self, given: Any, count: int) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        several = list(given) if isinstance(given, (list, tuple)) else [given] * count
        for one in several:
            if not isinstance(one, SamplingParams):
                raise TypeError(f"sampling_params is a {type(one).__name__}: expected SamplingParams or a list")
        if len(several) != count:
            raise VLLMValidationError(f"{len(several)} sampling_params for {count} prompts: expected as many, or one")
        return several

    def _samples(self, prompts: Sequence[Prompt], several: Sequence[SamplingParams]) -> tuple[list[Sample], list[int]]:
        """One for each completion, and the number of its prompt."""
        former: tuple[Any, ...] = ()
        samples, owners = [], []
        for owner, (prompt, params) in enumerate(zip(prompts, several, strict=True)):
            alike = self._limit - len(prompt.tokens), {**vars(params), "seed": None}
            if alike != former:
                former, ours = alike, self._ours(params, alike[0])
            for index in range(params.n):
                seed = self._seed(params, index)
                samples.append(Sample(tokens=prompt.tokens, params=ours, seed=seed, media=prompt.media))
                owners.append(owner)
        return samples, owners

    def _ours(self, params: SamplingParams, room: int) -> sampling.SamplingParams:
        if params.stop and self._prompts.tokenizer is None:
            raise ConfigError(lacks_text("vLLM", f"stop={params.stop!r}"))
        return params.ours(room)

    def _seed(self, params: SamplingParams, index: int) -> int:
        if params.seed is not None:
            return params.seed + index
        if params.temperature > 0 and self._core.ranks.world_size > 1:
            raise EngineStateError(
                f"sampling without a seed on {self._core.ranks.world_size} tensor-parallel ranks: each would draw "
                "other tokens. Pass a seed with every request"
            )
        self._requests += 1
        return digest([self._given["seed"], self._requests])

    def _output(self, prompt: Prompt, params: SamplingParams, drawn: Sequence[Drawn]) -> RequestOutput:
        self._requests += 1
        return RequestOutput(
            request_id=str(self._requests),
            prompt=prompt.text,
            prompt_token_ids=list(prompt.tokens),
            prompt_logprobs=None,
            outputs=[self._completion(index, params, one) for index, one in enumerate(drawn)],
            finished=True,
            num_cached_tokens=0,
            num_cache_creation_tokens=0,
        )

    def _completion(self, index: int, params: SamplingParams, drawn: Drawn) -> CompletionOutput:
        found = drawn.processed if self._given["logprobs_mode"].startswith("processed") else drawn.raw
        log_probs: Sequence[dict[int, Logprob]] | None = None
        if params.flat_logprobs and params.logprobs is not None:
            log_probs = FlatLogprobs._of(drawn.tokens, found)
        elif params.logprobs is not None:
            log_probs = [{t: Logprob(p)} for t, p in zip(drawn.tokens, found, strict=True)]
        return CompletionOutput(
            index=index,
            text=self._prompts.text_of(drawn, params) if params.detokenize else "",
            token_ids=list(drawn.tokens),
            cumulative_logprob=None if log_probs is None else sum(found),
            logprobs=log_probs,
            finish_reason=drawn.finish_reason,
            stop_reason=drawn.stop,
        )

    def sleep(self, level: int = 1, mode: str = "abort") -> None:  # noqa: ARG002 - nothing runs meanwhile
        """Free the caches; at level 2 the weights are lost."""
        self._core.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """Take the memory again."""
        self._core.wake_up(tags)
        return True

    def reset_mm_cache(self) -> None:
        """Forget what was made of images and videos before the encoder; it does not depend on weights."""

    def reset_prefix_cache(
        self,
        reset_running_requests: bool = False,  # noqa: ARG002 - none runs
        reset_connector: bool = False,  # noqa: ARG002 - there is none
    ) -> bool:
        """Forget prompts that were seen."""
        self._core.model.forget()
        return True

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,  # noqa: ARG002 - everything is in this process
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of the worker, or a function with the worker; what this rank's worker returns."""
        worker = Worker(self._core)
        if callable(method):
            return [method(worker, *args, **(kwargs or {}))]
        found = getattr(worker, method, None)
        if found is None:
            raise ConfigError(lacks("vLLM", f"method {method!r} of its worker"))
        return [found(*args, **(kwargs or {}))]

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """Call a function with the module of this rank; what it returns."""
        return [func(self._core.model.module())]

    def get_tokenizer(self) -> Any:
        """The tokenizer of the model."""
        if self._prompts.tokenizer is None:
            raise ValueError("there is no tokenizer: skip_tokenizer_init is set, or the model has none")
        return self._prompts.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Those of vLLM, and over them those in the generation configuration of the model."""
        return SamplingParams(**self._defaults)


LLM.__signature__ = arguments.signature  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class ModelConfig(Refusing):
    """``llm.model_config``."""

    _engine = "vLLM"

    max_model_len: int
    vocabulary: int

    def get_vocab_size(self) -> int:
        """How many tokens there are."""
        return self.vocabulary


@dataclass(slots=True)
class OutputProcessor:
    """``llm.llm_engine.output_processor``: nothing is left in it, since a call ends with all of its requests."""

    request_states: dict[str, Any] = field(default_factory=dict)


class LLMEngine(Refusing):
    """``llm.llm_engine``."""

    _engine = "vLLM"

    def __init__(self, core: Core, tokenizer: Any, model_config: ModelConfig) -> None:
        self._core = core
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.output_processor = OutputProcessor()
        self.engine_core = EngineCore(core)

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        """Give requests up; there are none."""

    def has_unfinished_requests(self) -> bool:
        """A call ends with all of its requests."""
        return False

    def is_sleeping(self) -> bool:
        """Whether anything of it sleeps."""
        return self._core.state.status is EngineStatus.ASLEEP

    def reset_encoder_cache(self) -> None:
        """Forget images and videos that were seen."""
        self._core.model.forget_media()

    def reset_mm_cache(self) -> None:
        """Forget what was made of images and videos before the encoder; it does not depend on weights."""

    def reset_prefix_cache(
        self,
        reset_running_requests: bool = False,  # noqa: ARG002 - none runs
        reset_connector: bool = False,  # noqa: ARG002 - there is none
    ) -> bool:
        """Forget prompts that were seen."""
        self._core.model.forget()
        return True


class EngineCore(Refusing):
    """``llm.llm_engine.engine_core``."""

    _engine = "vLLM"

    def __init__(self, core: Core) -> None:
        self._core = core

    def shutdown(self, timeout: float | None = None) -> None:  # noqa: ARG002 - it takes no time
        """End the engine."""
        self._core.state.end("was shut down")


class Worker(Refusing):
    """What ``collective_rpc`` calls."""

    _engine = "vLLM"

    def __init__(self, core: Core) -> None:
        self._core = core
        self.rank = core.ranks.rank

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, Any]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Replace all weights; those that a real engine fuses are read late, as it reads them: once all are there."""
        if weights_iterator is None or weights_path is not None or not is_checkpoint_format:
            raise ConfigError(lacks("vLLM", "reload_weights but from an iterator, by the names of a checkpoint"))
        weights = iter(weights_iterator)
        first = list(islice(weights, 1))
        if first:  # else it ends a reload that was broken off, and leaves everything as it is
            self._core.load(_by_module(chain(_popped(first), weights)))


def _popped(several: list[Any]) -> Iterator[Any]:
    """What is in a list, which keeps it no longer."""
    while several:
        yield several.pop(0)


def _by_module(weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The weights; those that make one of vLLM together once all of them are there, and the rest in the end."""
    waiting: dict[str, list[tuple[str, Any]]] = {}
    for name, weight in weights:
        found = _FUSED.search(name)
        if found is None:
            yield name, weight
            continue
        whole = "qkv" if found[1] in "qkv" else "gate_up"
        parts = waiting.setdefault(f"{name[: found.start()]}.{whole}.{found[2]}", [])
        parts.append((name, weight))
        del weight
        if len(parts) == _PARTS[whole]:
            yield from _popped(parts)
    for parts in waiting.values():
        yield from _popped(parts)


def _ranks(given: dict[str, Any]) -> Ranks:
    size = given["tensor_parallel_size"]
    if size == 1:
        return Ranks(rank=0, world_size=1)
    backend = given["distributed_executor_backend"]
    if backend != "external_launcher":
        raise ConfigError(
            f"tensor_parallel_size={size} with distributed_executor_backend={backend!r}: the fake engine is shared by "
            "the ranks that make it only, as with 'external_launcher'"
        )
    if not dist.is_initialized() or dist.get_world_size() % size:
        world = dist.get_world_size() if dist.is_initialized() else 1
        raise ConfigError(f"tensor_parallel_size={size} does not divide a world of {world} ranks")
    blocks = [list(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    groups = [dist.new_group(block) for block in blocks]
    return Ranks(groups[dist.get_rank() // size])


LLM.__module__ = "vllm.entrypoints.llm"  # what tells engines of vLLM from others
