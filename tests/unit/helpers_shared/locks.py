"""Locks that are made when the module is imported."""

import functools
import threading

import torch.distributed as dist

LOCK = threading.Lock()


class Cache:
    lock = threading.RLock()

    class Inner:
        lock = threading.Lock()

    def __init__(self):
        self.lock = threading.Lock()


CACHE = Cache()


class Model:
    computed = 0

    @functools.cached_property
    def ranks(self):
        self.computed += 1
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, dist.get_rank())
        return found
