"""What ordinary programs do with state of modules, and what is nobody's business."""

from __future__ import annotations

import enum
import functools
import logging
import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

logger = logging.getLogger(__name__)
TABLE = {"a": 1, "b": [2]}
NAMES = ["a", "b"]
REGISTRY = {}
ONCE = None
RANK_0_ONLY = []
SAME = None
DEVICE = None
LOCAL = threading.local()


def register(name):
    def add(cls):
        REGISTRY[name] = cls
        return cls

    return add


class Color(enum.Flag):
    RED = enum.auto()
    BLUE = enum.auto()


class Step(NamedTuple):
    loss: float


@dataclass
class Config:
    sizes: list = field(default_factory=list)
    known: ClassVar[dict] = {"lr": 1}
    lr: float = 0.1


CONFIG = Config([1])


class Policy(ABC):
    table = {"a": 1}

    @abstractmethod
    def act(self): ...


@register("net")
class Net(nn.Module, Policy):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.calls = 0

    def act(self):
        return TABLE["a"] + self.table["a"]

    def forward(self, x):
        self.calls += 1
        return self.layer(x)

    @functools.cached_property
    def width(self):
        return self.layer.in_features


class Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


REFERENCE = Net()


@functools.lru_cache
def data_folder():
    return os.environ.get("DATA", "data")


@functools.cache
def factorial(n):
    return n * factorial(n - 1) if n else 1


def setup():
    global ONCE, SAME, DEVICE
    if ONCE is None:
        ONCE = {"made": "by the first"}
    SAME = 1000.5 * 2
    DEVICE = torch.device("cpu")
    if dist.get_rank() == 0:
        RANK_0_ONLY.append(1)
    LOCAL.rank = dist.get_rank()


def train(history=(), names=[]):  # noqa: B006 - it is only read
    net = REGISTRY["net"]()
    x = torch.ones(1, 2, requires_grad=True)
    step = Step(Frozen.apply(net(x)).sum().item())
    total = {}
    for name in NAMES:
        total[name] = TABLE.get(name)
    with torch.no_grad():
        REFERENCE.layer(x)
    REFERENCE.eval()
    logger.debug("%s", Color.RED | Color.BLUE)
    config = Config(list(CONFIG.sizes))
    config.sizes.append(CONFIG.lr + net.width + len(names))
    return step.loss, data_folder(), factorial(5), net.act(), total
