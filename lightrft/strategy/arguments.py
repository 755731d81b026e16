"""The flags of the command line, derived from the fields of ``StrategyConfig`` and of other configurations."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.setting import Setting, settings_of

if TYPE_CHECKING:
    from lightrft.strategy.configuration import Configuration

__all__ = ["add_arguments", "add_settings", "flag_table"]

_METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "X"}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add a flag for every setting of a strategy, in groups, and return ``parser``.

    ``StrategyConfig.from_args`` reads what the parser returns. ``parser.set_defaults(seed=7)`` changes a default.

    Raises:
        ConfigError: if ``parser`` is no parser, or has one of the flags already; it is left as it was.
    """
    return add_settings(parser, StrategyConfig, "add_arguments")


def add_settings(parser: argparse.ArgumentParser, config: type[Configuration], called: str) -> argparse.ArgumentParser:
    """Add a flag for every setting of ``config``, in groups, and return ``parser``.

    Args:
        parser: to add to.
        config: whose ``from_args`` reads what the parser returns.
        called: the function that the user has called, for messages.

    Raises:
        ConfigError: if ``parser`` is no parser, or has one of the flags already; it is left as it was.
    """
    if not isinstance(parser, argparse.ArgumentParser):
        raise ConfigError(f"got {type(parser).__name__}: expected an argparse.ArgumentParser")
    settings = settings_of(config)
    _check_free(parser, [flag for name, known in settings.items() for flag in _flags(name, known)], called)
    for title in _groups(settings):
        group = parser.add_argument_group(title)
        for name, known in settings.items():
            if known.group == title:
                _add(group, name, known)
    return parser


def flag_table(config: type[Configuration] = StrategyConfig) -> str:
    """Every flag with its default, its values and its meaning: Markdown, a table for each group."""
    settings = settings_of(config)
    tables = []
    for title in _groups(settings):
        rows = [_row(name, known) for name, known in settings.items() if known.group == title]
        head = ["| flag | default | values | meaning |", "|---|---|---|---|"]
        tables.append("\n".join([f"### {title}", "", *head, *rows]))
    return "\n\n".join(tables) + "\n"


def _check_free(parser: argparse.ArgumentParser, flags: list[str], called: str) -> None:
    taken = [flag for flag in flags if flag in parser._option_string_actions]
    if len(taken) == len(flags):
        raise ConfigError(f"the parser has all of these flags already: call {called} once")
    if taken:
        raise ConfigError(
            f"the parser has {', '.join(taken)} already: leave out your own, {called} adds them; "
            f"parser.set_defaults(...) changes their defaults"
        )


def _groups(settings: dict[str, Setting]) -> list[str]:
    return list(dict.fromkeys(known.group for known in settings.values()))


def _flags(name: str, known: Setting) -> Iterator[str]:
    yield f"--{name}"
    if known.off_flag is not None:
        yield f"--{known.off_flag}"


def _add(group: argparse._ArgumentGroup, name: str, known: Setting) -> None:
    text = known.help if known.default is None else f"{known.help} (default: {_default(known)})"
    if known.kind is not bool:
        group.add_argument(f"--{name}", default=known.default, help=text, **_reader(known))
        return
    where: Any = group if known.off_flag is None else group.add_mutually_exclusive_group()
    where.add_argument(f"--{name}", action="store_true", default=known.default, help=text)
    if known.off_flag is not None:
        where.add_argument(
            f"--{known.off_flag}", action="store_false", dest=name, default=known.default, help=f"switch {name} off"
        )


def _reader(known: Setting) -> dict[str, Any]:
    """How argparse reads a value of the setting."""
    if known.choices:
        return {"type": known.kind, "choices": known.choices}
    if known.kind is tuple:
        return {"type": float, "nargs": len(known.default), "metavar": _METAVARS[tuple]}
    return {"type": known.kind, "metavar": _METAVARS[known.kind]}


def _default(known: Setting) -> str:
    if known.kind is bool:
        return "on" if known.default else "off"
    if known.kind is tuple:
        return " ".join(map(str, known.default))
    return "none" if known.default is None else str(known.default)


def _row(name: str, known: Setting) -> str:
    flags = ", ".join(f"`{flag}`" for flag in _flags(name, known))
    values = "" if known.kind is bool else known.values()
    return f"| {flags} | {_default(known)} | {values} | {known.help} |"
