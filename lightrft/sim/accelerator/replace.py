"""How a replacement tells a rank's thread from any other, and where a replaced function is bound."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch

__all__ = ["RankClass", "answer", "answer_or", "once", "wherever_bound"]


def once(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A ``make`` for patches that builds one replacement per original and returns it again in the next world."""
    latest: tuple[Any, Any] | None = None

    def make(original: Any) -> Any:
        nonlocal latest
        if latest is None or latest[0] is not original:
            latest = original, build(original)
        return latest[1]

    return make


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


def wherever_bound(owner: ModuleType, name: str, make: Callable[[Any], Any], *, within: str = "") -> list[Patch]:
    """Patches for ``owner.name`` and for every module below the package ``within`` that has imported it by name.

    Empty if this release of torch does not have it.
    """
    original = vars(owner).get(name)
    if original is None:
        return []
    found = [Patch(owner, name, make)]
    prefix = (within or owner.__name__) + "."
    for module_name, module in list(sys.modules.items()):
        if module is not owner and f"{module_name}.".startswith(prefix):
            found += [Patch(module, key, make) for key, value in list(vars(module).items()) if value is original]
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
