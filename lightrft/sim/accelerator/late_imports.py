"""Modules of torch that a program may import before a run, during it, or never, and that a run has to prepare."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lightrft.sim.accelerator.dtensor import IMPORTERS, MAKERS
from lightrft.sim.accelerator.replace import Once
from lightrft.sim.patching import Patch

__all__ = ["patches"]

_COMPILER = "torch._dynamo"
"""``torch.compile`` recognises torch's functions by identity, from tables that it builds when it is imported."""

_CACHES = (
    ("torch.overrides", "_get_overridable_functions"),
    ("torch.overrides", "get_ignored_functions"),
    ("torch.overrides", "get_testing_overrides"),
    (f"{_COMPILER}.trace_rules", "get_tensor_method"),
    (f"{_COMPILER}.trace_rules", "get_torch_obj_rule_map"),
    (f"{_COMPILER}.variables.torch", "TorchInGraphFunctionVariable._get_handlers"),
    (f"{_COMPILER}.variables.torch", "get_overridable_functions"),
    (f"{_COMPILER}.variables.torch", "tracing_state_functions"),
)
"""More such tables, built at first use. What a run has put into them names replacements and has to go with it."""


def _caches() -> Iterator[tuple[str, Any]]:
    for module, path in _CACHES:
        found: Any = sys.modules.get(module)
        for name in path.split("."):
            found = getattr(found, name, None)
        if hasattr(found, "cache_clear"):
            yield f"{module}.{path}", found


class LateImports(importlib.abc.MetaPathFinder):
    """Patches modules while :attr:`active`: those already imported, and those that are imported meanwhile.

    A patch sets the attribute to True, and undoing the patch sets it back to False.

    Args:
        others: the patches that are in place while a run lasts; the compiler is imported without them.
    """

    active: bool

    def __init__(self, others: Iterable[Patch]) -> None:
        vars(self)["active"] = False
        self._others = list(others)
        self._undo: list[tuple[Any, str, Any, Any]] = []
        self._filled: set[str] = set()
        self._finding = ""
        self._stance: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        changed = name == "active" and value != self.active
        super().__setattr__(name, value)
        if changed and value:
            self._begin()
        elif changed:
            self._end()

    def _begin(self) -> None:
        sys.meta_path.insert(0, self)
        for module in MAKERS.keys() & sys.modules.keys():
            self._patch(module)
        self._run_eagerly()
        self._filled = {name for name, cache in _caches() if cache.cache_info().currsize}

    def _run_eagerly(self) -> None:
        """Have compiled functions run as written: what one rank compiled, its number in it, would serve all."""
        compiler = sys.modules.get(_COMPILER)
        if compiler is not None and self._stance is None:
            self._stance = compiler.decorators.set_stance("force_eager")
            self._stance.__enter__()

    def _end(self) -> None:
        sys.meta_path.remove(self)
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        while self._undo:
            owner, name, original, value = self._undo.pop()
            setattr(owner, name, original)
            for importer in _importers(owner):  # imported since, and with the replacement
                if vars(importer).get(name) is value:
                    setattr(importer, name, original)
        for name, cache in _caches():
            if name not in self._filled:
                cache.cache_clear()

    def _patch(self, name: str) -> None:
        module = sys.modules[name]
        for path, make in MAKERS[name].items():
            *outer, attribute = path.split(".")
            owner = functools.reduce(getattr, outer, module)
            original = vars(owner).get(attribute)
            if original is not None:  # else this release of torch does without
                for place in (owner, *_importers(owner)):
                    self._replace(place, attribute, original, make)

    def _replace(self, owner: Any, name: str, original: Any, make: Callable[[Any], Any]) -> None:
        if vars(owner).get(name) is original:
            value = make(original)
            self._undo.append((owner, name, original, value))
            setattr(owner, name, value)

    @contextmanager
    def without_patches(self) -> Iterator[None]:
        """Put the originals back for a while; another rank must not run meanwhile."""
        removed = [patch for patch in self._others if isinstance(patch.make, Once) and patch.make.is_in_place(patch)]
        for patch in removed:
            patch.make.remove(patch)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for patch in removed:
                patch.make.put_back(patch)  # type: ignore[attr-defined]

    def execute(self, module: ModuleType, loader: Any) -> None:
        """Execute a module that is being imported, and prepare it."""
        if module.__name__ == _COMPILER:
            with self.without_patches():
                loader.exec_module(module)
            self._run_eagerly()
        else:
            loader.exec_module(module)
            self._patch(module.__name__)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """See one of the modules being imported."""
        if (fullname not in MAKERS and fullname != _COMPILER) or fullname == self._finding:
            return None
        self._finding = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding = ""
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, owner: LateImports) -> None:
        self._inner = inner
        self._owner = owner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._owner.execute(module, self._inner)


def _importers(owner: Any) -> list[ModuleType]:
    names = IMPORTERS.get(owner.__name__, ()) if isinstance(owner, ModuleType) else ()
    return [sys.modules[name] for name in names if name in sys.modules]


def patches(others: Iterable[Patch]) -> list[Patch]:
    """One patch, to be applied after ``others``, which has late modules patched in time."""
    return [Patch(LateImports(others), "active", lambda _: True)]
