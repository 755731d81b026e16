"""Imported by a rank during the run; fills a registry meanwhile."""

from . import ordinary


@ordinary.register("late")
class Late:
    pass


ordinary.REGISTRY["loss"] = len
COUNT = 0


def count(rank):
    global COUNT
    COUNT = 1 + rank
