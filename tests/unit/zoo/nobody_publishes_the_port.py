"""Everybody waits for the port of the engine; the engine was to publish it, and waits as well."""

import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F10"
EXPECTED = DeadlockError
RANKS = (0, 1, 2, 3)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    store = dist.TCPStore("127.0.0.1", 29600, is_master=dist.get_rank() == 0)
    port = int(store.get("engine_port"))  # <- blamed
    if dist.get_rank() == 3:
        store.set("engine_port", "8000")
    assert port == 8000
    dist.barrier()
    dist.destroy_process_group()


def mended():
    dist.init_process_group("gloo")
    store = dist.TCPStore("127.0.0.1", 29600, is_master=dist.get_rank() == 0)
    if dist.get_rank() == 3:
        store.set("engine_port", "8000")
    port = int(store.get("engine_port"))
    assert port == 8000
    dist.barrier()
    dist.destroy_process_group()
