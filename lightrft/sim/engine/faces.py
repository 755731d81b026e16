"""Puts the faces of the fake engine in the place of ``vllm`` and ``sglang``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from lightrft.errors import ConfigError
from lightrft.sim.engine.lacking import LackingModuleError, LackingNameError, lacks

__all__ = ["EXPORTS", "MODES", "current_mode", "faces"]

MODES = ("model", "hash")
"""What fake engines compute: ``model`` runs the model itself, ``hash`` derives tokens from a digest of the weights."""

EXPORTS: Mapping[str, str] = {
    "sglang": "sglang_face.engine:Engine sglang_face.server_args:ServerArgs sglang_face.version:__version__",
    "sglang.srt": "",
    "sglang.srt.entrypoints": "",
    "sglang.srt.entrypoints.engine": "sglang_face.engine:Engine",
    "sglang.srt.sampling": "",
    "sglang.srt.sampling.sampling_params": (
        "sglang_face.sampling_params:SamplingParams sglang_face.sampling_params:TOP_K_ALL"
    ),
    "sglang.srt.server_args": "sglang_face.server_args:ServerArgs",
    "sglang.srt.utils": "sglang_face.buckets:MultiprocessingSerializer",
    "sglang.srt.weight_sync": "",
    "sglang.srt.weight_sync.tensor_bucket": (
        "sglang_face.buckets:FlattenedTensorBucket sglang_face.buckets:FlattenedTensorMetadata"
    ),
    "vllm": (
        "vllm_face.llm:LLM vllm_face.arguments:EngineArgs vllm_face.sampling_params:SamplingParams "
        "vllm_face.outputs:CompletionOutput vllm_face.outputs:RequestOutput "
        "vllm_face.inputs:TextPrompt vllm_face.inputs:TokensPrompt vllm_face.version:__version__"
    ),
    "vllm.engine": "",
    "vllm.engine.arg_utils": "vllm_face.arguments:EngineArgs",
    "vllm.entrypoints": "",
    "vllm.entrypoints.llm": "vllm_face.llm:LLM",
    "vllm.exceptions": (
        "vllm_face.exceptions:VLLMClientError vllm_face.exceptions:VLLMError vllm_face.exceptions:VLLMValidationError"
    ),
    "vllm.inputs": "vllm_face.inputs:TextPrompt vllm_face.inputs:TokensPrompt",
    "vllm.logprobs": "vllm_face.outputs:FlatLogprobs vllm_face.outputs:Logprob",
    "vllm.outputs": "vllm_face.outputs:CompletionOutput vllm_face.outputs:RequestOutput",
    "vllm.sampling_params": "vllm_face.sampling_params:RequestOutputKind vllm_face.sampling_params:SamplingParams",
}
"""For each module of a face, where each of its names is among ours."""

_LIBRARIES = tuple({name.partition(".")[0] for name in EXPORTS})

_modes: list[str] = []


def current_mode() -> str:
    """What engines that are made now compute."""
    return _modes[-1] if _modes else MODES[0]


@contextmanager
def faces(mode: str = "model") -> Iterator[None]:
    """``import vllm`` and ``import sglang`` give the fake engine meanwhile, whether they are installed or not.

    Args:
        mode: one of ``MODES``, for the engines that are made meanwhile.

    Raises:
        ConfigError: there is no such mode.
    """
    if mode not in MODES:
        raise ConfigError(f"the fake engine has no mode {mode!r}: expected one of {', '.join(MODES)}")
    before = _taken_out()
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    _modes.append(mode)
    try:
        yield
    finally:
        _modes.pop()
        sys.meta_path.remove(finder)
        _taken_out()
        sys.modules.update(before)


def _taken_out() -> dict[str, ModuleType]:
    """The modules of the libraries, which are no longer imported then."""
    if not any(library in sys.modules for library in _LIBRARIES):  # as at most runs; no part is there without the whole
        return {}
    names = [name for name in sys.modules if name.partition(".")[0] in _LIBRARIES]
    return {name: sys.modules.pop(name) for name in names}


class _Finder(MetaPathFinder):
    """Finds the modules of the faces, and no other of those libraries."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - faces are in no folder
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """A face, if there is one of that name."""
        if fullname in EXPORTS:
            return ModuleSpec(fullname, _Loader(), is_package=True)
        if fullname.partition(".")[0] in _LIBRARIES:
            raise LackingModuleError(_lacks(fullname))
        return None


class _Loader(Loader):
    """Fills a module with its names, and refuses others."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill it."""
        for source in EXPORTS[module.__name__].split():
            ours, _, name = source.partition(":")
            setattr(module, name, getattr(importlib.import_module(f"lightrft.sim.engine.{ours}"), name))
        module.__getattr__ = partial(_lacking, module.__name__)  # type: ignore[method-assign]


def _lacking(module: str, name: str) -> ModuleType:
    """A module in another that nobody has imported yet.

    Raises:
        LackingNameError: there is none of that name.
    """
    if f"{module}.{name}" in EXPORTS:
        return importlib.import_module(f"{module}.{name}")
    raise LackingNameError(_lacks(f"{module}.{name}"))


def _lacks(name: str) -> str:
    return lacks({"sglang": "SGLang", "vllm": "vLLM"}[name.partition(".")[0]], name)
