"""What the README and the pages of docs/ show does what they say."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

import lightrft
from lightrft import cli
from lightrft.sim import pytest_plugin

pytest_plugins = "pytester"

ROOT = Path(lightrft.__file__).parents[1]

# Blocks that run as they stand, and what they print.
WHOLE = {
    ("README.md", 2): "",
    ("docs/datasets.md", 0): "system: Answer with a word.<eos>user: one and one?<eos>assistant: \n",
    ("docs/determinism.md", 0): "operation='all_reduce'",
    ("docs/flight-recorder.md", 0): "",
    ("docs/models.md", 0): "torch.Size([2, 4]) torch.Size([2, 4])\ntorch.Size([2, 5])\n",
    ("docs/sequence-parallelism.md", 0): "",
    ("docs/simulator.md", 0): "[3.5, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5]\n",
}
# Scripts, and the commands whose output the page shows.
SCRIPTS = {"docs/determinism.md": (1, "nondeterministic.py"), "docs/run-report.md": (0, "train.py")}


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run(source):
    """What it prints, and what it defines."""
    names, printed = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "block.py", "exec"), names)
    return printed.getvalue(), names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def outcomes(pytester, monkeypatch):
    """What becomes of the tests in these blocks."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def count(*several):
        pytester.makepyfile("\n\n".join(several))
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", plugins=[pytest_plugin]).parseoutcomes()

    return count


@pytest.mark.filterwarnings("ignore")  # of libraries
@pytest.mark.parametrize(("page", "number"), WHOLE)
def test_a_block_of_a_page_runs_as_it_stands(page, number):
    if page in ("docs/models.md", "docs/datasets.md", "docs/sequence-parallelism.md"):
        pytest.importorskip("transformers")
    printed, _ = run(blocks(page)[number])
    assert WHOLE[page, number] in printed
    assert bool(printed) == bool(WHOLE[page, number])


def test_the_results_of_the_readme_are_as_it_says():
    assert run(blocks("README.md")[2])[1]["results"] == [14.0] * 8


def test_the_tests_of_the_readme_pass(outcomes):
    first, second, train = blocks("README.md")
    assert outcomes(train, first, second) == {"passed": 2}


def test_the_contract_of_the_page_can_be_bound_as_it_says(outcomes):
    assert outcomes(*blocks("docs/contracts.md")[1:3]) == {"passed": 2}


@pytest.mark.parametrize("page", SCRIPTS)
def test_a_command_prints_what_the_page_shows(page, capsys):
    number, name = SCRIPTS[page]
    Path(name).write_text(blocks(page)[number])
    command, *shown = blocks(page, "console")[0].rstrip("\n").splitlines()
    cli.main(shlex.split(command)[2:])
    told = capsys.readouterr().err.rstrip("\n").splitlines()
    shown = list(map(_unmeasured, shown[not shown[0] :]))
    assert list(map(_unmeasured, told))[-len(shown) :] == shown


def _unmeasured(line):
    """A line of output without what is measured or drawn: times, shares, the numbers of two runs."""
    line = re.sub(r"\d+(\.\d+)? (us|ms|s|%)(?= |,|:|$)", "#", line)
    line = re.sub(r"(first|second) run +\S+", r"\1 run #", line)
    return " ".join(line.split())
