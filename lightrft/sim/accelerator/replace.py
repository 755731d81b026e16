"""How a replacement tells a rank's thread from any other, and where a replaced function is bound."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch

__all__ = ["Once", "RankClass", "answer", "answer_or", "once", "wherever_bound"]


class Once:
    """A ``make`` for patches that builds one replacement for an original and returns it again in the next world."""

    def __init__(self, build: Callable[[Any], Any]) -> None:
        self._build = build
        self._original: Any = self  # what is no original of anything
        self._replacement: Any = None

    def __call__(self, original: Any) -> Any:
        """The replacement for ``original``."""
        if original is not self._original:
            self._original, self._replacement = original, self._build(original)
        return self._replacement

    def is_in_place(self, patch: Patch) -> bool:
        """Whether the replacement is where ``patch`` puts it."""
        return self._original is not self and vars(patch.owner).get(patch.name) is self._replacement

    def remove(self, patch: Patch) -> None:
        """Undo ``patch``."""
        if self._original is None:
            delattr(patch.owner, patch.name)
        else:
            setattr(patch.owner, patch.name, self._original)

    def put_back(self, patch: Patch) -> None:
        """Undo :meth:`remove`."""
        setattr(patch.owner, patch.name, self._replacement)


def once(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """See :class:`Once`."""
    return Once(build)


def answer(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """A ``make`` whose replacement calls ``function(state, *args, **kwargs)`` on a rank's thread."""

    def build(original: Any) -> Any:
        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            task = current_task()
            if task is None:
                return original(*args, **kwargs)
            return function(task.rank.accelerator, *args, **kwargs)

        return replacement

    return once(build)


def answer_or(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """As :func:`answer`, but calls ``function(state, original, *args, **kwargs)``."""

    def build(original: Any) -> Any:
        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            task = current_task()
            if task is None:
                return original(*args, **kwargs)
            return function(task.rank.accelerator, original, *args, **kwargs)

        return replacement

    return once(build)


def wherever_bound(owner: ModuleType, makes: Mapping[str, Callable[[Any], Any]], *, within: str = "") -> list[Patch]:
    """Patches for names of ``owner`` and for every module below the package ``within`` that has imported one of them.

    A name that this release of torch does not have is left out.
    """
    namespace = vars(owner)
    originals = {id(namespace[name]): make for name, make in makes.items() if namespace.get(name) is not None}
    found = [Patch(owner, name, make) for name, make in makes.items() if namespace.get(name) is not None]
    prefix = (within or owner.__name__) + "."
    for module_name, module in list(sys.modules.items()):
        if module is not owner and f"{module_name}.".startswith(prefix):
            names = [(name, id(value)) for name, value in list(vars(module).items()) if id(value) in originals]
            found += [Patch(module, name, originals[key]) for name, key in names]
    return found


class RankClass(type):
    """Metaclass of classes that stand in for one of torch's: an instance of the original counts as an instance.

    Set ``original`` before use. Calling the class outside a world makes an object of the original class.
    """

    original: Any = None

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an object of this class on a rank, else of the original one."""
        if current_task() is None:
            return cls.original(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or (cls.original is not None and isinstance(instance, cls.original))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return super().__subclasscheck__(subclass) or (cls.original is not None and issubclass(subclass, cls.original))
