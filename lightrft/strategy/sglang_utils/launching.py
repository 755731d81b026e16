"""Starting SGLang's engine, so that the process that starts it stays as it was."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError
from lightrft.strategy.extras import naming_extras
from lightrft.strategy.sglang_utils.host import put_back, set_aside
from lightrft.strategy.sglang_utils.processes import EngineProcesses, bury, end_processes, ignore_signal, new_children
from lightrft.strategy.sglang_utils.telling import TELL

if TYPE_CHECKING:
    import torch

    from lightrft.strategy.engine_settings import EngineSettings
    from lightrft.strategy.model_files import ModelFiles

__all__ = ["Launched", "launch", "library", "tells"]

_MARGIN = 8
"""SGLang cuts a completion so that some positions of the context stay free."""

_SEEDS = 1 << 30
"""SGLang's own are drawn below it."""

_CPU_TOKENS = 2048
"""Least size of the caches on a CPU, where SGLang would otherwise take most of the memory of the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A running engine, and what was asked for.

    Attributes:
        engine: its ``Engine``.
        processes: those that it runs in.
        keeps_weights: whether releasing the memory of the weights keeps a copy of them.
        seeds: whether a request may have a seed.
        raw_log_probs: whether log-probs are those before the temperature.
    """

    engine: Any
    processes: EngineProcesses
    keeps_weights: bool
    seeds: bool
    raw_log_probs: bool


def library(device: torch.device) -> Any:
    """The module ``sglang``.

    Raises:
        ConfigError: it is not installed.
    """
    with put_back(), set_aside(_on_cpu_alone(device)), naming_extras("engine_type 'sglang'"):
        return importlib.import_module("sglang")


def launch(sglang: Any, settings: EngineSettings, files: ModelFiles) -> Launched:
    """Start the engine and its processes.

    Raises:
        ConfigError: SGLang lacks an option, or refuses the settings.
        RuntimeError: a process has failed as it started.
    """
    with put_back(), set_aside(_variables(settings, files)):
        given = _arguments(settings, files, set(_fields(sglang.ServerArgs)))
        engine, children = _started(sglang, given, settings.too_long(files.max_positions))
        raw = os.environ.get("SGLANG_RETURN_ORIGINAL_LOGPROB", "").lower() in ("1", "true")
    return Launched(
        engine=engine,
        processes=EngineProcesses(engine, children),
        keeps_weights=not given.get("enable_memory_saver") or bool(given.get("enable_weights_cpu_backup")),
        seeds=bool(given.get("enable_deterministic_inference") or given.get("rl_on_policy_target")),
        raw_log_probs=raw,
    )


def tells(sglang: Any, settings: EngineSettings) -> bool:
    """Whether the processes of an engine with these settings can be asked what they hold; the same on all ranks."""
    loaders = settings.options.get("custom_weight_loader", [TELL]) or ()
    return TELL in loaders and "custom_weight_loader" in _fields(sglang.ServerArgs)


def _started(sglang: Any, given: dict[str, Any], advice: str) -> tuple[Any, list[BaseProcess]]:
    children: list[BaseProcess] = []
    try:
        with new_children(children):
            engine = sglang.Engine(**given)
            engine.flush_cache()  # the first call binds the engine to the event loop of this moment
    except BaseException as error:
        end_processes(children)
        bury(error)  # its traceback holds the half of an engine
        if isinstance(error, (TypeError, ValueError)) and not isinstance(error, ConfigError):
            raise ConfigError(f"SGLang refuses its settings: {error}{advice}") from error
        raise
    _let_signals_go(engine)
    _ask_for_prompts(engine)
    return engine, children


def _arguments(settings: EngineSettings, files: ModelFiles, known: set[str]) -> dict[str, Any]:
    """Arguments of ``sglang.Engine``. What a version does not have is left out, unless ``options`` asks for it."""
    unknown = sorted(set(settings.options) - known)
    if unknown:
        raise ConfigError(f"engine_options: SGLang has no {', '.join(unknown)}; it knows {', '.join(sorted(known))}")
    on_cpu = settings.device.type == "cpu"
    ours = {
        "model_path": settings.model,
        "dtype": settings.dtype,
        "tp_size": settings.tp_size,
        "context_length": settings.max_model_len + _MARGIN,
        "random_seed": settings.engine_seed % _SEEDS,
        "device": settings.device.type,
        "log_level": "error",
        "skip_tokenizer_init": files.has_tokenizer is False,
        "custom_sigquit_handler": ignore_signal,
        "custom_weight_loader": [TELL],
        **(_on_cpu(settings) if on_cpu else _on_gpu(settings)),
    }
    return {name: value for name, value in {**ours, **settings.options}.items() if name in known}


def _on_cpu(settings: EngineSettings) -> dict[str, Any]:
    """No compiled kernels, no graphs; nothing can be freed there, so that no memory is saved either."""
    return {
        "attention_backend": "torch_native",
        "mm_attention_backend": "sdpa",
        "sampling_backend": "pytorch",
        "disable_cuda_graph": True,
        "max_total_tokens": max(_CPU_TOKENS, 8 * (settings.max_model_len + _MARGIN)),
    }


def _on_gpu(settings: EngineSettings) -> dict[str, Any]:
    return {
        "base_gpu_id": settings.device.index or 0,
        "mem_fraction_static": settings.memory_share,
        "enable_memory_saver": settings.sleeps,
        "enable_weights_cpu_backup": settings.sleeps and settings.sleep_level == 1,
    }


def _variables(settings: EngineSettings, files: ModelFiles) -> dict[str, str | None]:
    """Environment variables that the engine and its processes need."""
    variables: dict[str, str | None] = {
        "TORCHELASTIC_USE_AGENT_STORE": None,  # its processes have a store of their own
        "SGLANG_VLM_CACHE_SIZE_MB": os.environ.get("SGLANG_VLM_CACHE_SIZE_MB", "0"),  # no flush empties this cache
        **_on_cpu_alone(settings.device),
    }
    if files.max_positions is not None and settings.max_model_len <= files.max_positions:
        variables["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"  # by the margin, which is not used
    if settings.device.type == "cpu" and settings.tp_size > 1 and "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ:
        cores = sorted(os.sched_getaffinity(0))
        each = [str(cores[rank % len(cores)]) for rank in range(settings.tp_size)]
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(each)
    return variables


def _on_cpu_alone(device: torch.device) -> dict[str, str | None]:
    """SGLang asks for this where there is no GPU, as it is imported and as it starts."""
    return {"SGLANG_USE_CPU_ENGINE": "1"} if device.type == "cpu" else {}


def _fields(server_args: Any) -> Iterable[str]:
    """Names of the settings that this version has; it is a dataclass or, in later versions, a ``msgspec.Struct``."""
    names: Iterable[str] = getattr(server_args, "__struct_fields__", None) or server_args.__dataclass_fields__
    return names


def _let_signals_go(engine: Any) -> None:
    """SGLang's event loop answers SIGTERM by nothing and SIGQUIT by killing this process: it gets neither."""
    loop = getattr(engine, "loop", None)
    if loop is None or threading.current_thread() is not threading.main_thread():
        return

    async def let_go() -> None:
        for number in (signal.SIGTERM, signal.SIGQUIT):
            loop.remove_signal_handler(number)

    loop.run_until_complete(let_go())  # a loop that does not run removes none


def _ask_for_prompts(engine: Any) -> None:
    """Have every completion tell the prompt as the engine saw it, which ``Engine.generate`` has no argument for."""
    manager = getattr(engine, "tokenizer_manager", None)
    if manager is None:
        return
    generate_request = manager.generate_request

    def asking(request: Any, *args: Any) -> Any:
        request.return_prompt_token_ids = True
        return generate_request(request, *args)

    manager.generate_request = asking
