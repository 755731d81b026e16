"""Reads its rank when it is imported."""

import os

RANK = int(os.environ["RANK"])
PATHS = {"shard": f"shard-{RANK}"}


class Config:
    local_rank = int(os.environ["LOCAL_RANK"])


def rank():
    return RANK
