"""Names of functions in files, ``"path/to/file.py:function"``, and whether there are such; nothing is loaded."""

from __future__ import annotations

import re
import symtable
from pathlib import Path

from lightrft.errors import ConfigError

__all__ = ["check_function", "lacks", "parts"]


def check_function(where: str) -> None:
    """Look whether ``load_function`` will find what ``where`` names, and run nothing of it.

    Modules are not looked for: finding one may import another.

    Raises:
        ConfigError: it will not.
    """
    place, name = parts(where)
    if not place.endswith(".py"):
        return
    if not Path(place).is_file():
        raise ConfigError(f"{where!r}: {place} is no file")
    try:
        source = Path(place).read_text("utf-8")
        table = symtable.symtable(source, place, "exec")
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{where!r}: {place} is not Python: {error}") from error
    bound = [symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()]
    if name not in bound and not re.search(r"\bimport \*", source):
        raise lacks(place, name, [each.get_name() for each in table.get_children()])


def parts(where: str) -> tuple[str, str]:
    """File or module, and name.

    Raises:
        ConfigError: it has not both.
    """
    place, _, name = where.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"{where!r} names no reward function: expected path/to/file.py:function")
    return place, name


def lacks(place: str, name: str, functions: list[str]) -> ConfigError:
    """The error of a file or module that has only these functions."""
    known = [each for each in functions if not each.startswith("_")]
    return ConfigError(f"{place} has no function {name!r}: it has {', '.join(known) or 'none'}")
