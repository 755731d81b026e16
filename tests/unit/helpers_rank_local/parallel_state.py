"""Module-level state of one process."""

from __future__ import annotations

import functools
import threading
from time import sleep

import torch

GROUP = None
SIZES = {"tensor": 1}
NAMES = ["first"]
SEEN = set()


class Registry:
    count = 0
    table = {}

    def __init__(self):
        self.entries = {}


REGISTRY = Registry()


def set_group(value):
    global GROUP
    GROUP = value


def remember(value, history=[]):  # noqa: B006 - the mutable default is the point
    history.append(value)
    return list(history)


def tick():
    tick.calls = getattr(tick, "calls", 0) + 1
    return tick.calls


@functools.lru_cache
def cached_group():
    return GROUP


def nap():
    sleep(1000)


LOSSES = torch.zeros(2)
LOCK = threading.Lock()


def add_loss(value):
    LOSSES.add_(value)


def guarded(body):
    with LOCK:
        body()
