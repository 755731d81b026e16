"""Key-value stores between simulated ranks: what ``TCPStore``, ``FileStore``, ``HashStore`` and ``PrefixStore`` do.

Waiting for a key hands the baton on. A key that nobody can set any more is a deadlock, unless the caller gave a timeout
of its own: then virtual time runs to it and the call raises what the real store raises.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import DistNetworkError, DistStoreError, QueueEmptyError

from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch
from lightrft.sim.places import Place, caller_place

if TYPE_CHECKING:
    from lightrft.sim.scheduler import Task

__all__ = ["SharedKeys", "SimStore", "patches"]

_STANDARD_TIMEOUTS = {timedelta(seconds=300), timedelta(minutes=10), timedelta(minutes=30)}
"""Default timeouts of stores, nccl and gloo. A wait with one of these is a wait for ever."""


class SharedKeys:
    """The contents of one store, shared by all ranks that opened it."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.queues: dict[str, deque[bytes]] = {}
        self.waiters: list[tuple[Task, Any]] = []
        self.master: Callable[[], object] | None = None
        """A weak reference to the handle that serves the keys, where there is such a thing."""
        self.joined = 0

    def served(self) -> bool:
        """Whether the handle that serves the keys is there."""
        return self.master is not None and self.master() is not None

    def changed(self) -> None:
        """Wake everybody whose condition now holds."""
        still = []
        for task, condition in self.waiters:
            if condition():
                task.scheduler.wake(task)
            else:
                still.append((task, condition))
        self.waiters = still

    def holds(self, key: str) -> bool:
        """Whether ``key`` is set, or names a queue that is not empty."""
        return key in self.values or bool(self.queues.get(key))


class StoreWait:
    """What a task waits in that wants a key."""

    def __init__(self, what: str, place: Place) -> None:
        self._what = what
        self.place = place

    def describe(self) -> str:
        return self._what


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, bytes):
        raise TypeError(f"a store holds str or bytes, got {type(value).__name__}")
    return value


class SimStore(Store):
    """A store whose keys live in :class:`SharedKeys`; the methods are those of :class:`torch.distributed.Store`."""

    _own_keys = 0
    """Keys that the real store sets for itself, and counts."""

    def __init__(self, keys: SharedKeys, timeout: timedelta) -> None:
        super().__init__()
        self._keys = keys
        self._timeout = timeout

    @property
    def timeout(self) -> timedelta:
        """How long a wait may take in virtual time."""
        return self._timeout

    def set_timeout(self, timeout: timedelta) -> None:
        """Change how long a wait may take."""
        self._timeout = timeout

    def set(self, key: str, value: Any) -> None:
        """Set ``key`` to ``value`` (str or bytes)."""
        self._keys.values[key] = _bytes(value)
        self._keys.changed()

    def get(self, key: str) -> bytes:
        """The value of ``key``, after waiting for it."""
        self._wait_for([key], None, f"store.get({key!r})")
        return self._keys.values[key]

    def add(self, key: str, amount: int) -> int:
        """Add to the counter ``key`` (0 if new) and return its new value."""
        total = int(self._keys.values.get(key, b"0")) + amount
        self._keys.values[key] = str(total).encode()
        self._keys.changed()
        return total

    def append(self, key: str, value: Any) -> None:
        """Append to the value of ``key``."""
        self._keys.values[key] = self._keys.values.get(key, b"") + _bytes(value)
        self._keys.changed()

    def compare_set(self, key: str, expected_value: Any, desired_value: Any) -> bytes:
        """Set ``key`` if it holds ``expected_value`` (or is missing and that is empty); return what it holds now."""
        values, expected = self._keys.values, _bytes(expected_value)
        if key not in values and expected:
            return expected
        if values.get(key, b"") == expected or key not in values:
            values[key] = _bytes(desired_value)
            self._keys.changed()
        return values[key]

    def check(self, keys: list[str]) -> bool:
        """Whether all ``keys`` are set; does not wait, but lets other ranks run first."""
        found = all(map(self._keys.holds, keys))
        task = current_task()
        if not found and task is not None:
            task.scheduler.poll(StoreWait(f"store.check({', '.join(keys)!r})", caller_place(2)))
            found = all(map(self._keys.holds, keys))
        return found

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all ``keys`` are set.

        Raises:
            DistStoreError: ``timeout``, or a timeout chosen for the store, is over in virtual time.
        """
        self._wait_for(keys, timeout, f"store.wait({', '.join(keys)!r})")

    def _wait_for(self, keys: list[str], timeout: timedelta | None, what: str) -> None:
        values = self._keys.values
        limit = self._patience() if timeout is None else timeout
        if not self._wait_until(lambda: all(key in values for key in keys), what, limit):
            assert limit is not None
            milliseconds = round(limit.total_seconds() * 1000)
            self._timed_out(f"wait timeout after {milliseconds}ms, keys: {', '.join(keys)}")

    def _patience(self) -> timedelta | None:
        """The timeout that somebody chose for this store; None to wait for as long as anybody can run."""
        return None if self._timeout in _STANDARD_TIMEOUTS else self._timeout

    def _timed_out(self, message: str) -> NoReturn:
        raise DistStoreError(message)

    def _wait_until(self, condition: Callable[[], bool], what: str, timeout: timedelta | None) -> bool:
        if condition():
            return True
        task = current_task()
        if task is None:
            raise DistStoreError(f"{what}: not set, and the run that shared this store is over")
        scheduler = task.scheduler
        deadline = None if timeout is None else scheduler.now + round(timeout.total_seconds() * 1e9)
        waiting = StoreWait(what, caller_place(3))
        self._keys.waiters.append((task, condition))
        while True:
            woken = scheduler.block(waiting, deadline)
            if condition():
                return True
            if not woken:
                self._keys.waiters = [entry for entry in self._keys.waiters if entry[0] is not task]
                return False
            self._keys.waiters.append((task, condition))

    def delete_key(self, key: str) -> bool:
        """Remove ``key``; whether it was there."""
        return self._keys.values.pop(key, None) is not None

    deleteKey = delete_key  # noqa: N815 - the name under which C++ looks for it

    def num_keys(self) -> int:
        """How many keys are set, with those that the store itself uses."""
        return len(self._keys.values) + self._own_keys

    getNumKeys = num_keys  # noqa: N815

    def list_keys(self) -> list[str]:
        """All keys that users have set."""
        return list(self._keys.values)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """The values of ``keys``, after waiting for all of them."""
        self.wait(keys)
        return [self._keys.values[key] for key in keys]

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        """Set several keys."""
        if len(keys) != len(values):
            raise ValueError(
                f"multi_set: {len(keys)} keys for {len(values)} values; torch reads beyond the shorter list"
            )
        self._keys.values.update(zip(keys, map(_bytes, values), strict=True))
        self._keys.changed()

    def queue_push(self, key: str, value: Any) -> None:
        """Append to the queue ``key``."""
        self._keys.queues.setdefault(key, deque()).append(_bytes(value))
        self._keys.changed()

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        """Take the oldest value of the queue ``key``, after waiting for one if ``block``."""
        queues = self._keys.queues
        while not queues.get(key):
            if not block:
                raise QueueEmptyError("queue is empty")
            limit = self._patience()
            if not self._wait_until(lambda: bool(queues.get(key)), f"store.queue_pop({key!r})", limit):
                assert limit is not None
                milliseconds = round(limit.total_seconds() * 1000)
                self._timed_out(f"wait timeout after {milliseconds}ms, keys: {key}")
        return queues[key].popleft()

    def queue_len(self, key: str) -> int:
        """Length of the queue ``key``."""
        return len(self._keys.queues.get(key, ()))

    def has_extended_api(self) -> bool:
        """Whether ``append``, ``multi_get`` and ``multi_set`` are there."""
        return True

    def clone(self) -> Any:
        """Another handle of the same store, with a timeout of its own."""
        twin = Store.__new__(type(self))
        Store.__init__(twin)
        vars(twin).update(vars(self))
        return twin

    def barrier(self, key: str, world_size: int, timeout: timedelta | None = None) -> None:
        """Wait until ``world_size`` callers have come with this ``key``."""
        if self.add(f"{key}/num_members", 1) == world_size:
            self.set(f"{key}/last_member", "1")
        self.wait([f"{key}/last_member"], timeout)


class SimTCPStore(SimStore):
    """``TCPStore(host, port)`` of all ranks is one store; clients wait for its master, the master for its clients.

    It is served for as long as the master's handle exists. With ``multi_tenant``, as ``init_process_group`` asks for,
    it is served to the end of the run, as by ``torchrun``, and clients wait for one another, as gloo does next.
    """

    _own_keys = 1

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if current_task() is None:
            return _REAL["TCPStore"](*args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        host_name: str,
        port: int,
        world_size: int | None = None,
        is_master: bool = False,
        timeout: timedelta = timedelta(seconds=300),
        wait_for_workers: bool = True,
        multi_tenant: bool = False,
        master_listen_fd: int | None = None,  # noqa: ARG002 - nothing listens
        use_libuv: bool = True,
    ) -> None:
        task = current_task()
        assert task is not None
        self._host, self._port, self._libuv = host_name, port, use_libuv
        stores = task.rank.world.stores
        if port == 0 and is_master:
            port = self._port = stores.free_port()
        address = ("tcp", port)
        keys = stores.open(address)
        where = f"TCPStore({host_name!r}, {port})"
        if is_master and keys.master is not None and not multi_tenant:
            if keys.served():
                raise DistNetworkError(
                    f"{where}: the server socket has failed to listen: port {port} is already in use"
                )
            keys = stores.renew(address)
        super().__init__(keys, timeout)
        if is_master and not keys.served():
            keys.master = (lambda: True) if multi_tenant else weakref.ref(self)
            keys.changed()
        if not self._wait_until(keys.served, f"{where}: connect", self._patience()):
            raise DistNetworkError(f"{where}: no server came up within {timeout}")
        keys.joined += 1
        keys.changed()
        if (is_master or multi_tenant) and wait_for_workers and world_size:
            self._wait_for_workers(where, world_size)

    def _wait_for_workers(self, where: str, world_size: int) -> None:
        keys = self._keys
        wanted = -(-keys.joined // world_size) * world_size
        if not self._wait_until(
            lambda: keys.joined >= wanted, f"{where}: {world_size} workers to join", self._patience()
        ):
            raise DistStoreError(f"{where}: timed out, {keys.joined} of {world_size} workers joined")

    @property
    def host(self) -> str:
        """Host name as given."""
        return self._host

    @property
    def port(self) -> int:
        """Port, chosen by the store if 0 was given."""
        return self._port

    @property
    def libuvBackend(self) -> bool:  # noqa: N802 - torch's name
        """As asked for; has no effect."""
        return self._libuv


class SimFileStore(SimStore):
    """``FileStore(path)`` of all ranks is one store; nothing is written to the file."""

    _own_keys = 1

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if current_task() is None:
            return _REAL["FileStore"](*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, file_name: str, world_size: int = -1) -> None:  # noqa: ARG002 - as the real one
        task = current_task()
        assert task is not None
        self.path = file_name
        super().__init__(task.rank.world.stores.open(("file", file_name)), timedelta(seconds=300))

    def _timed_out(self, message: str) -> NoReturn:
        raise RuntimeError(message)

    def has_extended_api(self) -> bool:
        return False

    def delete_key(self, key: str) -> bool:
        super().delete_key(key)
        return True

    deleteKey = delete_key  # noqa: N815

    def multi_get(self, keys: list[str]) -> list[bytes]:
        raise NotImplementedError("FileStore.multi_get: torch's never returns; get the keys one by one")

    def queue_push(self, key: str, value: Any) -> None:
        raise NotImplementedError("queue support is not implemented.")

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        raise NotImplementedError("queue support is not implemented.")

    def queue_len(self, key: str) -> int:
        raise NotImplementedError("queue support is not implemented.")


class SimHashStore(SimStore):
    """``HashStore()``: a store of one process; other ranks never see it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if current_task() is None:
            return _REAL["HashStore"](*args, **kwargs)
        return super().__new__(cls)

    def __init__(self) -> None:
        super().__init__(SharedKeys(), timedelta(seconds=300))


class SimPrefixStore(SimStore):
    """``PrefixStore(prefix, store)``: the keys of ``store`` that start with ``prefix/``."""

    def __new__(cls, prefix: str, store: Any) -> Any:
        if current_task() is None or not isinstance(store, SimStore):
            return _REAL["PrefixStore"](prefix, store)
        return super().__new__(cls)

    def __init__(self, prefix: str, store: SimStore) -> None:
        self._store = store
        self._prefix = f"{prefix}/"
        super().__init__(store._keys, store.timeout)

    @property
    def underlying_store(self) -> SimStore:
        """The store without the prefix."""
        return self._store

    @property
    def _underlying_non_prefix_store(self) -> SimStore:
        store = self._store
        return store._underlying_non_prefix_store if isinstance(store, SimPrefixStore) else store

    @property
    def timeout(self) -> timedelta:
        return self._store.timeout

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    def has_extended_api(self) -> bool:
        return self._store.has_extended_api()

    def clone(self) -> Any:
        twin = super().clone()
        twin._store = self._store.clone()
        return twin

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._prefix + key, value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._prefix + key)

    def add(self, key: str, amount: int) -> int:
        return self._store.add(self._prefix + key, amount)

    def append(self, key: str, value: Any) -> None:
        self._store.append(self._prefix + key, value)

    def compare_set(self, key: str, expected_value: Any, desired_value: Any) -> bytes:
        return self._store.compare_set(self._prefix + key, expected_value, desired_value)

    def check(self, keys: list[str]) -> bool:
        return self._store.check([self._prefix + key for key in keys])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._store.wait([self._prefix + key for key in keys], timeout)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._prefix + key)

    def num_keys(self) -> int:
        return self._store.num_keys()

    def list_keys(self) -> list[str]:
        start = len(self._prefix)
        return [key[start:] for key in self._store.list_keys() if key.startswith(self._prefix)]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._store.multi_get([self._prefix + key for key in keys])

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        self._store.multi_set([self._prefix + key for key in keys], values)

    def queue_push(self, key: str, value: Any) -> None:
        self._store.queue_push(self._prefix + key, value)

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        return self._store.queue_pop(self._prefix + key, block)

    def queue_len(self, key: str) -> int:
        return self._store.queue_len(self._prefix + key)

    deleteKey = delete_key  # noqa: N815
    getNumKeys = num_keys  # noqa: N815


class StoreTable:
    """The stores that the ranks of one run have opened, by address."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, Any], SharedKeys] = {}
        self._last_port = 49151

    def open(self, address: tuple[str, Any]) -> SharedKeys:
        """The store at ``address``, made at first use."""
        return self._open.setdefault(address, SharedKeys())

    def renew(self, address: tuple[str, Any]) -> SharedKeys:
        """An empty store at ``address``, in place of one whose server is gone."""
        self._open[address] = SharedKeys()
        return self._open[address]

    def free_port(self) -> int:
        """A port that no store uses."""
        self._last_port += 1
        return self._last_port


_SIMULATED: dict[str, type[SimStore]] = {
    "TCPStore": SimTCPStore,
    "FileStore": SimFileStore,
    "HashStore": SimHashStore,
    "PrefixStore": SimPrefixStore,
}
_REAL = {name: getattr(dist, name) for name in _SIMULATED}


def _replace_by(store: type[SimStore]) -> Callable[[Any], Any]:
    return lambda _: store


def _patches() -> list[Patch]:
    return [Patch(dist, name, _replace_by(store)) for name, store in _SIMULATED.items()]


_PATCHES = _patches()


def patches() -> list[Patch]:
    """The replacements for the store classes."""
    return _PATCHES
