"""Files in memory, through which processes hand each other what they have pickled."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
from collections.abc import Iterator
from typing import Any

__all__ = ["map_file", "memory_file", "read_text", "write"]


def memory_file(*contents: bytes) -> int:
    """The descriptor of a new file that lives in memory and is gone when nobody holds it any more."""
    descriptor = os.memfd_create("lightrft")
    for content in contents:
        write(descriptor, content)
    return descriptor


def write(descriptor: int, content: bytes) -> None:
    """Append all of ``content``."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def read_text(descriptor: int) -> str:
    """The whole file as text, whoever else may be writing to it."""
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    return content.decode(errors="replace")


@contextlib.contextmanager
def map_file(descriptor: int) -> Iterator[mmap.mmap]:
    """The file as something to read from: :func:`pickle.load` reads one object after the other."""
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as view:
        yield view


def load(descriptor: int) -> Any:
    """The one object in the file."""
    with map_file(descriptor) as file:
        return pickle.load(file)
