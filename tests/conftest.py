"""The garbage collector seldom looks through all there is: torch and transformers are millions of objects."""

import gc

import pytest

SELDOM = (7000, 10, 30)
"""Objects until a collection, and how many of one generation come before one of the next. Python has 700, 10, 10."""


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collecting tests imports much and makes no garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.set_threshold(*SELDOM)
