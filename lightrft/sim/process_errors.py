"""Exceptions on their way from one process to another, with their tracebacks."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType, TracebackType
from typing import Any

from lightrft.sim.places import is_simulator_file
from lightrft.sim.process_pickle import dumps

__all__ = ["PackedError", "pack_error", "unpack_error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLine:
    """One line of a traceback: where it is, and in which function, module and file."""

    file: str
    line: int
    function: str
    first_line: int
    module: str
    hidden: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedError:
    """An exception as it travels.

    Attributes:
        name: its class.
        message: its text.
        pickled: the exception itself; None if it cannot be pickled, or not be loaded again.
        frames: its traceback, outermost first.
        text: as the interpreter would have printed it.
        cause: its ``__cause__``.
        context: its ``__context__``.
        suppress_context: whether it was raised ``from`` something.
    """

    name: str
    message: str
    pickled: bytes | None
    frames: tuple[FrameLine, ...]
    text: str
    cause: PackedError | None
    context: PackedError | None
    suppress_context: bool


# -- packing ----------------------------------------------------------------------------------------------------------


def pack_error(error: BaseException) -> PackedError:
    """All that another process should know of ``error``; the lines of this package that called ``fn`` are left out."""
    error.__traceback__ = _below_us(error.__traceback__)
    return _pack(error, set())


def _below_us(tb: TracebackType | None) -> TracebackType | None:
    while tb is not None and tb.tb_next is not None and is_simulator_file(tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    return tb


def _pack(error: BaseException, seen: set[int]) -> PackedError:
    seen.add(id(error))
    related = [
        _pack(other, seen) if other is not None and id(other) not in seen else None
        for other in (error.__cause__, error.__context__)
    ]
    return PackedError(
        name=type(error).__name__,
        message=_message(error),
        pickled=_pickled(error),
        frames=tuple(map(_line, _entries(error.__traceback__))),
        text="".join(traceback.format_exception(error)).rstrip(),
        cause=related[0],
        context=related[1],
        suppress_context=error.__suppress_context__,
    )


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a user's exception may fail to describe itself, with any error
        return "(its message cannot be shown)"


def _pickled(error: BaseException) -> bytes | None:
    kind = type(error)
    call: tuple[Callable[..., BaseException], tuple[Any, ...]] = (_same, (error,))
    if isinstance(kind.__init__, FunctionType) and kind.__reduce__ is BaseException.__reduce__:
        call = _without_init, (kind, error.args, error.__dict__)
    try:
        pickled = dumps(call)
        return pickled if type(_load(pickled)) is kind else None
    except Exception:  # noqa: BLE001 - pickling runs code of the user
        return None


def _same(error: BaseException) -> BaseException:
    return error


def _without_init(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    """The exception again: its ``__init__``, which pickle would call, may take other arguments than it passed on."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


def _load(pickled: bytes) -> Any:
    function, args = pickle.loads(pickled)
    return function(*args)


def _entries(tb: TracebackType | None) -> list[TracebackType]:
    entries = []
    while tb is not None:
        entries.append(tb)
        tb = tb.tb_next
    return entries


def _line(entry: TracebackType) -> FrameLine:
    frame = entry.tb_frame
    return FrameLine(
        file=frame.f_code.co_filename,
        line=entry.tb_lineno,
        function=frame.f_code.co_name,
        first_line=frame.f_code.co_firstlineno,
        module=str(frame.f_globals.get("__name__", "")),
        hidden=frame.f_locals.get("__tracebackhide__") is True,
    )


# -- unpacking --------------------------------------------------------------------------------------------------------


def unpack_error(packed: PackedError) -> BaseException:
    """The exception, with a traceback that names the same lines.

    An exception that cannot be pickled comes back as a ``RuntimeError`` that has its class and message for a text.
    """
    error = _loaded(packed)
    error.__cause__ = unpack_error(packed.cause) if packed.cause is not None else None
    error.__context__ = error.__cause__ or (unpack_error(packed.context) if packed.context is not None else None)
    error.__suppress_context__ = packed.suppress_context
    return error.with_traceback(_traceback(packed.frames))


def _loaded(packed: PackedError) -> BaseException:
    if packed.pickled is not None:
        try:
            loaded = _load(packed.pickled)
            if isinstance(loaded, BaseException):
                return loaded
        except Exception:  # noqa: BLE001 - what loads in one process may not load in another
            pass
    return RuntimeError(f"{packed.name}: {packed.message}")


def _traceback(frames: tuple[FrameLine, ...]) -> TracebackType | None:
    tb: TracebackType | None = None
    for line in reversed(frames):
        tb = TracebackType(tb, _frame(line), -1, line.line)
    return tb


def _frame(line: FrameLine) -> FrameType:
    """A frame that ran nothing, but stands in ``line`` for whoever shows a traceback."""
    code: CodeType = compile("__import__('sys')._getframe()", line.file, "eval")
    code = code.replace(co_name=line.function, co_qualname=line.function, co_firstlineno=line.first_line)
    names = {"__name__": line.module, "__file__": line.file, "__tracebackhide__": line.hidden}
    frame: FrameType = FunctionType(code, names)()
    return frame
