"""What importing the package loads, seen from a fresh interpreter."""

import importlib
import json
import subprocess
import sys
import textwrap

import pytest

HEAVY = ["deepspeed", "vllm", "sglang", "transformers"]

LIGHT = [
    "import lightrft.datasets",
    "import lightrft.models",
    "import lightrft.strategy",
    "from lightrft.strategy import StrategyConfig, get_strategy, register_strategy",
    "import lightrft.trainer",
    "import lightrft.trainer.command_line",
    "from lightrft.trainer import TrainerConfig",
    "from lightrft.utils import add_arguments, add_trainer_arguments",
]

# Stand-ins make every heavy library look installed, so that an import is seen whether or not the real one is there.
WATCH = """
import importlib.abc, importlib.util, json, sys

heavy, loaded = {heavy}, []

class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.split(".")[0] in heavy else None

    def exec_module(self, module):
        loaded.append(module.__name__)
        raise ImportError(module.__name__ + " is a stand-in")

sys.meta_path.insert(0, StandIn())
try:
    {statement}
except ImportError as error:
    if not loaded:
        raise
print(json.dumps({{"heavy": loaded, "modules": sorted(sys.modules)}}))
"""


def load(statement: str) -> dict[str, list[str]]:
    """Run ``statement`` in a fresh interpreter; which heavy libraries it asked for, and all that it loaded."""
    source = textwrap.dedent(WATCH).format(heavy=HEAVY, statement=statement)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "statement",
    [
        "import lightrft",
        "import lightrft.errors",
        "import lightrft.sim",
        "from lightrft.sim import SimWorld",
        *LIGHT,
        "from lightrft.strategy import FakeStrategy, StrategyBase, is_engine",
    ],
)
def test_k01_importing_loads_no_backend(statement):
    seen = load(statement)
    assert "lightrft" in seen["modules"]
    assert seen["heavy"] == []


@pytest.mark.parametrize("statement", ["import lightrft", "import lightrft.errors", *LIGHT])
def test_k01_importing_the_package_loads_no_torch(statement):
    assert not {"torch", "numpy"} & set(load(statement)["modules"])


@pytest.mark.parametrize("name", HEAVY)
def test_the_watch_sees_a_heavy_import_even_one_that_is_guarded(name):
    assert load(f"import lightrft, contextlib; exec('with contextlib.suppress(ImportError): import {name}')")[
        "heavy"
    ] == [name]


@pytest.mark.parametrize(
    "package", ["lightrft.datasets", "lightrft.models", "lightrft.strategy", "lightrft.trainer", "lightrft.utils"]
)
def test_every_name_that_a_package_lists_is_there(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert set(dir(module)) - set(vars(module)) <= set(module.__all__), "a name that is loaded and not listed"
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing
