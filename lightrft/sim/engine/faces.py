"""Puts the faces of the fake engine in the place of ``vllm`` and ``sglang``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

from lightrft.sim.engine.building import Mode, engines_in

__all__ = ["face", "faces"]

_MODULES: Mapping[str, Mapping[str, str]] = {
    "vllm": {
        "vllm": "vllm_face.llm vllm_face.sampling_params vllm_face.outputs",
        "vllm.entrypoints": "",
        "vllm.entrypoints.llm": "vllm_face.llm",
        "vllm.exceptions": "vllm_face.exceptions",
        "vllm.logprobs": "vllm_face.outputs",
        "vllm.outputs": "vllm_face.outputs",
        "vllm.sampling_params": "vllm_face.sampling_params",
    },
}
"""For each library its modules, and which of ours have what is in them."""

_VERSIONS = {"vllm": "0.32.0"}
"""Whose surface the faces have."""


def face(library: str) -> dict[str, ModuleType]:
    """Modules of a library, by name, made of the face: the library itself and those below it."""
    made = {}
    for name, sources in _MODULES[library].items():
        module = ModuleType(name, f"The face of {name} in front of the fake engine of lightrft.")
        module.__path__ = []  # a package whose sub-modules are all here
        for source in sources.split():
            ours = importlib.import_module(f"lightrft.sim.engine.{source}")
            for public in ours.__all__:
                setattr(module, public, getattr(ours, public))
        made[name] = module
    made[library].__version__ = _VERSIONS[library]  # type: ignore[attr-defined]
    for name, module in made.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, module)
    return made


@contextmanager
def faces(mode: Mode = "model") -> Iterator[None]:
    """``import vllm`` and ``import sglang`` give the fake engine meanwhile, whether they are installed or not.

    Args:
        mode: what the engines compute: ``"model"`` runs the model itself, ``"hash"`` is faster.
    """
    with engines_in(mode):
        before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _MODULES}
        for name in before:
            del sys.modules[name]
        for library in _MODULES:
            sys.modules.update(face(library))
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] in _MODULES]:
                del sys.modules[name]
            sys.modules.update(before)
