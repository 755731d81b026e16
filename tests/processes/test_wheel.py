"""The wheel, built and installed in a new environment."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from launches import ROOT

pytestmark = pytest.mark.processes

IMPORT_ALL = """
import importlib, pkgutil, sys, lightrft
assert lightrft.__file__.startswith(sys.prefix), lightrft.__file__
names = [found.name for found in pkgutil.walk_packages(lightrft.__path__, "lightrft.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(*names)
"""


def output_of(*command):
    away = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [*map(str, command)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120, cwd="/", env=away)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    output_of(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    return next(folder.glob("lightrft-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of programs of an environment that has the wheel, and all packages that there are here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    output_of(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    own = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    return folder / "bin"


def test_k25_the_wheel_holds_every_file_of_the_package(wheel):
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "lightrft").rglob("*") if file.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    assert expected <= set(zipfile.ZipFile(wheel).namelist())
    assert {"lightrft/py.typed", "lightrft/sim/engine/core.py"} <= expected


def test_k25_every_module_of_the_installed_wheel_can_be_imported(installed):
    names = output_of(installed / "python", "-W", "ignore", "-c", IMPORT_ALL).split()
    files = [file for file in (ROOT / "lightrft").rglob("*.py") if file.name != "__init__.py"]
    assert len([name for name in names if "." in name]) >= len(files)


def test_k25_the_installed_program_runs(installed):
    assert output_of(installed / "lightrft", "--version").startswith("lightrft ")
