"""The garbage collector seldom looks through all there is: torch and transformers are millions of objects."""

import gc

import pytest

SELDOM = 300
"""After as many collections of the middle generation comes one of everything; Python's own number is 10."""


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collecting tests imports much and makes no garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        first, second, _ = gc.get_threshold()
        gc.set_threshold(first, second, SELDOM)
