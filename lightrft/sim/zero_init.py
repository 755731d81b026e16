"""The patches that DeepSpeed's ``zero.Init`` puts on classes while a rank is inside it.

Inside ``zero.Init`` the ``__init__`` of every subclass of ``nn.Module`` is wrapped, so that a module is partitioned as
soon as it is built. The wrapper belongs to one rank: it is taken off when that rank hands over the baton, and put back
when the rank goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

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


class PatchedModules:
    """A place of state, like those of :mod:`lightrft.sim.library_state`.

    Its contents are None outside ``zero.Init``; inside, the value of every patched attribute and the wrapped
    ``__init__`` of every class.
    """

    def __init__(self, partition_parameters: ModuleType) -> None:
        self._library = partition_parameters
        self._plain = [vars(owner).get(name, _MISSING) for owner, name in _PATCHED]

    def changed(self) -> bool:
        """Whether the running rank is inside ``zero.Init``."""
        context = self._library.top_level_context
        return context is not None and getattr(context, "patched", False)

    def read(self) -> tuple[list[Any], dict[type, Any]] | None:
        """The patches that are on now; takes none off."""
        if not self.changed():
            return None
        patches = [vars(owner).get(name, _MISSING) for owner, name in _PATCHED]
        return patches, {cls: vars(cls)["__init__"] for cls in _wrapped_classes()}

    def write(self, contents: tuple[list[Any], dict[type, Any]] | None) -> None:
        """Put on the patches of the rank that runs next, and take off all others."""
        patches, inits = contents if contents is not None else (self._plain, {})
        for (owner, name), value in zip(_PATCHED, patches, strict=True):
            _set(owner, name, value)
        for cls in _wrapped_classes():
            wrapped = inits.get(cls)
            if wrapped is None and contents is not None:  # a class that another rank was first to define or import
                cls.__init__ = vars(cls)["_old_init"]
                torch.nn.Module.__init_subclass__.__func__(cls)  # type: ignore[attr-defined]
            else:
                _set(cls, "__init__", vars(cls)["_old_init"] if wrapped is None else wrapped)

    def fresh(self, contents: None) -> None:
        """What a rank starts with: no patch."""
        return contents

    def merge(self, state: Any, before: Any, after: Any) -> Any:  # noqa: ARG002 - found when the patches are put on
        """``state`` as it is: classes that an import defined are found when the patches are put on."""
        return state


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
