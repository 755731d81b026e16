"""The engine dials the port of the trainer's rendezvous with its own rank added."""

import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F10"
EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4
PORT = 29700


def broken():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        handshake = dist.TCPStore("127.0.0.1", PORT, is_master=True)
        handshake.set("engine", "resume")
    elif rank == 3:
        handshake = dist.TCPStore("127.0.0.1", PORT + rank, is_master=False)  # <- blamed
        assert handshake.get("engine") == b"resume"
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        handshake = dist.TCPStore("127.0.0.1", PORT, is_master=True)
        handshake.set("engine", "resume")
    elif rank == 3:
        handshake = dist.TCPStore("127.0.0.1", PORT, is_master=False)
        assert handshake.get("engine") == b"resume"
    dist.barrier()
    dist.destroy_process_group()
