"""Puts the faces of the fake engine in the place of ``vllm`` and ``sglang``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from lightrft.errors import ConfigError

__all__ = ["MODES", "current_mode", "faces"]

MODES = ("model", "hash")
"""What fake engines compute: ``model`` runs the model itself, ``hash`` derives tokens from a digest of the weights."""

_MODULES: Mapping[str, str] = {
    "sglang": "sglang_face.engine sglang_face.server_args sglang_face.version",
    "sglang.srt": "",
    "sglang.srt.entrypoints": "",
    "sglang.srt.entrypoints.engine": "sglang_face.engine",
    "sglang.srt.sampling": "",
    "sglang.srt.sampling.sampling_params": "sglang_face.sampling_params",
    "sglang.srt.server_args": "sglang_face.server_args",
    "sglang.srt.utils": "sglang_face.buckets",
    "sglang.srt.weight_sync": "",
    "sglang.srt.weight_sync.tensor_bucket": "sglang_face.buckets",
    "vllm": "vllm_face.llm vllm_face.sampling_params vllm_face.outputs vllm_face.version",
    "vllm.engine": "",
    "vllm.engine.arg_utils": "vllm_face.llm",
    "vllm.entrypoints": "",
    "vllm.entrypoints.llm": "vllm_face.llm",
    "vllm.exceptions": "vllm_face.exceptions",
    "vllm.logprobs": "vllm_face.outputs",
    "vllm.outputs": "vllm_face.outputs",
    "vllm.sampling_params": "vllm_face.sampling_params",
}
"""For each module of a face, which of ours have what is in it."""

_LIBRARIES = tuple({name.partition(".")[0] for name in _MODULES})

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
    imported = "\n".join(["", *sys.modules])  # thousands of names, and at every run: seldom is one of them there
    if not any(f"\n{library}" in imported for library in _LIBRARIES):
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
        if fullname in _MODULES:
            return ModuleSpec(fullname, _Loader(), is_package=True)
        if fullname.partition(".")[0] in _LIBRARIES:
            raise ModuleNotFoundError(
                f"the fake engine has no {fullname}: SimWorld(engines=False) leaves the library itself in place",
                name=fullname,
            )
        return None


class _Loader(Loader):
    """Fills a module with what is public in ours."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill it."""
        for source in _MODULES[module.__name__].split():
            ours = importlib.import_module(f"lightrft.sim.engine.{source}")
            for name in ours.__all__:
                setattr(module, name, getattr(ours, name))
