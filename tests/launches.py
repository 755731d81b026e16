"""Scripts that are launched on simulated ranks and by torchrun, or run in processes that have the libraries loaded."""

import contextlib
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import psutil

from lightrft.errors import CollectiveTimeoutError
from lightrft.sim import ProcessWorld

ROOT = Path(__file__).parents[1]


def simulated(ranks, script, *args):
    """The command that runs ``script`` on simulated ranks."""
    return [sys.executable, "-u", "-m", "lightrft", "sim", "-n", str(ranks), "--no-report", script, *args]


def torchrun(ranks, script, *args):
    """The command that runs ``script`` in as many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, script, *args]


def start(command):
    """Start ``command`` in the root of the project, with pipes for what it prints."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path
    }  # fmt: skip
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def output_of(command, seconds=100):
    """What ``command`` prints on its standard output.

    A process of gloo now and then hangs, or aborts after its last line, as its interpreter ends: a launch that hangs
    is ended and tried again, and one that aborts has said all there is to say.
    """
    for last in (False, False, True) if "torch.distributed.run" in command else (True,):
        process = start(command)
        try:
            out, err = process.communicate(timeout=seconds)
            break
        except subprocess.TimeoutExpired:
            kill_with_children(process)
            if last:
                raise
    assert process.returncode == 0 or "terminate called without an active exception" in err, err[-3000:]
    return out


def told_by_processes(ranks, script, *args, without=(), seconds=100):
    """What the real processes print that run ``script`` as torchrun would, but with the libraries loaded before.

    As in :func:`output_of`, processes of gloo that hang are ended and tried again.

    Args:
        without: environment variables that they do not have.
    """

    def run():
        import runpy

        for name in without:
            os.environ.pop(name, None)
        os.chdir(ROOT)
        warnings.resetwarnings()  # they are errors in the tests, not in the script
        sys.argv = [script, *args]
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")

    for _ in range(2):
        with contextlib.suppress(CollectiveTimeoutError):
            return _told(ProcessWorld(ranks, limit=seconds), run)
    return _told(ProcessWorld(ranks, limit=seconds), run)


def told_by_simulated_ranks(ranks, script, *args, seconds=100):
    """What the command line prints that runs ``script`` on simulated ranks, with the libraries loaded before."""

    def run():
        from lightrft.cli import main

        os.chdir(ROOT)
        warnings.resetwarnings()
        assert main(["sim", "-n", str(ranks), "--no-report", script, *args]) == 0

    return _told(ProcessWorld(1, limit=seconds), run)


def _told(world, run):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        world.run(run)  # and never close it: the process that has the libraries loaded would end
    return out.getvalue()


def kill_with_children(process):
    """End a launch and its ranks, which are in sessions of their own and hold its pipes."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.communicate(timeout=30)
