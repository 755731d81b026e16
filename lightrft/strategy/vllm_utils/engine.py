"""vLLM in the process of the trainer."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import inspect
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightrft.errors import ConfigError, EngineStateError, LightRFTError, LostRanksError, WeightSyncError
from lightrft.strategy.coverage import Coverage
from lightrft.strategy.engine import EngineStatus, StatefulEngine
from lightrft.strategy.extras import naming_extras
from lightrft.strategy.model_files import ModelFiles
from lightrft.strategy.request_seeds import content_of, derived_seed, digest_of, seeds_for
from lightrft.strategy.utils import held_weights
from lightrft.strategy.utils.agreement import check_same
from lightrft.strategy.vllm_utils.arguments import environment, llm_arguments, log_probs_mode
from lightrft.strategy.vllm_utils.cpu import pack_output_layer, remove_names_of_shared_memory
from lightrft.strategy.vllm_utils.exchange import check_media, check_tokens, completions_of, prompt_of, sampling_for
from lightrft.strategy.vllm_utils.lockstep import Lockstep
from lightrft.strategy.vllm_utils.process_state import ProcessState, keeping_the_default_group

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lightrft.strategy.engine_settings import EngineSettings
    from lightrft.strategy.requests import Completion, Request
    from lightrft.strategy.sampling import SamplingParams
    from lightrft.strategy.utils.agreement import Ranks

__all__ = ["VLLMEngine", "start"]


def start(settings: EngineSettings) -> VLLMEngine:
    """Start vLLM on this rank. *Collective* over the default process group, if there is one.

    Raises:
        ConfigError: vLLM is not installed, or refuses the settings, or cannot be sent weights.
        EngineStateError: it fails otherwise.
    """
    ranks = settings.ranks()
    shares_memory = settings.device.type == "cpu" and ranks.world_size > 1
    if shares_memory:
        remove_names_of_shared_memory(ranks)
        ranks.gather(None)  # nobody starts before all have removed them
    with ranks.together("vLLM was not started", EngineStateError):
        engine = VLLMEngine(settings, ranks)
    if shares_memory:
        remove_names_of_shared_memory(ranks)
    return engine


class VLLMEngine(StatefulEngine):
    """vLLM in this process. Every rank of a tensor-parallel group has one, and makes the same calls in the same order.

    A process has one such engine at a time: when one ends, vLLM frees what all of them share.

    Args:
        settings: of the engine.
        ranks: those that share it.

    Attributes:
        vllm: the module.
    """

    def __init__(self, settings: EngineSettings, ranks: Ranks) -> None:
        super().__init__("vLLM")
        self._settings = settings
        self._ranks = ranks
        grouped = dist.is_available() and dist.is_initialized()
        rank = dist.get_rank() if grouped else None
        self._process = ProcessState(environment(settings, rank))
        with self._process.entered(starts=True):
            with naming_extras("engine_type vllm"):
                self.vllm: Any = importlib.import_module("vllm")
            known = {each.name for each in dataclasses.fields(self.vllm.EngineArgs)}
            self._files = ModelFiles.of(settings.model)
            arguments = llm_arguments(settings, self._files, known, grouped=grouped)
            self._dtype: torch.dtype | None = held_weights.DTYPES.get(str(arguments["dtype"]).removeprefix("torch."))
            self._log_probs_mode = log_probs_mode(arguments)
            with _refusals("the settings", settings.too_long(self._files.max_positions)):
                self._llm: Any = self.vllm.LLM(**arguments)
        self._has_tokenizer = not arguments.get("skip_tokenizer_init", False)
        self._first_seed = settings.engine_seed
        self._calls = 0
        self._lockstep = Lockstep(ranks)
        self._end = weakref.finalize(self, _end, self._llm, self._process)
        self._end.atexit = False
        self._check_updates()

    def _check_updates(self) -> None:
        """Refuse a vLLM that cannot be sent weights now, and not at the first update."""
        with self._process.entered():
            can = all(self._llm.collective_rpc(_takes_weights))
        if not can:
            self._shutdown()
            raise ConfigError(
                f"vLLM {getattr(self.vllm, '__version__', 'of an unknown version')} cannot be sent weights: its worker "
                "has no reload_weights(weights_iterator=...); install a later one (0.32 was tried)"
            )

    def _generate(self, requests: list[Request], params: SamplingParams) -> list[Completion]:
        """Completions; each depends on its request, the parameters and the weights alone.

        Each request gets a seed of its own, see ``seeds_for``; without ``params.seed`` they differ from call to call.

        Raises:
            ConfigError: vLLM refuses a request or a parameter; or ranks of the group have passed different ones.
            EngineStateError: it gave a completion up.
            LostRanksError: it failed here, and other ranks wait for this one without end; the engine is dead then.
        """
        self._calls += 1
        seed = derived_seed(self._first_seed, self._calls) if params.seed is None else params.seed
        params = dataclasses.replace(params, seed=None, max_tokens=params.max_tokens or self._settings.max_tokens)
        contents = [content_of(request) for request in requests]
        self._check_same(contents, params, seed)
        check_tokens(requests, self._llm.model_config.get_vocab_size())
        check_media(requests, self._files)
        sampling = sampling_for(
            params, seeds_for(contents, seed), self.vllm.SamplingParams, has_tokenizer=self._has_tokenizer
        )
        with self._together(), self._leaving_nothing_behind(), self._process.entered(), _refusals("the requests"):
            outputs = self._llm.generate([prompt_of(request) for request in requests], sampling, use_tqdm=False)
        return list(
            completions_of(
                outputs, version=self.weight_version, mode=self._log_probs_mode, has_tokenizer=self._has_tokenizer
            )
        )

    def _check_same(self, contents: Sequence[bytes], params: SamplingParams, seed: int) -> None:
        """Ranks that generate together would wait for each other for ever if they did not do the same."""
        if self._ranks.world_size == 1:
            return
        mine = {"the number of prompts": len(contents), "the digest of prompts": digest_of(contents)}
        mine |= {"sampling_params": repr(params), "the seed": seed}
        check_same(self._ranks.gather(mine), "vLLM did not generate")

    @contextmanager
    def _together(self) -> Iterator[None]:
        """See ``Lockstep``."""
        try:
            with self._lockstep.call(self._calls):
                yield
        except LostRanksError:
            self.state.end("failed on some of its ranks, and the others wait for them")
            raise

    @contextmanager
    def _leaving_nothing_behind(self) -> Iterator[None]:
        """Drop what is half generated if generation fails.

        The next call would go on with it, and would find blocks in the prefix cache that were never filled.
        """
        try:
            yield
        except BaseException:
            try:
                with self._process.entered():
                    self._abort()
                    self._forget()
            except Exception as error:  # noqa: BLE001 - the first one is raised
                self.state.end(f"could not be emptied after a failed generation ({error})")
            raise

    def _abort(self) -> None:
        core = self._llm.llm_engine
        left = list(core.output_processor.request_states)
        more = {"internal": True} if "internal" in inspect.signature(core.abort_request).parameters else {}
        if left:
            core.abort_request(left, **more)

    def _sleep(self, level: int) -> None:
        if not self._settings.sleeps:
            raise ConfigError("the engine was started with enable_engine_sleep off: it cannot be put to sleep")
        asleep = False
        try:
            with self._ranks.together("vLLM did not fall asleep", EngineStateError), self._process.entered():
                self._llm.sleep(level=level)
                asleep = True
        except LightRFTError:
            self._rouse(level, asleep=asleep)
            raise

    def _rouse(self, level: int, *, asleep: bool) -> None:
        """Wake the ranks that fell asleep where not all did."""
        try:
            with self._ranks.together("vLLM did not wake up again", EngineStateError), self._process.entered():
                if asleep:
                    self._llm.wake_up()
        except LightRFTError as error:
            self.state.end(f"fell asleep on some of its ranks, and could not be woken ({error})")
        if level > 1:
            self.state.spoil("has dropped its weights on some of its ranks, by a sleep at level 2 that failed")

    def _wake_up(self, tags: list[str]) -> None:
        with self._ranks.together("vLLM did not wake up", EngineStateError), self._process.entered():
            self._llm.wake_up(tags=tags)
        if self.state.asleep == frozenset(tags):  # awake as a whole now; weights may have changed meanwhile
            self._drop_caches()

    def _load(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]]) -> None:
        try:
            with self._ranks.together("vLLM has not got new weights", WeightSyncError):
                self._load_here(buckets)
        except LightRFTError:
            if any(self._ranks.gather(self.status is EngineStatus.DEAD)):
                self.state.end("could not be mended after a failed update on some of its ranks")
            raise

    def _load_here(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]]) -> None:
        coverage = Coverage(self._files)
        try:
            with self._process.entered():
                self._reload(_fitting(buckets, coverage))
        except BaseException:
            self._mend()
            coverage.check(whole=False)  # which says better what does not fit
            raise
        coverage.check()

    def _reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self._files.tied and self._settings.device.type == "cpu":
            self._llm.apply_model(pack_output_layer)

    def _mend(self) -> None:
        """End a reload that was broken off, by one without weights: the next would go on with it and mix the two up."""
        try:
            with self._process.entered():
                self._reload(iter(()))
        except Exception as error:
            self.state.end(f"could not be mended after a failed update ({error})")
            raise WeightSyncError(f"vLLM is dead: a failed update could not be ended ({error})") from error

    def _reset_caches(self) -> None:
        if "kv_cache" not in self.state.asleep:
            self._drop_caches()

    def _drop_caches(self) -> None:
        with self._ranks.together("vLLM kept its caches", EngineStateError), self._process.entered():
            self._forget()

    def _forget(self) -> None:
        """Drop the caches of prefixes, of processed images, and of what the vision encoder made of them."""
        if self._llm.reset_prefix_cache() is False:
            raise EngineStateError("its prefix cache is in use: a request is unfinished")
        for owner, name in ((self._llm, "reset_mm_cache"), (self._llm.llm_engine, "reset_encoder_cache")):
            if hasattr(owner, name):  # not in every version
                getattr(owner, name)()

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """That of the settings."""
        return self._dtype

    @property
    def tells_weights(self) -> bool:
        """Whether the names of the weights are known, and vLLM gives access to its model."""
        return self._files.shapes is not None and hasattr(self._llm, "apply_model")

    def _fingerprints(self) -> Mapping[str, str] | None:
        gather = self._ranks.gather if self._ranks.world_size > 1 else None

        def told(model: torch.nn.Module) -> dict[str, str] | None:
            return held_weights.fingerprints(model, self._files.told_shapes(), dtype=self._dtype, gather=gather)

        with self._ranks.together("vLLM did not tell its weights", EngineStateError), self._process.entered():
            found: list[Mapping[str, str] | None] = self._llm.apply_model(told)
        return found[0]

    def _shutdown(self) -> None:
        self._llm = None
        self._end()
        gc.collect()


def _end(llm: Any, process: ProcessState) -> None:
    """End an engine; the process group of the trainer stays."""
    grouped = dist.is_available() and dist.is_initialized()
    with process.entered():
        if grouped:
            with keeping_the_default_group():
                llm.llm_engine.engine_core.shutdown()
        else:
            llm.llm_engine.engine_core.shutdown()


def _takes_weights(worker: Any) -> bool:
    """Whether a worker of vLLM has ``reload_weights(weights_iterator=...)``, or hands everything on to what has it."""
    known = _parameters(worker)
    hands_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
    return "weights_iterator" in (_parameters(getattr(worker, "model_runner", None)) if hands_on else known)


def _parameters(owner: Any) -> Mapping[str, inspect.Parameter]:
    method = getattr(owner, "reload_weights", None)
    return {} if method is None else inspect.signature(method).parameters


def _fitting(
    buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], coverage: Coverage
) -> Iterator[tuple[str, torch.Tensor]]:
    """What fits of ``buckets``. Nothing is copied: vLLM keeps tensors until it has all that it fuses, and no longer."""
    for bucket in buckets:
        yield from _fit(bucket, coverage)  # nothing of it is kept here while the next is gathered


def _fit(bucket: Sequence[tuple[str, torch.Tensor]], coverage: Coverage) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in bucket:
        if coverage.fits(name, tuple(tensor.shape), tensor.dtype):
            yield name, tensor.detach()


@contextmanager
def _refusals(what: str, advice: str = "") -> Iterator[None]:
    """Turn what vLLM raises of a wrong input into a ``ConfigError`` with its message; errors of our own pass."""
    try:
        yield
    except LightRFTError:
        raise
    except Exception as error:
        own = {each.__name__ for each in type(error).__mro__}
        if isinstance(error, (TypeError, ValueError, OSError)) or "VLLMClientError" in own:
            raise ConfigError(f"vLLM refuses {what}: {error}{advice}") from error
        raise
