"""Stores that user code makes: the same answers as torch's, and a wait that never blocks the process."""

import os
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from lightrft.errors import DeadlockError, RankFailedError
from lightrft.sim import SimWorld
from lightrft.sim.store import SimStore

QUEUES = ["TCPStore", "HashStore", "PrefixStore"]
EVERY = [*QUEUES, "FileStore"]


def make(name, tmp_path, port=0):
    """A store of this kind: a simulated one on a rank, a real one elsewhere."""
    if name == "TCPStore":
        return dist.TCPStore("127.0.0.1", port, 1, is_master=True)
    if name == "FileStore":
        return dist.FileStore(str(tmp_path / "store"), 1)
    if name == "HashStore":
        return dist.HashStore()
    return dist.PrefixStore("prefix", make("TCPStore", tmp_path))


def on_one_rank(body):
    return SimWorld(1).run(body)[0]


def outcomes(store, calls):
    """What each call returns, or the class of what it raises."""
    found = []
    for call in calls:
        try:
            found.append(call(store))
        except (RuntimeError, TypeError, ValueError) as error:
            found.append(type(error))
    return found


CALLS = [
    lambda s: s.timeout,
    lambda s: s.set_timeout(timedelta(milliseconds=50)),
    lambda s: s.timeout,
    lambda s: s.num_keys(),
    lambda s: s.set("text", "1"),
    lambda s: s.get("text"),
    lambda s: s.set("bytes", b"\x00\xff"),
    lambda s: s.get("bytes"),
    lambda s: s.set("empty", ""),
    lambda s: s.get("empty"),
    lambda s: s.set("list", [1, 2]),
    lambda s: s.set("number", 3),
    lambda s: s.add("counter", 5),
    lambda s: s.add("counter", -2),
    lambda s: s.get("counter"),
    lambda s: s.add("text", 4),
    lambda s: s.append("log", "x"),
    lambda s: s.append("log", "yz"),
    lambda s: s.get("log"),
    lambda s: s.compare_set("new", "", "v"),
    lambda s: s.compare_set("new", "wrong", "z"),
    lambda s: s.compare_set("new", "v", "z"),
    lambda s: s.compare_set("missing", "wrong", "z"),
    lambda s: s.check(["missing"]),
    lambda s: s.check(["text"]),
    lambda s: s.check(["text", "missing"]),
    lambda s: s.check([]),
    lambda s: s.num_keys(),
    lambda s: s.delete_key("text"),
    lambda s: s.delete_key("text"),
    lambda s: s.num_keys(),
    lambda s: s.multi_set(["x", "y"], ["1", "2"]),
    lambda s: (s.get("x"), s.get("y")),
    lambda s: s.wait(["x", "y"]),
    lambda s: s.wait([]),
    lambda s: s.has_extended_api(),
    lambda s: s.barrier("alone", 1),
    lambda s: s.barrier("alone", 1),
    lambda s: s.clone().get("x"),
    lambda s: s.clone().set("from clone", "1"),
    lambda s: s.get("from clone"),
]
WAITS = [  # the real FileStore looks once a second
    lambda s: s.set_timeout(timedelta(milliseconds=50)),
    lambda s: s.wait(["missing"]),
    lambda s: s.wait(["missing"], timedelta(milliseconds=20)),
    lambda s: s.get("missing"),
    lambda s: s.barrier("others", 2, timedelta(milliseconds=20)),
    lambda s: s.queue_pop("missing"),
]
QUEUE_CALLS = [
    lambda s: s.set_timeout(timedelta(milliseconds=50)),
    lambda s: s.queue_len("queue"),
    lambda s: s.queue_push("queue", "1"),
    lambda s: s.queue_push("queue", b"2"),
    lambda s: s.queue_len("queue"),
    lambda s: s.check(["queue"]),
    lambda s: s.queue_pop("queue"),
    lambda s: s.queue_pop("queue", False),
    lambda s: s.queue_pop("queue", block=False),
    lambda s: s.queue_pop("queue"),
    lambda s: s.queue_len("queue"),
    lambda s: s.check(["queue"]),
    lambda s: (s.set("x", "1"), s.set("y", "2"), s.multi_get(["x", "y"])),
    lambda s: s.multi_get(["x", "missing"]),
    lambda s: sorted(s.list_keys()),
]


@pytest.mark.parametrize("name", EVERY)
def test_a_store_answers_as_the_real_one(name, tmp_path):
    real = outcomes(make(name, tmp_path), CALLS)
    simulated = on_one_rank(lambda: outcomes(make(name, tmp_path), CALLS))
    assert simulated == real


@pytest.mark.parametrize("name", QUEUES)
@pytest.mark.parametrize("calls", [QUEUE_CALLS, WAITS], ids=["queues", "waits"])
def test_queues_and_waits_answer_as_the_real_ones(name, calls, tmp_path):
    real = outcomes(make(name, tmp_path), calls)
    simulated = on_one_rank(lambda: outcomes(make(name, tmp_path), calls))
    assert simulated == real


def test_what_a_file_store_does_not_have_is_refused(tmp_path):
    def body():
        store = make("FileStore", tmp_path)
        for call in (lambda: store.queue_push("q", "1"), lambda: store.queue_len("q"), lambda: store.multi_get(["x"])):
            with pytest.raises(NotImplementedError):
                call()
        with pytest.raises(NotImplementedError):
            store.queue_pop("q")

    on_one_rank(body)


def test_keys_and_values_of_unequal_number_are_refused():
    with pytest.raises(RankFailedError, match="2 keys for 1 values"):
        on_one_rank(lambda: dist.HashStore().multi_set(["a", "b"], ["1"]))


def test_every_method_of_torchs_stores_is_simulated(tmp_path):
    names = {name for kind in (*EVERY, "Store") for name in vars(getattr(dist, kind)) if not name.startswith("_")}

    def body():
        for kind in EVERY:
            store = make(kind, tmp_path)
            real = [name for name in names if hasattr(real_class[kind], name)]
            assert isinstance(store, SimStore)
            assert all(hasattr(store, name) for name in real), kind

    real_class = {kind: getattr(dist, kind) for kind in EVERY}
    on_one_rank(body)


# -- shared between ranks ---------------------------------------------------------------------------------------------


def own(name, tmp_path, port=29600):
    """Every rank's own handle of one shared store."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if name == "FileStore":
        return rank, dist.FileStore(str(tmp_path / "shared"), size)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    return rank, dist.PrefixStore("prefix", store) if name == "PrefixStore" else store


@pytest.mark.parametrize("name", ["TCPStore", "PrefixStore", "FileStore"])
def test_a_key_set_by_one_rank_reaches_the_others(name, tmp_path):
    def body():
        rank, store = own(name, tmp_path)
        if rank == 2:
            store.set("answer", "42")
        found = store.get("answer")
        store.add("done", 1)
        while store.add("done", 0) < 3:
            store.check(["never"])
        return found

    for seed in range(4):
        assert SimWorld(3, schedule="random", seed=seed).run(body) == [b"42"] * 3


def test_a_rank_that_polls_lets_the_others_run(tmp_path):
    def body():
        rank, store = own("TCPStore", tmp_path)
        if rank:
            time.sleep(1)
            store.set("ready", "1")
            return None
        start = time.monotonic()
        while not store.check(["ready"]):
            pass
        return time.monotonic() - start

    assert SimWorld(2).run(body)[0] == pytest.approx(1, abs=0.1)


def test_stores_meet_in_barriers_and_queues(tmp_path):
    def body():
        rank, store = own("TCPStore", tmp_path)
        for turn in range(3):
            store.barrier(f"turn {turn}", 3)
        if rank == 0:
            for work in ("a", "b"):
                store.queue_push("work", work)
            return [store.queue_pop("done") for _ in range(2)]
        store.queue_push("done", store.queue_pop("work") + b"!")
        return None

    assert sorted(SimWorld(3).run(body)[0]) == [b"a!", b"b!"]


def test_a_hash_store_is_one_ranks_own():
    def body():
        store = dist.HashStore()
        store.set("rank", os.environ["RANK"])
        return store.get("rank"), store.num_keys()

    assert SimWorld(3).run(body) == [(str(rank).encode(), 1) for rank in range(3)]


def test_prefixes_keep_users_of_one_store_apart(tmp_path):
    def body():
        _, store = own("TCPStore", tmp_path)
        one, two = dist.PrefixStore("one", store), dist.PrefixStore("two", dist.PrefixStore("deep", store))
        one.set("key", "1")
        two.set("key", "2")
        assert two.underlying_store.underlying_store is store
        assert two._underlying_non_prefix_store is store
        store.barrier("both", 2)
        return one.get("key"), two.get("key"), store.get("one/key"), store.get("deep/two/key"), two.list_keys()

    assert SimWorld(2).run(body) == [(b"1", b"2", b"1", b"2", ["key"])] * 2


def test_the_store_of_the_default_group_is_shared_by_its_members():
    def main():
        dist.init_process_group("gloo")
        group = dist.new_group([0, 1])
        default = dist.distributed_c10d._get_default_store()
        if dist.get_rank() == 0:
            default.set("mine", "1")
            group.get_group_store().set("key", "2")
        found = default.get("mine"), group.get_group_store().get("key")
        dist.destroy_process_group()
        return found

    assert SimWorld(2).run(main) == [(b"1", b"2")] * 2


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_chosen_timeout_costs_no_real_time(name, tmp_path):
    def body():
        store = make(name, tmp_path)
        start, errors = time.monotonic(), []
        store.set_timeout(timedelta(hours=1))
        for call in (lambda: store.get("never"), lambda: store.wait(["never"], timedelta(hours=2))):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))
        return round((time.monotonic() - start) / 3600, 3), errors

    hours, errors = on_one_rank(body)
    assert hours == 3
    key = "prefix/never" if name == "PrefixStore" else "never"
    assert errors == [f"wait timeout after 3600000ms, keys: {key}", f"wait timeout after 7200000ms, keys: {key}"]


def test_a_key_that_comes_in_time_is_found():
    def body():
        rank = int(os.environ["RANK"])
        store = dist.TCPStore("127.0.0.1", 29600, 2, is_master=rank == 0, timeout=timedelta(seconds=10))
        if rank == 0:
            time.sleep(9.5)
            store.set("late", "1")
            return None
        return store.get("late")

    assert SimWorld(2).run(body)[1] == b"1"


@pytest.mark.parametrize("name", ["TCPStore", "PrefixStore", "FileStore"])
def test_a_key_nobody_sets_is_a_deadlock(name, tmp_path):
    def body():
        rank, store = own(name, tmp_path)
        if rank == 1:
            store.get("never")

    with pytest.raises(DeadlockError, match=r"store\.get\('(prefix/)?never'\)") as caught:
        SimWorld(3).run(body)
    assert [culprit.rank for culprit in caught.value.report.culprits]


def test_waits_say_what_they_wait_for():
    def body():
        store = dist.TCPStore("127.0.0.1", 29600, 2, is_master=True, wait_for_workers=False)
        store.queue_pop("work")

    with pytest.raises(DeadlockError, match=r"store\.queue_pop\('work'\)"):
        SimWorld(1).run(body)


# -- TCPStore ---------------------------------------------------------------------------------------------------------


def test_port_zero_chooses_a_free_port():
    def body():
        one = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        two = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        one.set("key", "1")
        client = dist.TCPStore("127.0.0.1", one.port, 1, is_master=False)
        return one.host, one.port != two.port, client.get("key"), two.check(["key"]), one.libuvBackend

    assert on_one_rank(body) == ("127.0.0.1", True, b"1", False, True)


def test_a_port_can_be_taken_once_until_its_server_is_gone():
    def body():
        one = dist.TCPStore("127.0.0.1", 29600, 1, is_master=True)
        one.set("key", "old")
        with pytest.raises(dist.DistNetworkError, match="port 29600 is already in use"):
            dist.TCPStore("127.0.0.1", 29600, 1, is_master=True)
        tenant = dist.TCPStore("127.0.0.1", 29600, 1, is_master=True, multi_tenant=True)
        shared = tenant.get("key")
        del one, tenant
        two = dist.TCPStore("127.0.0.1", 29600, 1, is_master=True)
        return shared, two.check(["key"])

    assert on_one_rank(body) == (b"old", False)


def test_a_client_waits_for_its_server_and_goes_on_and_the_server_waits_for_all():
    def body():
        rank = int(os.environ["RANK"])
        time.sleep([2, 1, 5][rank])
        dist.TCPStore("127.0.0.1", 29600, 3, is_master=rank == 0)
        return round(time.monotonic())

    assert SimWorld(3).run(body) == [5, 2, 5]


def test_a_server_need_not_wait():
    def body():
        rank = int(os.environ["RANK"])
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 29600, 2, is_master=True, wait_for_workers=False)
            store.set("key", "1")
            return store.get("answer")
        store = dist.TCPStore("127.0.0.1", 29600, is_master=False)
        store.set("answer", store.get("key") + b"!")
        return None

    assert SimWorld(2).run(body)[0] == b"1!"


def test_a_server_that_never_comes_is_a_deadlock_or_a_timeout():
    def client(**options):
        dist.TCPStore("127.0.0.1", 29600, 2, is_master=False, **options)

    with pytest.raises(DeadlockError, match=r"TCPStore\('127.0.0.1', 29600\): connect"):
        SimWorld(1).run(client)
    with pytest.raises(RankFailedError, match="no server came up within 0:00:05"):
        SimWorld(1).run(client, timeout=timedelta(seconds=5))


def test_workers_that_never_come_are_a_deadlock_or_a_timeout():
    def server(**options):
        dist.TCPStore("127.0.0.1", 29600, 3, is_master=True, **options)

    with pytest.raises(DeadlockError, match="3 workers to join"):
        SimWorld(1).run(server)
    with pytest.raises(RankFailedError, match="1 of 3 workers joined"):
        SimWorld(1).run(server, timeout=timedelta(seconds=5))


def test_stores_outside_a_run_are_real():
    store = dist.HashStore()
    assert not isinstance(store, SimStore)
    SimWorld(2).run(lambda: dist.HashStore().set("a", "b"))
    assert not isinstance(dist.TCPStore("127.0.0.1", 0, 1, is_master=True), SimStore)
    assert store.num_keys() == 0
