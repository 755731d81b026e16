"""State to which functions write, one kind each; the name of a function says which."""

from __future__ import annotations

import argparse
import functools
import os
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

NAME = None
TABLE = {}
LOSSES = defaultdict(list)
ORDER = OrderedDict()
COUNTS = Counter()
RECENT = deque(maxlen=4)
TOTAL = torch.zeros(2)
BIAS = np.zeros(2)
OPTIONS = argparse.Namespace()
NET = torch.nn.Linear(2, 2)
BUFFERS = {"mean": torch.zeros(2)}
GROUPS = {}


class Registry:
    count = 0
    entries = {}
    current = None

    @classmethod
    def enter(cls):
        cls.newest = dist.get_rank()

    def shared(self, rank):
        self.entries[rank] = rank


class Derived(Registry):
    pass


class Timer:
    def __init__(self):
        self.started = 0.0
        self.laps = []

    def start(self, rank):
        self.started = float(rank)

    def lap(self, rank):
        self.laps.append(rank)


@dataclass(slots=True)
class Progress:
    step: int = -1


TIMER = Timer()
LAPS = Timer()
PROGRESS = Progress()
_timer = None


def current_timer():
    global _timer
    if _timer is None:
        _timer = Timer()
    return _timer


def name(rank):
    global NAME
    NAME = rank


def new_name(rank):
    global LATER
    LATER = rank


def table(rank):
    TABLE["rank"] = rank


def table_by_alias(rank):
    entries = TABLE
    entries["rank"] = rank


def table_handed_on(rank):
    _put(TABLE, rank)


def _put(entries, rank):
    entries["rank"] = rank


def losses(rank):
    LOSSES["kl"].append(rank)


def order(rank):
    ORDER[rank] = rank


def counts(_):
    COUNTS["steps"] += 1


def recent(rank):
    RECENT.append(rank)


def total(_):
    TOTAL.add_(1)


def bias(rank):
    BIAS[0] += 1 + rank


def options(rank):
    OPTIONS.rank = rank


def net(rank):
    with torch.no_grad():
        NET.weight.mul_(1.5)


def buffers(_):
    BUFFERS["mean"].add_(1)


def class_attribute(rank):
    Registry.count = 1 + rank


def class_container(rank):
    Registry().shared(rank)


def new_class_attribute(_):
    Registry.enter()


def derived_class_attribute(_):
    Derived.enter()


def timer(rank):
    TIMER.start(rank + 1)


def laps(rank):
    LAPS.lap(rank)


def lazy_timer(rank):
    current_timer().start(rank + 1)


def progress(rank):
    PROGRESS.step = rank


def tick(_=None):
    tick.calls = getattr(tick, "calls", 0) + 1


def remember(value, history=[]):  # noqa: B006 - the mutable default is the point
    history.append(value)


def remember_by_keyword(value, *, seen={}):  # noqa: B006
    seen[value] = value


def undecorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


@undecorated
def decorated(rank):
    GROUPS["rank"] = rank


@functools.lru_cache
def my_rank():
    return dist.get_rank()


@functools.cache
def my_device():
    return f"cuda:{_local_rank()}"


@functools.cache
def is_first(rank):
    return rank == dist.get_rank() == 0


def _local_rank():
    return os.environ["LOCAL_RANK"]
