"""``vllm.LLM``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightrft.errors import ConfigError, EngineStateError
from lightrft.sim.engine.building import build, model_config, tokenizer_of
from lightrft.sim.engine.core import Core
from lightrft.sim.engine.numbers import digest
from lightrft.sim.engine.samples import Drawn, Sample
from lightrft.sim.engine.vllm_face.exceptions import VLLMValidationError
from lightrft.sim.engine.vllm_face.outputs import CompletionOutput, Logprob, RequestOutput
from lightrft.sim.engine.vllm_face.prompts import Prompt, Prompts
from lightrft.sim.engine.vllm_face.sampling_params import SamplingParams
from lightrft.strategy.engine_state import EngineStatus
from lightrft.strategy.utils.agreement import Ranks

if TYPE_CHECKING:
    from lightrft.strategy import sampling

__all__ = ["LLM", "EngineArgs"]

_DEFAULTS: dict[str, Any] = {
    "runner": "auto",
    "convert": "auto",
    "tokenizer": None,
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "trust_remote_code": False,
    "allowed_local_media_path": "",
    "allowed_media_domains": None,
    "tensor_parallel_size": 1,
    "dtype": "auto",
    "quantization": None,
    "revision": None,
    "tokenizer_revision": None,
    "chat_template": None,
    "seed": 0,
    "gpu_memory_utilization": 0.92,
    "cpu_offload_gb": 0,
    "offload_group_size": 0,
    "offload_num_in_group": 1,
    "offload_prefetch_step": 1,
    "offload_params": None,
    "enforce_eager": False,
    "enable_return_routed_experts": False,
    "return_sampling_mask": False,
    "disable_custom_all_reduce": False,
    "hf_token": None,
    "hf_overrides": None,
    "mm_processor_kwargs": None,
    "pooler_config": None,
    "structured_outputs_config": None,
    "profiler_config": None,
    "attention_config": None,
    "kv_cache_memory_bytes": None,
    "compilation_config": None,
    "quantization_config": None,
    "logits_processors": None,
    "spec_method": None,
    "spec_model": None,
    "spec_tokens": None,
}
"""Arguments of the constructor that it names; it takes the others of ``EngineArgs`` too."""

_MORE: dict[str, Any] = {
    "distributed_executor_backend": None,
    "enable_prefix_caching": None,
    "enable_sleep_mode": False,
    "limit_mm_per_prompt": None,
    "load_format": "auto",
    "logprobs_mode": "raw_logprobs",
    "max_model_len": None,
    "max_num_batched_tokens": None,
    "max_num_seqs": None,
    "disable_log_stats": True,
    "worker_extension_cls": "",
    "enable_chunked_prefill": None,
    "block_size": None,
    "generation_config": "auto",
    "override_generation_config": None,
    "async_scheduling": None,
}
"""Those of ``EngineArgs`` alone."""

_OF_ENGINE_ARGS = {name: default for name, default in {**_DEFAULTS, **_MORE}.items() if name != "chat_template"}

EngineArgs = dataclasses.make_dataclass(
    "EngineArgs",
    [("model", str), *((name, Any, field(default=default)) for name, default in _OF_ENGINE_ARGS.items())],
)


class LLM:
    """The engine in this process.

    With ``tensor_parallel_size`` above 1 the executor has to be ``"external_launcher"``: consecutive ranks of the
    default group share an engine, all of them make it and all of them generate.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - set(_DEFAULTS) - set(_MORE))
        if unknown:
            raise TypeError(
                f"LLM got an unexpected keyword argument {unknown[0]!r}, which the fake engine does not know"
            )
        given = {**_DEFAULTS, **_MORE, **kwargs}
        config = model_config(model)
        self._given = given
        self._limit = given["max_model_len"] or config.get("max_position_embeddings") or 2048
        caching = given["enable_prefix_caching"] in (None, True)
        network = build(model, given["dtype"], prefix_caching=caching, dummy=given["load_format"] == "dummy")
        self._core = Core(network, "the fake vLLM engine", _ranks(given))
        tokenizer = None if given["skip_tokenizer_init"] else tokenizer_of(given["tokenizer"] or model)
        self._prompts = Prompts(tokenizer, network.vocabulary, self._limit, config)
        if tokenizer is not None and hasattr(network, "decode"):
            network.decode = tokenizer.decode
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
        tokenization_kwargs: Any = None,  # noqa: ARG002
        mm_processor_kwargs: Any = None,  # noqa: ARG002
    ) -> list[RequestOutput]:
        """Completions of the prompts, in their order."""
        if lora_request is not None:
            raise NotImplementedError("the fake engine has no lora_request: send merged weights")
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

    @staticmethod
    def _params_of(given: Any, count: int) -> list[SamplingParams]:
        if given is None:
            return [SamplingParams()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        several = list(given)
        if len(several) != count:
            raise VLLMValidationError(f"{len(several)} sampling_params for {count} prompts: expected as many, or one")
        return several

    def _samples(self, prompts: Sequence[Prompt], several: Sequence[SamplingParams]) -> tuple[list[Sample], list[int]]:
        """One for each completion, and the number of its prompt."""
        known: dict[tuple[int, int], sampling.SamplingParams] = {}
        samples, owners = [], []
        for owner, (prompt, params) in enumerate(zip(prompts, several, strict=True)):
            room = self._limit - len(prompt.tokens)
            ours = known.get((id(params), room))
            if ours is None:
                ours = known[id(params), room] = params.ours(room)
            for index in range(params.n):
                seed = self._seed(params, index)
                samples.append(Sample(tokens=prompt.tokens, params=ours, seed=seed, media=prompt.media))
                owners.append(owner)
        return samples, owners

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
        )

    def _completion(self, index: int, params: SamplingParams, drawn: Drawn) -> CompletionOutput:
        log_probs = drawn.processed if self._given["logprobs_mode"].startswith("processed") else drawn.raw
        wanted = params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=self._prompts.text_of(drawn.tokens, params, drawn.stop) if params.detokenize else "",
            token_ids=list(drawn.tokens),
            cumulative_logprob=sum(log_probs) if wanted else None,
            logprobs=[{t: Logprob(p)} for t, p in zip(drawn.tokens, log_probs, strict=True)] if wanted else None,
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
            raise NotImplementedError(f"the worker of the fake engine has no {method}")
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
        """Those of vLLM."""
        return SamplingParams()


LLM.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in _DEFAULTS.items()
        ),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """``llm.model_config``."""

    max_model_len: int
    vocabulary: int

    def get_vocab_size(self) -> int:
        """How many tokens there are."""
        return self.vocabulary


@dataclass(slots=True)
class OutputProcessor:
    """``llm.llm_engine.output_processor``: nothing is left in it, since a call ends with all of its requests."""

    request_states: dict[str, Any] = field(default_factory=dict)


class LLMEngine:
    """``llm.llm_engine``."""

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

    def reset_prefix_cache(self) -> bool:
        """Forget prompts that were seen."""
        self._core.model.forget()
        return True


class EngineCore:
    """``llm.llm_engine.engine_core``."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def shutdown(self, timeout: float | None = None) -> None:  # noqa: ARG002 - it takes no time
        """End the engine."""
        self._core.state.end("was shut down")


class Worker:
    """What ``collective_rpc`` calls."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.rank = core.ranks.rank

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, Any]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Replace all weights."""
        if weights_iterator is None or weights_path is not None or not is_checkpoint_format:
            raise NotImplementedError("the fake engine reloads weights from an iterator, by the names of a checkpoint")
        weights = iter(weights_iterator)
        first = next(weights, None)
        if first is not None:  # else it ends a reload that was broken off, and leaves everything as it is
            self._core.load(chain([first], weights))


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


EngineArgs.__module__ = "vllm.engine.arg_utils"
LLM.__module__ = "vllm.entrypoints.llm"  # what tells engines of vLLM from others
