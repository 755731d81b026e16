"""The command ``lightrft ckpt``."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from lightrft.command_line import FAILED, INTERRUPTED, MISUSED, Done, Parser, UsageError, complain
from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightrft.strategy.utils.ckpt_scripts.conversion import Conversion
    from lightrft.strategy.utils.ckpt_scripts.conversion import Done as Converted

__all__ = ["main", "run_script", "script"]

_KINDS = ("hf", "fsdp", "deepspeed")


def main(words: Sequence[str], *, kinds: tuple[str, str] | None = None) -> int:
    """Run a command line; returns the exit status.

    Args:
        words: after ``lightrft ckpt``.
        kinds: of source and target, if they are given.

    Raises:
        UsageError: it cannot work.
        Done: all that was asked for was help.
    """
    options = _parser(kinds).parse_args(words)
    try:
        if options.command == "show":
            from lightrft.strategy.utils.ckpt_scripts.show import show

            print(show(options.folder))  # noqa: T201
        else:
            _convert(options, kinds)
    except ConfigError as error:
        raise UsageError(f"lightrft ckpt {options.command}: error: {error}") from None
    except OSError as error:
        complain(f"lightrft ckpt {options.command}: error: {error}")
        return FAILED
    return 0


def script(words: Sequence[str], *, kinds: tuple[str, str] | None = None) -> int:
    """The same, as a program of its own."""
    try:
        return main(words, kinds=kinds)
    except UsageError as error:
        complain(str(error))
        return MISUSED
    except Done:
        return 0
    except KeyboardInterrupt:
        complain("lightrft: interrupted")
        return INTERRUPTED


def run_script(source: str, target: str) -> int:
    """A program that converts from one kind to another; its arguments are those of this process."""
    return script(["convert", *sys.argv[1:]], kinds=(source, target))


def _parser(kinds: tuple[str, str] | None) -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightrft ckpt",
        description="Show and convert checkpoints. One process does it, without a GPU and without a launcher.",
        epilog="Exit status: 0; 1 if a checkpoint is damaged or the result is not the source; 2 if this command line\n"
        "cannot work; 130 after Ctrl-C. A checkpoint of DeepSpeed is unpickled: convert none that you do not trust.\n\n"
        "examples:\n"
        "  lightrft ckpt show runs/ppo\n"
        "  lightrft ckpt convert runs/ppo actor-hf --to hf --model Qwen2.5-7B --dtype bf16\n"
        "  lightrft ckpt convert runs/ppo runs/ppo-fsdp --to fsdp",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    show = commands.add_parser("show", help="what checkpoints a folder has", allow_abbrev=False)
    show.add_argument("folder", type=Path, metavar="FOLDER", help="a save_dir, or one checkpoint")
    _add_convert(commands.add_parser("convert", help="write a checkpoint in another format", allow_abbrev=False), kinds)
    return parser


def _add_convert(parser: argparse.ArgumentParser, kinds: tuple[str, str] | None) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a save_dir, one checkpoint, or a Hugging Face model"
    )
    parser.add_argument(
        "target",
        type=Path,
        metavar="TARGET",
        help="folder to write: a Hugging Face model, or a save_dir with one checkpoint",
    )
    to = kinds[1] if kinds else None
    if to is None:
        parser.add_argument("--to", choices=_KINDS, required=True, help="what to write")
    else:
        parser.set_defaults(to=to)
    parser.add_argument("--tag", metavar="TAG", help="which checkpoint of SOURCE (default: the one that latest names)")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="for hf: a Hugging Face model whose configuration, tokenizer and names of weights the new one gets",
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of weights without an optimizer (default: as they are kept)"
    )
    parser.add_argument(
        "--zero_stage",
        type=int,
        choices=(1, 2, 3),
        help="for deepspeed: the layout to write; every stage loads it (default: 2)",
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the result back and compare it with the source, tensor by tensor (default: --check)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an older target, when the new one is complete"
    )


def _convert(options: argparse.Namespace, kinds: tuple[str, str] | None) -> None:
    with redirect_stdout(sys.stderr):  # libraries log to standard output as soon as they are imported
        from lightrft.strategy.utils.ckpt_scripts.conversion import Conversion, convert

        wanted = Conversion(
            source=options.source,
            target=options.target,
            to=options.to,
            kind=kinds[0] if kinds else None,
            tag=options.tag,
            model=options.model,
            dtype=options.dtype,
            zero_stage=options.zero_stage,
            check=options.check,
            overwrite=options.overwrite,
        )
        done = convert(wanted)
    print(_summary(wanted, done))  # noqa: T201


def _summary(wanted: Conversion, done: Converted) -> str:
    source = f"{done.source.folder} ({done.source.kind}"
    source += f", {done.source.info.steps} steps)" if done.source.info is not None else ")"
    states = sum(1 for place in done.expected.specs if place.key)
    what = f"{len(done.expected.specs) - states} weights" + (f", {states} optimizer states" if states else "")
    checked = "not checked"
    if done.comparison is not None:
        checked = f"checked: {done.comparison.tensors} tensors, largest difference {done.comparison.worst:g}"
    return f"{source} -> {wanted.target} ({wanted.to}): {what}\n{checked}"
