"""Places in the user's source: which frame of a call stack is the user's, and how a place is shown.

The user's code is everything outside the standard library, the installed packages and this package. If a stack holds
no such frame (an installed trainer run with ``-m``), the outermost frame outside torch and this package stands in.
"""

from __future__ import annotations

import functools
import linecache
import os
import sys
import sysconfig
from types import CodeType, FrameType
from typing import NamedTuple

from lightrft.sim.current import current_task

__all__ = ["Place", "caller_place", "is_user_class", "is_user_file", "may_hold_aliases"]


class Place(NamedTuple):
    """A line of source: absolute file name, line number (1-based) and the function it stands in."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{shorten(self.file)}:{self.line}"

    @property
    def source(self) -> str:
        """The text of the line, stripped; empty if the file cannot be read."""
        return linecache.getline(self.file, self.line).strip()


UNKNOWN = Place("<unknown>", 0, "?")

_LIGHTRFT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_CONTRACTS = os.path.join(_LIGHTRFT, "sim", "contracts") + os.sep  # ranks run it as they run a user's code
_paths = sysconfig.get_paths()
_STDLIB = tuple({os.path.realpath(_paths[k]) + os.sep for k in ("stdlib", "platstdlib")})
_SITE = tuple(
    {os.path.realpath(_paths[k]) + os.sep for k in ("purelib", "platlib")}
    | {os.path.realpath(p) + os.sep for p in sys.path if p.endswith(("site-packages", "dist-packages"))}
)
_SIMULATOR = 0
_LIBRARY = 1
_USER = 2
_kinds: dict[str, int] = {}
_places: dict[tuple[str, int, str], Place] = {}


def _kind(file: str) -> int:
    kind = _kinds.get(file)
    if kind is None:
        kind = _kinds[file] = _classify(file)
    return kind


def _classify(file: str) -> int:
    if file.startswith("<"):
        return _SIMULATOR
    path = _real_path(file)
    if path.startswith(_CONTRACTS):
        return _USER
    if path.startswith(_LIGHTRFT) or (f"{os.sep}torch{os.sep}" in path and path.startswith(_SITE)):
        return _SIMULATOR
    if path.startswith(_SITE):
        return _LIBRARY
    return _SIMULATOR if path.startswith(_STDLIB) else _USER


def _real_path(file: str) -> str:
    """``os.path.realpath(file)``, which asks for each folder on the way, for many files of few folders."""
    folder, name = os.path.split(file)
    if not os.path.isabs(folder):
        folder = os.path.join(os.getcwd(), folder)  # which may be another one at the next call
    path = os.path.join(_real_folder(folder), name)
    return os.path.realpath(path) if os.path.islink(path) else path


@functools.lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def is_user_file(file: str | None) -> bool:
    """Whether ``file`` is the user's own source."""
    return bool(file) and _kind(file or "") == _USER


def is_user_class(cls: type) -> bool:
    """Whether ``cls`` is defined in the user's own source."""
    return is_user_file(getattr(sys.modules.get(cls.__module__), "__file__", None))


def is_simulator_file(file: str) -> bool:
    """Whether ``file`` belongs to this package."""
    return file.startswith(_LIGHTRFT)


def caller_place(depth: int = 1) -> Place:
    """The innermost place in the user's code among the callers, ``depth`` frames up and beyond."""
    frame: FrameType | None = sys._getframe(depth)
    fallback: tuple[CodeType, int] | None = None
    kinds = _kinds
    while frame is not None:
        code = frame.f_code
        kind = kinds.get(code.co_filename)
        if kind is None:
            kind = _kind(code.co_filename)
        if kind == _USER:
            return _place(code, frame.f_lineno or 0)
        if kind == _LIBRARY:
            fallback = (code, frame.f_lineno or 0)
        frame = frame.f_back
    if fallback is not None:
        return _place(*fallback)
    task = current_task()
    return (task.registered_at if task is not None else None) or UNKNOWN


def _place(code: CodeType, line: int) -> Place:
    """The place, made once: a trace of a million calls names few places."""
    key = (code.co_filename, line, code.co_name)  # code objects of two files may be equal
    place = _places.get(key)
    if place is None:
        if len(_places) > 10_000:
            _places.clear()
        place = _places[key] = Place(code.co_filename, line, code.co_name)
    return place


def called_library_function(depth: int = 1) -> str:
    """Qualified name of the library function that the user's code called, e.g. ``Queue.get``; empty if none."""
    frame: FrameType | None = sys._getframe(depth)
    name = ""
    while frame is not None and _kind(frame.f_code.co_filename) != _USER:
        if not frame.f_code.co_filename.startswith(_LIGHTRFT):
            name = frame.f_code.co_qualname
        frame = frame.f_back
    return name


def place_of_frame(frame: FrameType | None) -> Place:
    """As :func:`caller_place`, for a frame of another thread."""
    fallback = UNKNOWN
    while frame is not None:
        kind = _kind(frame.f_code.co_filename)
        here = Place(frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name)
        if kind == _USER:
            return here
        if kind == _LIBRARY:
            fallback = here
        frame = frame.f_back
    return fallback


def shorten(file: str) -> str:
    """``file`` relative to the working directory where that is shorter."""
    try:
        relative = os.path.relpath(file)
    except ValueError:  # another drive
        return file
    return relative if len(relative) < len(file) else file


def may_hold_aliases(name: str, file: str | None) -> bool:
    """Whether a module may have imported a patched function under a name of its own.

    The user's modules and installed packages may; the standard library needs the originals; of torch only its
    distributed parts re-export what the simulator replaces.
    """
    if name == "torch" or name.startswith("torch."):
        return name.startswith(("torch.distributed", "torch.nn.parallel", "torch.testing._internal.distributed"))
    if name.startswith("lightrft.sim") or file is None:
        return name == "__main__"
    return _kind(file) != _SIMULATOR
