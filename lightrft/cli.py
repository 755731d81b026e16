"""The command ``lightrft``. It loads torch only once there is something to run."""

from __future__ import annotations

import argparse
import difflib
import gc
import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lightrft import __version__
from lightrft.command_line import FAILED, INTERRUPTED, MISUSED, Done, Parser, UsageError, complain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightrft.sim.script import Script
    from lightrft.sim.world import SimWorld

__all__ = ["main"]

SCHEDULES = ("fifo", "random")
NUMERICS = ("rank", "ring", "tree", "permuted")
PROFILES = ("strict", "gloo", "nccl")
ENGINES = ("model", "hash", "installed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (that of this process if None); returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        _own_the_process()
    try:
        if words and words[0] in _COMMANDS:
            return _COMMANDS[words[0]](words[1:], own_process=argv is None)
        return _no_command(words)
    except UsageError as error:
        complain(str(error))
        return MISUSED
    except Done:
        return 0
    except KeyboardInterrupt:
        complain("lightrft: interrupted")
        return INTERRUPTED


def _own_the_process() -> None:
    """As torchrun runs ``python -u``: what ranks have printed is seen at once, also through a pipe."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(line_buffering=True)


# -- command lines ----------------------------------------------------------------------------------------------------


def _no_command(words: list[str]) -> int:
    parser = Parser(
        prog="lightrft",
        usage="lightrft COMMAND ...",
        description="Reinforcement-learning fine-tuning of language models, testable for many GPUs on one machine.",
        epilog="commands:\n"
        "  sim    run a script on N simulated ranks (help: lightrft sim --help)\n"
        "  ckpt   show and convert checkpoints (help: lightrft ckpt --help)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightrft {__version__}")
    if not words:
        parser.print_help(sys.stderr)
        return MISUSED
    if not words[0].startswith("-"):
        close = difflib.get_close_matches(words[0], _COMMANDS, 1)
        parser.error(f"there is no command {words[0]!r}: expected {close[0] if close else ', '.join(_COMMANDS)}")
    parser.parse_args(words)
    return 0


def _sim_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightrft sim",
        usage="lightrft sim -n RANKS [options] script.py [ARGS ...]\n"
        "       lightrft sim -n RANKS [options] -m MODULE [ARGS ...]",
        description="Run a Python script on N simulated torch.distributed ranks in this process, as torchrun runs\n"
        "it on N GPUs. A hang, a mismatch between ranks or a failing rank ends the run with a report\n"
        "that names the rank and the line.",
        epilog="Everything after the script goes to the script, untouched. Exit status: 0; 1 if the run failed;\n"
        "2 if this command line cannot work, or that of the script; 130 after Ctrl-C.\n\n"
        "examples:\n"
        "  lightrft sim -n 8 train.py --lr 1e-5\n"
        "  lightrft sim -n 16 --gpus-per-node 8 --seed 3 --schedule random train.py\n"
        "  lightrft sim -n 4 --tag-output -m my_package.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("-n", "--ranks", type=_positive, metavar="RANKS", help="how many ranks to run: WORLD_SIZE")
    ranks.add_argument(
        "--gpus-per-node", type=_positive, default=8, metavar="N", help="ranks on a node: LOCAL_WORLD_SIZE (default: 8)"
    )
    ranks.add_argument(
        "--rank-local",
        action="append",
        default=[],
        metavar="PKG",
        help="module or package whose globals each rank has for itself, as in real processes; may be given several "
        "times, or with commas",
    )
    ranks.add_argument("--cuda", action="store_true", help="torch.cuda.is_available() is True (default: False)")
    ranks.add_argument(
        "--engines",
        choices=ENGINES,
        default="model",
        help="what vllm and sglang are: fake engines that run the model itself (model), faster ones that derive tokens "
        "from a digest of the weights (hash), or the installed packages (default: model)",
    )
    order = parser.add_argument_group("order and seed")
    order.add_argument("--seed", type=_seed, default=0, metavar="S", help="seed of the run (default: 0)")
    order.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="fifo",
        help="fifo: ranks run in the order in which they become ready; random: the order is drawn from the seed, and "
        "is the same each time for one seed (default: fifo)",
    )
    order.add_argument(
        "--numerics",
        choices=NUMERICS,
        default="rank",
        help="order in which reductions add up; a result that depends on it will differ on a cluster (default: rank)",
    )
    checks = parser.add_argument_group("checks")
    checks.add_argument(
        "--profile",
        choices=PROFILES,
        default="strict",
        help="calls to accept: those of gloo, of nccl, or strict: only what every real backend gets right "
        "(default: strict)",
    )
    checks.add_argument(
        "--strict", action="store_true", help="fail if something is left unfinished at the end, instead of warning"
    )
    checks.add_argument(
        "--check-determinism",
        action="store_true",
        help="run everything twice and fail at the first event, random draw or tensor that differs",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--tag-output", action="store_true", help="start each line that a rank prints with [rank N]")
    output.add_argument(
        "--no-report",
        action="store_true",
        help="do not show at the end how many collectives, messages and bytes there were, and where the time went",
    )
    output.add_argument(
        "--trace",
        metavar="FILE",
        help="write a trace of all calls to FILE, such as trace.json, for ui.perfetto.dev or chrome://tracing",
    )
    output.add_argument(
        "--flight-record",
        metavar="PREFIX",
        help="write what each rank did to PREFIX0, PREFIX1, ... in the format of PyTorch's flight recorder, which "
        "torchfrtrace reads",
    )
    program = parser.add_argument_group("program")
    program.add_argument("-m", metavar="MODULE", help="run a module, as python -m does; what follows are its arguments")
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _split(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the program with its arguments (which begin with ``-m`` for a module)."""
    with_value = {name for action in parser._actions if action.nargs is None for name in action.option_strings}
    known = {name for action in parser._actions for name in action.option_strings}
    position = 0
    while position < len(words):
        word = words[position]
        if word == "--":
            return words[:position], words[position + 1 :]
        if word.startswith("-m"):
            return words[:position], ["-m", *filter(None, [word[2:]]), *words[position + 1 :]]
        if word == "-" or not word.startswith("-"):
            break
        name = word.partition("=")[0]
        if name not in known and name[:2] not in known:
            parser.error(_unknown_option(name, known))
        position += 2 if word in with_value else 1
    return words[:position], words[position:]


def _unknown_option(name: str, known: set[str]) -> str:
    if name.replace("_", "-") == "--nproc-per-node":
        return f"there is no option {name}: -n gives the number of all ranks, --gpus-per-node that of a node"
    close = difflib.get_close_matches(name, known, 1, cutoff=0.75)
    guess = f" (did you mean {close[0]}?)" if close else ""
    return f"there is no option {name}{guess}; options of the script come after the script"


# -- lightrft sim -----------------------------------------------------------------------------------------------------


def _sim(words: list[str], *, own_process: bool) -> int:
    parser = _sim_parser()
    ours, program = _split(parser, words)
    options = parser.parse_args(ours)
    options.rank_local = [name for names in options.rank_local for name in names.split(",") if name]
    script = _checked(parser, options, program, own_process)
    try:
        script.compile()
    except (SyntaxError, ValueError) as error:  # ValueError: the file is not text
        sys.excepthook(type(error), error.with_traceback(None), None)
        return FAILED
    if not own_process:
        return _run(script, options, _command(words, own_process))
    _load_the_simulator()
    try:
        return _run(script, options, _command(words, own_process))
    finally:
        _spare_the_end()


def _load_the_simulator() -> None:
    """Import what every run needs, torch above all: nothing of it is garbage, so none is looked for."""
    gc.disable()
    try:
        import lightrft.sim.world  # noqa: F401
        from lightrft.sim.frozen import freeze_for_good
    finally:
        gc.enable()
    freeze_for_good()


def _spare_the_end() -> None:
    """Collect the garbage of the script. The interpreter would look through everything several times as it ends."""
    gc.collect()
    gc.freeze()


def _checked(
    parser: argparse.ArgumentParser, options: argparse.Namespace, program: list[str], own_process: bool
) -> Script:
    """The script to run, once everything is known to be there that can be seen without running it."""
    from lightrft.sim.script import Script

    if options.ranks is None:
        parser.error("the number of ranks is missing: give it before the script, as in lightrft sim -n 8 script.py")
    as_module = program[:1] == ["-m"]
    program = program[as_module:]
    if not program:
        parser.error("-m needs the name of a module" if as_module else "the script to run is missing")
    script = Script(program[0], program[1:], as_module=as_module, drop_launcher=own_process)
    problem = script.problem()
    if problem:
        parser.error(problem)
    for problem in filter(None, map(script.missing_module, options.rank_local)):
        parser.error(f"--rank-local: {problem}")
    problem = _blocked(options.flight_record)
    if problem:
        parser.error(f"--flight-record: {problem}")
    if options.trace is not None:
        problem = _cannot_write(options.trace)
        if problem:
            parser.error(f"--trace: {problem}")
    return script


def _blocked(prefix: str | None) -> str:
    """Why the folder of files that begin with ``prefix`` can neither be there nor be made; else empty."""
    folder = os.path.dirname(os.path.abspath(prefix or "x"))  # noqa: PTH100, PTH120 - a prefix of names is no path
    while not os.path.exists(folder):  # noqa: PTH110
        folder = os.path.dirname(folder)  # noqa: PTH120
    if not os.path.isdir(folder):  # noqa: PTH112
        return f"{folder!r} is no folder"
    return "" if os.access(folder, os.W_OK) else f"nothing can be written to {folder!r}"


def _cannot_write(name: str) -> str:
    """Why no file of this name can be written, found out without changing one that exists; else empty."""
    path = Path(name)
    try:
        if path.is_dir():
            return f"{name!r} is a folder: expected the name of a file"
        if not path.parent.is_dir():
            return f"there is no folder {str(path.parent)!r}"
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        return f"{name!r} cannot be written: {error.strerror}"
    return ""


def _command(words: list[str], own_process: bool) -> str:
    """The command line that repeats this run."""
    by_module = own_process and os.path.basename(sys.argv[0]) == "__main__.py"  # noqa: PTH119 - as Python gives it
    return shlex.join([*(["python", "-m"] if by_module else []), "lightrft", "sim", *words])


def _run(script: Script, options: argparse.Namespace, replay: str) -> int:
    from lightrft.errors import ConfigError, SimulationError

    try:
        world = _new_world(options, replay)
        try:
            _run_in(world, script, options)
        except BaseException as error:
            if not isinstance(error, ConfigError):
                _tell(world, options)
            raise
        if script.told is not None:
            return script.told
    except ConfigError as error:
        raise UsageError(f"lightrft sim: error: {error}") from None
    except SimulationError as error:
        complain(f"\n{error}{_after_failure(options)}")
        return FAILED
    return 0 if _tell(world, options) else FAILED


def _new_world(options: argparse.Namespace, replay: str) -> SimWorld:
    from lightrft.sim.world import SimWorld

    world = SimWorld(
        options.ranks,
        gpus_per_node=options.gpus_per_node,
        seed=options.seed,
        schedule=options.schedule,
        numerics=options.numerics,
        profile=options.profile,
        rank_local=options.rank_local,
        cuda=options.cuda,
        engines=options.engines != "installed" and options.engines,
        strict=options.strict,
        check_determinism=options.check_determinism,
    )
    world.replay = replay
    world.timed = not options.no_report
    world.warn = lambda message: complain(f"lightrft: warning: {message}")
    return world


def _run_in(world: SimWorld, script: Script, options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        stack.enter_context(script.installed())
        if options.flight_record:
            stack.callback(world.dump_flight_record, options.flight_record)
        function = script.run
        if options.tag_output:
            from lightrft.sim.tagged_output import tagged_output

            function = stack.enter_context(tagged_output(function))
        world.run(function)


def _tell(world: SimWorld, options: argparse.Namespace) -> bool:
    """Show what the run did, if there was one, and write its trace; returns whether that could be written."""
    report = world.report()
    if not report.real_seconds:
        return True
    if not options.no_report:
        complain(f"\n{report}")
    if options.trace is None:
        return True
    try:
        world.write_trace(options.trace)
    except OSError as error:
        complain(f"lightrft: error: the trace {options.trace!r} could not be written: {error.strerror}")
        return False
    if not options.no_report:
        complain(f"\ntrace: {options.trace} (open it in ui.perfetto.dev or chrome://tracing)")
    return True


def _after_failure(options: argparse.Namespace) -> str:
    if not options.flight_record:
        return ""
    last = options.ranks - 1
    prefix = options.flight_record
    return f"\nflight record: {prefix}0 ... {prefix}{last}" if last else f"\nflight record: {prefix}0"


# -- lightrft ckpt ----------------------------------------------------------------------------------------------------


def _ckpt(words: list[str], *, own_process: bool) -> int:  # noqa: ARG001 - one signature for all commands
    from lightrft.strategy.utils.ckpt_scripts.command import main

    return main(words)


_COMMANDS: dict[str, Callable[..., int]] = {"sim": _sim, "ckpt": _ckpt}
