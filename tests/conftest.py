"""The garbage collector leaves alone what was imported: torch, transformers and DeepSpeed are millions of objects."""

import gc
import sys

import pytest

from lightrft.sim import frozen

MANY_MODULES = 200

frozen_modules = 0


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collecting tests imports much and makes no garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Some tests import much more."""
    try:
        return (yield)
    finally:
        if len(sys.modules) > frozen_modules + MANY_MODULES:
            gc.collect()
            freeze()


def freeze():
    """Nothing that there is now is looked through again."""
    global frozen_modules
    frozen_modules = len(sys.modules)
    gc.freeze()


@pytest.fixture
def nothing_frozen(monkeypatch):
    """The garbage collector is as in a process where nobody has frozen anything."""
    monkeypatch.setattr(frozen, "_others", [])
    gc.unfreeze()
    yield
    freeze()
