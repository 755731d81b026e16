"""The patches that DeepSpeed's ``zero.Init`` puts on classes while a rank is inside it.

Inside ``zero.Init`` the ``__init__`` of every subclass of ``nn.Module`` is wrapped, so that a module is partitioned as
soon as it is built. The wrapper belongs to one rank: it is taken off when that rank hands over the baton, and put back
when the rank goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

__all__ = ["PatchedModules"]

_MISSING = object()
_PATCHED: tuple[tuple[Any, str], ...] = (
    (torch.nn.Module, "__init_subclass__"),
    (torch.nn.Module, "_old_init_subclass"),
    (torch.nn.Module, "apply"),
    (torch.nn.Module, "_old_apply"),
    (torch.Tensor, "__new__"),
    (torch.Tensor, "__old_new__"),
    *((torch, name) for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")),
)

Inits = dict[Any, Any]
"""For each class its wrapped ``__init__``."""


class PatchedModules:
    """A place of state, like those of :mod:`lightrft.sim.library_state`.

    Its contents are None outside ``zero.Init``; inside, the value of every patched attribute and the wrapped
    ``__init__`` of every class.
    """

    def __init__(self, partition_parameters: ModuleType) -> None:
        self._library = partition_parameters
        self._plain = _read_patches()
        self._of_context: WeakKeyDictionary[Any, tuple[Inits, Any]] = WeakKeyDictionary()
        self._classes: WeakSet[Any] = WeakSet()
        self._on: Inits | None = None

    def changed(self) -> bool:
        """Whether the running rank is inside ``zero.Init``."""
        context = self._library.top_level_context
        return context is not None and getattr(context, "patched", False)

    def read(self) -> tuple[list[Any], Inits] | None:
        """The patches that are on now; takes none off."""
        if not self.changed():
            self._on = None
            return None
        context = self._library.top_level_context
        inits, recorder = self._of_context.get(context, ({}, None))
        if vars(torch.nn.Module)["__init_subclass__"] is not recorder:  # just entered
            inits = {cls: vars(cls)["__init__"] for cls in _wrapped_classes()}
            recorder = self._recorder(inits)
            setattr(torch.nn.Module, "__init_subclass__", recorder)  # noqa: B010 - a method, for the type checker
            self._of_context[context] = inits, recorder
            self._classes.update(inits)
        self._on = inits
        return _read_patches(), inits

    def write(self, contents: tuple[list[Any], Inits] | None) -> None:
        """Put on the patches of the rank that runs next, and take off all others."""
        patches, inits = contents if contents is not None else (self._plain, None)
        for (owner, name), value in zip(_PATCHED, patches, strict=True):
            _set(owner, name, value)
        if inits is self._on and self._on is not None:
            return
        for cls in list(self._classes):
            original = vars(cls).get("_old_init", _MISSING)
            if original is _MISSING:
                continue
            if inits is None:
                _set(cls, "__init__", original)
            elif cls in inits:
                _set(cls, "__init__", inits[cls])
            else:  # a class that another rank was first to define or import
                cls.__init__ = original
                torch.nn.Module.__init_subclass__.__func__(cls)  # type: ignore[attr-defined]
        self._on = inits

    def fresh(self, contents: None) -> None:
        """What a rank starts with: no patch."""
        return contents

    def merge(self, state: Any, before: Any, after: Any) -> Any:  # noqa: ARG002 - found when the patches are put on
        """``state`` as it is: classes that an import defined are found when the patches are put on."""
        return state

    def _recorder(self, inits: Inits) -> Any:
        """DeepSpeed's wrapping of new classes, which are noted down as well: looking for them takes long."""
        wrap = vars(torch.nn.Module)["__init_subclass__"].__func__

        def init_subclass(cls: Any, /, **kwargs: Any) -> None:
            wrap(cls, **kwargs)
            if "_old_init" in vars(cls):
                inits[cls] = vars(cls)["__init__"]
                self._classes.add(cls)

        return classmethod(init_subclass)


def _read_patches() -> list[Any]:
    return [vars(owner).get(name, _MISSING) for owner, name in _PATCHED]


def _wrapped_classes() -> Iterator[Any]:
    """``nn.Module`` and its subclasses, those on which ``zero.Init`` has been, each once."""
    seen: set[Any] = set()
    ahead: list[Any] = [torch.nn.Module]
    while ahead:
        cls = ahead.pop()
        if cls not in seen:
            seen.add(cls)
            ahead += cls.__subclasses__()
            if "_old_init" in vars(cls):
                yield cls


def _set(owner: Any, name: str, value: Any) -> None:
    current = vars(owner).get(name, _MISSING)
    if current is value:
        return
    if value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
