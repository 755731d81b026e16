"""Writes ``docs/benchmarks.md`` from what was measured in this session."""

from __future__ import annotations

import datetime as dt
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

import lightrft
from benchmarks import engines
from benchmarks.groups import ROOT
from benchmarks.iterations import iteration
from benchmarks.measurements import DEADLOCKS, Pair, compared, deadlock, gloo, many_worlds, parts, start_and_end
from benchmarks.operations import COMPARED, GLOO_RANKS, ONE_CORE_RANKS, OPERATIONS
from benchmarks.quiet import QUIET, REPETITIONS, disturbance
from benchmarks.targets import TARGETS
from benchmarks.training import COMMANDS, commands, shares

FILE = ROOT / "docs" / "benchmarks.md"
NONE = "-"

Rows = list[list[str]]


def write() -> None:
    """Write the file; what this session has not measured yet is measured now."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n\n".join(_sections()) + "\n")


def _sections() -> Iterator[str]:
    sections = (_targets, _training, _iteration, _engines, _collectives, _gloo, _worlds, _parts)
    measured = [_or_failure(section) for section in sections]
    yield "# Benchmarks"
    yield _where()
    yield from measured


def _or_failure(section: Callable[[], str]) -> str:
    """What was measured for twenty minutes is not lost for one measurement that fails."""
    try:
        return section()
    except Exception as error:  # noqa: BLE001 - whatever it is, the others are written
        return f"{section.__name__.strip('_').capitalize()}: **failed**, {type(error).__name__}"


def _where() -> str:
    median, most = disturbance()
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    return f"""`nox -s bench -- --write` wrote this file on {today}; without `--write` it measures the same. A target
that is missed fails the run.

{platform.system()} {platform.release()}, {os.cpu_count()} cores of {_processor()}; Python {platform.python_version()},
torch {torch.__version__}, lightrft {lightrft.__version__}, pytest-benchmark {version("pytest-benchmark")}.

Shown are medians with minimum and maximum of {REPETITIONS} repetitions. Simulated ranks and PyTorch's threaded process
group (`torch.testing._internal.distributed.multi_threaded_pg`) run in turns in one process, with the same tensors, the
same number of calls and one thread for torch; a ratio is the median of the ratios of neighbours. Time is taken inside
the ranks and is that of the slowest one. Simulated ranks run as `SimWorld` makes them, with all state switched and all
checks on. Of repeated measurements those count that other processes disturbed least; they took {median:.0%} of one core
(median; {most:.0%} at most, {QUIET:.0%} counts as quiet)."""


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    family = f" (family {named['cpu family']}, model {named['model']})" if "cpu family" in named else ""
    return f"{named.get('model name', platform.machine())}{family}"


def _targets() -> str:
    rows = []
    for target in TARGETS:
        try:
            measured = target.measured()
            shown, verdict = f"{measured:.3g}", "met" if measured <= target.limit else "**missed**"
        except Exception as error:  # noqa: BLE001 - see _or_failure
            shown, verdict = NONE, f"**failed**: {type(error).__name__}"
        rows.append([target.what, f"{target.limit:g}", shown, verdict, target.source])
    return f"""## Targets

{_table(["", "at most", "measured", "", "kind"], rows)}

The target is an all_gather at 1024 ranks that is 20 times as fast as the threaded group's.
`all_gather_into_tensor` is; `all_gather` into a list is not and cannot be: every rank fills 1024 tensors of its own, a
million in all, and torch's own wrapper alone spends a tenth of the threaded group's time on them. "guard" marks what
nobody asked for, but should not get worse."""


def _training() -> str:
    rows = [
        [
            f"{name}: `{' '.join(script)}`",
            _spread(commands(name).simulated),
            _spread(commands(name).torchrun),
            f"{commands(name).speedup:.1f}",
        ]
        for name, script in COMMANDS.items()
    ]
    step, share = (statistics.median(each[key] for each in shares()) for key in ("step", "share"))
    return f"""## Training

Seconds from command to exit of ten steps of a tiny transformer on 8 ranks; `torchrun` starts 8 gloo processes on the
same cores.

{_table(["", "`lightrft sim -n 8`", "`torchrun --nproc-per-node 8`", "times as fast"], rows)}

A step of FSDP2 takes 8 simulated ranks together {step:.0f} ms of processor time, of which {share:.0%} is the
simulator's: what ranks use inside the process group and its handles, switches of ranks included."""


def _iteration() -> str:
    found = iteration()
    names = {
        "generation": "generation: the engine runs its model",
        "training": "training: log-probs of what was generated, forward, backward, optimizer step",
        "rest": "all the rest of `fit`",
    }
    rows = [[title, _number(found[key])] for key, title in names.items()]
    return f"""## One iteration of the trainer

64 prompts of 64 tokens, 8 samples each, 512 tokens a sample: GRPO with a reward function and neither critic nor initial
model, on 8 simulated ranks, `FakeStrategy`, the fake vLLM (4 ranks to an engine). The model is as small as there is, so
that the share of the rest is as large as there is: two layers of width 64, 100 thousand parameters.
Processor seconds of all ranks together, each on its own thread:

{_table(["", "s"], rows)}

The rest is gathering and scattering, rewards, advantages, the buffer, new weights for the engine (twice), and the log
with the import of TensorBoard. But for the weights it does not grow with the model, and 8 real ranks share it."""


def _engines() -> str:
    rows = [
        [spread, *(_number(engines.median(engines.generation(spread), key)) for key in ("ours", "theirs"))]
        for spread in engines.SPREADS
    ]
    vllm, sglang = (_number(engines.median(engines.rollout(engine), "seconds")) for engine in engines.FACES)
    once, flat = (_number(engines.median(engines.update(engine), "ratio")) for engine in engines.FACES)
    return f"""## The fake engine

64 greedy completions by the same tiny model (two layers of width 64) on one core: prompts of 4 to 64 tokens, uniformly
spread, and completions of 4 to 128, uniformly spread or so that each doubling is as likely. `generate` of transformers
gets all prompts in one batch, padded on the left, and goes on to the longest completion; only the tokens that were
asked for count. Both take turns, and the time of the processor is taken.

{_table(["lengths of completions", "fake engine, `model` (tokens/s)", "`transformers.generate` (tokens/s)"], rows)}

By hash, 1,024 prompts of 256 tokens with completions of 256 and their log-probs pass 8 ranks, 4 to an engine, in
{vllm} s of processor time (vLLM's face) and {sglang} s (SGLang's).

An update of 100M parameters takes {once} times as long as one copy of them for vLLM's face, which copies each weight
once, and {flat} times for SGLang's, which makes buckets flat first, as the real one does."""


def _collectives() -> str:
    rows = [
        [OPERATIONS[name].title, str(ranks), *_pair(compared(name, ranks))]
        for name, counts in COMPARED.items()
        for ranks in counts
    ]
    rows += [
        [
            "all_reduce, 16 floats; threaded on one core",
            str(ranks),
            *_pair(compared("all_reduce", ranks, one_core=True)),
        ]
        for ranks in ONE_CORE_RANKS
    ]
    return f"""## Collectives

Microseconds of one call divided by the number of ranks. The threaded group runs as it comes, on all cores, except in
the last rows, where it is pinned to one core, as simulated ranks always are.

{_table(["", "ranks", "simulated", "threaded", "simulated / threaded"], rows)}"""


def _pair(pair: Pair) -> list[str]:
    return [_spread(pair.ours), _spread(pair.theirs), _spread(pair.ratios)]


def _gloo() -> str:
    keys = {name: operation.title for name, operation in OPERATIONS.items()}
    keys["resident_mib"] = "resident memory of a process (MiB)"
    rows = [[title, *(_spread(gloo(ranks)[key]) for ranks in GLOO_RANKS)] for key, title in keys.items()]
    return f"""## Real gloo processes

As above, one process a rank. {os.cpu_count()} cores serve them all: the more processes, the more they wait for a core.

{_table(["", *(f"{ranks} processes" for ranks in GLOO_RANKS)], rows)}"""


def _worlds() -> str:
    ours, theirs, worlds = start_and_end("simulated"), start_and_end("threaded"), many_worlds()
    rows = [
        ["1024 ranks start, meet in a barrier and end (s), the first time in a process", *_both(ours, theirs, "first")],
        ["the same, the second time (s)", *_both(ours, theirs, "later")],
        ["memory of one of 1024 ranks, all alive (MiB)", *_both(ours, theirs, "mib_per_rank")],
        *([f"1024 ranks, last move to report: {kind} (s)", _spread(deadlock(kind)), "never"] for kind in DEADLOCKS),
        ["one of 1,000 worlds of 4 ranks (ms)", f"{worlds['seconds'] * 1e3:.2f}", NONE],
        ["left by the last 900 of them: threads", f"{worlds['threads']:.0f}", NONE],
        ["... Python objects that the collector tracks", f"{worlds['objects']:.0f}", NONE],
        ["... blocks of Python's allocator", f"{worlds['blocks']:.0f}", NONE],
        ["... resident memory (MiB)", f"{worlds['mib']:.2f}", NONE],
    ]
    return f"""## Worlds

{_table(["", "simulated", "threaded"], rows)}

Memory is the growth of the resident memory of a fresh process that has run a world of 4 ranks before. Of what many
worlds leave, about 146 bytes a rank are torch's: its registry of groups keeps an entry for every thread that ever had
one, whether of simulated ranks or of the threaded group."""


def _both(ours: dict[str, list[float]], theirs: dict[str, list[float]], key: str) -> list[str]:
    return [_spread(ours[key]), _spread(theirs[key])]


def _parts() -> str:
    rows = [[name, _spread(values)] for name, values in parts().items()]
    return f"""## One collective, part by part

Microseconds a rank, 8 ranks; "the rest of" is a difference of two measurements.

{_table(["", "us"], rows)}"""


def _spread(values: Sequence[float]) -> str:
    """Median with minimum and maximum."""
    if len(values) == 1:
        return _number(values[0])
    return f"{_number(statistics.median(values))} ({_number(min(values))}-{_number(max(values))})"


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def _table(head: Sequence[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
