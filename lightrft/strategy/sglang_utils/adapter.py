"""SGLang behind the contract of engines."""

from __future__ import annotations

import dataclasses
import importlib
import json
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError, EngineStateError, LightRFTError, WeightSyncError
from lightrft.strategy.coverage import Coverage
from lightrft.strategy.engine import StatefulEngine
from lightrft.strategy.model_files import ModelFiles
from lightrft.strategy.request_seeds import derived_seed
from lightrft.strategy.sglang_utils import generation, sending, telling
from lightrft.strategy.sglang_utils.launching import Launched, launch, library, tells
from lightrft.strategy.utils.held_weights import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch

    from lightrft.strategy.engine_settings import EngineSettings
    from lightrft.strategy.requests import Completion, Request
    from lightrft.strategy.sampling import SamplingParams
    from lightrft.strategy.utils.agreement import Outcome, Ranks

__all__ = ["SGLangEngine", "start"]

_IDLE_AFTER = 60.0
"""Seconds after which requests that nobody waits for have to be done."""


def start(settings: EngineSettings) -> SGLangEngine:
    """Start SGLang on the first rank of ``settings.group``. *Collective*.

    Raises:
        ConfigError: it is not installed, or it refuses the settings, or it does not start.
    """
    ranks = settings.ranks()
    files = ModelFiles.of(settings.model)
    launched = None
    with ranks.together("SGLang was not started", ConfigError) as outcome:
        sglang = library(settings.device)
        if ranks.rank == 0:
            launched = launch(sglang, settings, files)
            outcome.mine = launched.seeds
    return SGLangEngine(settings, ranks, files, sglang, launched, takes_seeds=outcome.all[0])


class SGLangEngine(StatefulEngine):
    """An engine of SGLang, in processes of its own, that belongs to the first rank of its group.

    The other ranks hold an object without an engine, which goes through the same states. All calls but ``generate`` are
    collective in the group; what fails on the first rank is raised on each.

    Args:
        settings: of the engine.
        ranks: of its group.
        files: of its model.
        sglang: the module.
        launched: the engine, on the first rank.
        takes_seeds: whether it was started to draw by seeds.
    """

    def __init__(
        self,
        settings: EngineSettings,
        ranks: Ranks,
        files: ModelFiles,
        sglang: Any,
        launched: Launched | None,
        *,
        takes_seeds: bool,
    ) -> None:
        super().__init__("SGLang")
        self._sglang = sglang
        self._settings = settings
        self._ranks = ranks
        self._files = files
        self._launched = launched
        self._takes_seeds = takes_seeds
        self._first_seed = settings.engine_seed
        self._calls = 0
        self._dtype = str(settings.options.get("dtype", settings.dtype))
        self._released: list[str] = []
        self._in_session = False
        self._used = True

    @property
    def runs_on_all_ranks(self) -> bool:
        """``False``: the first rank of the group generates."""
        return False

    @property
    def takes_seeds(self) -> bool:
        """Whether SGLang was started to draw by seeds; the same on all ranks."""
        return self._takes_seeds

    def _generate(self, requests: list[Request], params: SamplingParams) -> list[Completion]:
        if self._launched is None:
            raise EngineStateError("SGLang runs on the first rank of its group, which generates for all of them")
        if params.max_tokens is None:
            params = dataclasses.replace(params, max_tokens=self._settings.max_tokens)
        if params.seed is not None and params.temperature > 0 and not self._takes_seeds:
            raise ConfigError(
                f"seed={params.seed}: SGLang draws by the seed of a request only if it was started with "
                "engine_options={'enable_deterministic_inference': True}, which its attention backends for CPUs lack"
            )
        generation.check_requests(requests, params, self._files, self._settings.max_model_len)
        texts = [place for place, request in enumerate(requests) if request.prompt is not None]
        tokens = [place for place, request in enumerate(requests) if request.prompt is None]
        found: dict[int, list[Completion]] = {}
        for places in filter(None, (tokens, texts)):  # SGLang takes one kind at a time
            completions = self._completions([requests[place] for place in places], params)
            for index, place in enumerate(places):
                found[place] = completions[index * params.n : (index + 1) * params.n]
        return [completion for place in range(len(requests)) for completion in found[place]]

    def _completions(self, requests: list[Request], params: SamplingParams) -> list[Completion]:
        assert self._launched is not None
        known = _sampling_class(self._sglang)
        if params.seed is None and self._takes_seeds:  # SGLang's own default is one seed for all samples
            params = dataclasses.replace(params, seed=derived_seed(self._first_seed, self._calls))
            self._calls += 1
        each, several = generation.with_seeds(requests, params)
        given = [one.to_sglang(known) for one in several] if isinstance(several, list) else several.to_sglang(known)
        mode = generation.log_probs_mode(params, raw=self._launched.raw_log_probs) if params.logprobs else None
        arguments = generation.arguments_of(each, log_probs=params.logprobs)
        self._used = True
        try:
            outputs = self._ask("generate", sampling_params=given, **arguments)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"SGLang refuses a request: {error}") from error
        except EngineStateError:
            if self._ranks.world_size == 1 and self._launched.processes.died:
                self._bury()  # in a larger group, at the next step that all ranks do
            raise
        except RuntimeError as error:  # an image that cannot be read, for example
            raise EngineStateError(f"SGLang could not generate: {error}") from error
        prompts = [request for request in requests for _ in range(params.n)]
        return [
            generation.completion_of(request, output, log_probs=mode, version=self.weight_version)
            for request, output in zip(prompts, outputs, strict=True)
        ]

    def _sleep(self, level: int) -> None:
        keeps = self._launched is None or self._launched.keeps_weights
        tags = ["kv_cache", "weights"] if level == 2 or keeps else ["kv_cache"]
        with self._together("the engine was not put to sleep"):
            self._flush()
            self._ask("release_memory_occupation", tags=tags)
        self._released = tags

    def _wake_up(self, tags: list[str]) -> None:
        wanted = [tag for tag in tags if tag in self._released]
        with self._together("the engine was not woken"):
            for tag in wanted:
                self._ask("resume_memory_occupation", tags=[tag])
                self._released.remove(tag)  # SGLang dies of a second time

    def _reset_caches(self) -> None:
        with self._together("the caches were not emptied"):
            if "kv_cache" not in self.state.asleep:  # emptied before it went to sleep
                self._flush()

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """That of the settings."""
        return DTYPES.get(self._dtype)

    @property
    def tells_weights(self) -> bool:
        """Whether the names of the weights are known, and the engine's processes can be asked."""
        return self._files.shapes is not None and tells(self._sglang, self._settings)

    def _fingerprints(self) -> Mapping[str, str] | None:
        with self._together("SGLang did not tell its weights") as outcome:
            if self._launched is not None:
                outcome.mine = self._told()
        found: Mapping[str, str] | None = outcome.all[0]
        return found

    def _told(self) -> Any:
        """What the processes write into a file: they are asked as if weights were sent to them."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "fingerprints.json"
            self._session("begin_weight_update")
            try:
                asked = telling.question(file, self._files.told_shapes(), self._dtype)
                result = self._ask(
                    "update_weights_from_tensor", named_tensors=asked, load_format=telling.TELL, flush_cache=False
                )
            finally:
                self._session("end_weight_update")
            sending.check(result, "to tell its weights")
            return json.loads(file.read_text(encoding="utf-8"))

    def _shutdown(self) -> None:
        if self._launched is not None:
            self._launched.processes.end()

    def _load(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]]) -> None:
        with self._together("the update did not begin", WeightSyncError):
            self._session("begin_weight_update")
        try:
            self._send(iter(buckets))
        except LightRFTError:
            with suppress(LightRFTError):  # a session that stays open would keep the next update out
                self._end_session()
            raise
        self._end_session()
        self._reset_caches()

    def _send(self, buckets: Iterator[Sequence[tuple[str, torch.Tensor]]]) -> None:
        """Every rank reads every bucket, since gathering one is collective; the first rank sends it."""
        coverage = Coverage(self._files)
        while self._send_next(buckets, coverage):  # nothing of a bucket is kept while the next is gathered
            pass

    def _send_next(self, buckets: Iterator[Sequence[tuple[str, torch.Tensor]]], coverage: Coverage) -> bool:
        """Send a bucket, if there is one more."""
        with self._together("weights were not sent", WeightSyncError) as outcome:
            bucket = next(buckets, None)
            fitting = [one for one in bucket or () if coverage.fits(one[0], tuple(one[1].shape), one[1].dtype)]
            coverage.check(whole=bucket is None)
            kept = [one for one in fitting if not coverage.is_copy(one[0])]
            flat = sending.flattened(self._sglang, kept) if kept and self._has_share else None
            if flat is not None and self._settings.device.type != "cpu":
                outcome.mine = sending.serialized(self._sglang, flat)
        if bucket is None:
            return False
        with self._together("weights were not sent", WeightSyncError):
            if flat is not None and self._launched is not None:
                payloads = [each or sending.serialized(self._sglang, flat) for each in self._shares(outcome)]
                result = self._ask(
                    "update_weights_from_tensor",
                    named_tensors=payloads,
                    load_format="flattened_bucket",
                    flush_cache=False,
                )
                sending.check(result, "update_weights_from_tensor")
        return True

    @property
    def _has_share(self) -> bool:
        """Whether this rank flattens buckets: each does for its own GPU, the first one for all on a CPU."""
        return self._launched is not None or self._settings.device.type != "cpu"

    def _shares(self, outcome: Outcome) -> list[bytes | None]:
        """What each rank of the engine reads; ``None`` is to be serialised here: a payload can be read once."""
        return outcome.all if len(outcome.all) == self._settings.tp_size else [None] * self._settings.tp_size

    def _end_session(self) -> None:
        with self._together("the update did not end", WeightSyncError):
            self._session("end_weight_update")

    def _session(self, method: str) -> None:
        """Begin or end an update, for versions that want it; one whose end has failed is ended before the next."""
        if self._launched is None or not hasattr(self._launched.engine, method):
            return
        begins = method == "begin_weight_update"
        if begins and self._in_session:
            sending.check(self._ask("end_weight_update"), "end_weight_update")
        sending.check(self._ask(method), method)
        self._in_session = begins

    def _flush(self) -> None:
        """Empty the caches, as soon as no request is in work: one that failed leaves others behind."""
        if not self._used:
            return
        patience = time.monotonic() + _IDLE_AFTER
        while getattr(result := self._ask("flush_cache"), "success", result) is False:
            if time.monotonic() > patience:
                raise EngineStateError(
                    f"SGLang still works on requests after {_IDLE_AFTER:.0f} s, and keeps its caches"
                )
            time.sleep(0.05)
        self._used = False

    def _ask(self, method: str, **arguments: Any) -> Any:
        """Call a method of the engine, on the rank that has it."""
        if self._launched is None:
            return None
        with self._launched.processes.call():
            return getattr(self._launched.engine, method)(**arguments)

    @contextmanager
    def _together(self, what: str, otherwise: type[LightRFTError] = EngineStateError) -> Iterator[Outcome]:
        """A step of all ranks of the group; if the engine died in it, all of them know."""
        try:
            with self._ranks.together(what, otherwise) as outcome:
                yield outcome
        except LightRFTError:
            if any(self._ranks.gather(self._launched is not None and self._launched.processes.died)):
                self._bury()
            raise

    def _bury(self) -> None:
        self.state.end("lost one of its processes")
        self._shutdown()


def _sampling_class(sglang: Any) -> type[Any]:
    found: type[Any] = importlib.import_module(f"{sglang.__name__}.srt.sampling.sampling_params").SamplingParams
    return found
