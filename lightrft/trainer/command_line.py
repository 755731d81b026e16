"""The command line of a run: every flag of strategy, trainer, models and data, and a file with the same names."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightrft.errors import ConfigError
from lightrft.strategy.arguments import add_arguments, add_settings
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.extras import naming_extras
from lightrft.trainer.arguments import add_trainer_arguments
from lightrft.trainer.function_names import check_function
from lightrft.trainer.inputs import InputConfig
from lightrft.trainer.settings import TrainerConfig

__all__ = ["parse_run_arguments", "run_parser"]


def run_parser(description: str | None = None) -> argparse.ArgumentParser:
    """A parser of all flags of a run, and ``--config``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML with flags by name, without the dashes; those of the command line win"
    )
    add_settings(parser, InputConfig, "run_parser")
    add_arguments(parser)
    return add_trainer_arguments(parser)


def parse_run_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and the file that ``--config`` names; what cannot work ends the process with a message.

    Nothing is loaded for it, so that a mistake is told at once.

    Args:
        parser: as ``run_parser`` makes it; it may have flags beside.
        arguments: the words of the command line, ``sys.argv[1:]`` if ``None``.
    """
    try:
        file = parser.parse_args(arguments).config
        if file is not None:
            parser.set_defaults(**_read(Path(file), parser))
        args = parser.parse_args(arguments)
        _check_places(StrategyConfig.from_args(args), TrainerConfig.from_args(args), InputConfig.from_args(args))
    except ConfigError as error:
        parser.error(str(error))
    return args


def _check_places(strategy: StrategyConfig, trainer: TrainerConfig, inputs: InputConfig) -> None:
    """Look whether what is read late is there; the name of a model may also be one that the hub has."""
    for flag, path in (("prompt_data", inputs.prompt_data), ("eval_data", inputs.eval_data)):
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{flag}={path!r}: there is no such file or folder")
    models = [("pretrain", strategy.pretrain), ("critic_pretrain", inputs.critic_pretrain)]
    for flag, path in [*models, *(("reward_pretrain", each) for each in inputs.reward_models)]:
        is_path = path is not None and (path.startswith(("/", ".", "~")) or path.count("/") > 1)
        if path is not None and is_path and not Path(path).is_dir():
            raise ConfigError(f"{flag}={path!r}: there is no such folder")
    if trainer.reward_function is not None:
        check_function(trainer.reward_function)


def _read(file: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What the flags in ``file`` set, by the names that ``parser`` has for it."""
    with naming_extras("--config"):
        import yaml
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: {error}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"--config {file}: expected names with values, such as `zero_stage: 3`")
    flags = {
        flag.removeprefix("--"): action
        for flag, action in parser._option_string_actions.items()
        if action.dest not in ("help", "config")
    }
    told: dict[str, Any] = {}
    for name, value in found.items():
        action = _flag(file, name, flags)
        if value is None:  # not given
            continue
        if action.dest in told:
            raise ConfigError(f"--config {file}: --{name} and another flag say what {action.dest} is: leave one out")
        told[action.dest] = _value(file, name, value, action)
    return told


def _flag(file: Path, name: Any, flags: Mapping[str, argparse.Action]) -> argparse.Action:
    if name in flags:
        return flags[name]
    near = difflib.get_close_matches(str(name), flags, n=1)
    raise ConfigError(f"--config {file}: no flag --{name}" + (f"; did you mean {near[0]}?" if near else ""))


def _value(file: Path, name: str, value: Any, action: argparse.Action) -> Any:
    """What ``action`` would make of ``value``, or a word that argparse reads as one of the command line."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"--config {file}: {name}={value!r}: expected true or false")
        return action.const if value else not action.const
    takes_text = action.nargs is None and not isinstance(value, (bool, list, dict))
    return str(value) if takes_text else value
