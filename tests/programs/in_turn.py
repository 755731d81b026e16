"""Scripts one after the other, each as ``__main__`` of a fork of this process: ``torchrun in_turn.py SCRIPT ...``.

Loading the libraries takes most of the time of a short script; here they are loaded once for all.
"""

import gc
import os
import runpy
import socket
import sys

import accelerate  # noqa: F401
import deepspeed  # noqa: F401
import transformers  # noqa: F401
from torch.distributed import TCPStore


def main(scripts):
    gc.freeze()  # else each fork looks through all of it at its end
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for script in scripts:
        with port_of(store, script):
            pid = os.fork()
            if not pid:
                sys.argv[:] = [script]
                runpy.run_path(script, run_name="__main__")
                return
            if os.waitpid(pid, 0)[1]:
                sys.exit(f"{script} failed")


def port_of(store, script):
    """Have the ranks of a script meet at a port of their own: torchrun's store still has the keys of the one before.

    Returns the socket that holds the port until it is closed.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # whoever asks for it by number may still have it
    if os.environ["RANK"] == "0":
        print(f"script {script}", flush=True)  # noqa: T201
        holder.bind(("127.0.0.1", 0))
        store.set(script, str(holder.getsockname()[1]))
    os.environ["MASTER_PORT"] = store.get(script).decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    return holder


if __name__ == "__main__":
    main(sys.argv[1:])
