"""Locks, queues, events and threads of simulated ranks."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import json
import multiprocessing
import os
import queue
import runpy
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from lightrft.errors import BlockedOutsideError, DeadlockError, RankFailedError
from lightrft.sim import SimWorld

from .helpers_shared import locks

MODULE_LOCK = threading.Lock()


def culprits(caught):
    return [culprit.rank for culprit in caught.value.report.culprits]


def with_group(body):
    def run():
        dist.init_process_group("gloo")
        result = body(dist.get_rank())
        dist.destroy_process_group()
        return result

    return run


def test_a_lock_that_is_held_across_a_collective_is_a_deadlock():
    lock = threading.Lock()

    def body(rank):
        with lock:
            dist.barrier()

    with pytest.raises(DeadlockError, match=r"Lock.acquire \(held by rank \d\)"):
        SimWorld(2).run(with_group(body))


def test_a_lock_of_the_module_made_before_the_run_is_seen_too():
    def body(rank):
        with MODULE_LOCK:
            dist.barrier()

    with pytest.raises(DeadlockError, match="Lock.acquire"):
        SimWorld(2).run(with_group(body))
    assert MODULE_LOCK.acquire(blocking=False)
    MODULE_LOCK.release()


@pytest.mark.parametrize("name", ["LOCK", "Cache.lock", "Cache.Inner.lock", "CACHE.lock"])
def test_a_lock_of_another_module_made_before_the_run_is_seen_too(name):
    owner, _, attribute = f"locks.{name}".rpartition(".")
    owner = functools.reduce(getattr, owner.split(".")[1:], locks)
    before = getattr(owner, attribute)

    def body(rank):
        with getattr(owner, attribute):
            dist.barrier()

    with pytest.raises(DeadlockError, match="Lock.acquire"):
        SimWorld(2, stall_limit=2).run(with_group(body))
    assert getattr(owner, attribute) is before
    assert before.acquire(blocking=False)
    before.release()


def test_cached_properties_of_one_class_are_computed_by_all_ranks():
    def body(rank):
        model = locks.Model()
        threads = [threading.Thread(target=lambda: model.ranks) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return model.ranks, model.computed

    before = vars(vars(locks.Model)["ranks"]).get("lock")
    once = 1 if before else 2  # from Python 3.12 on, nothing keeps two threads from computing it
    assert SimWorld(2, stall_limit=2).run(with_group(body)) == [([0, 1], once)] * 2
    assert vars(vars(locks.Model)["ranks"]).get("lock") is before


def test_a_lock_that_is_passed_on_works():
    lock, order = threading.Lock(), []

    def body(rank):
        with lock:
            time.sleep(1)
            order.append(rank)
        dist.barrier()

    SimWorld(3).run(with_group(body))
    assert sorted(order) == [0, 1, 2]


def test_a_reentrant_lock_can_be_taken_twice():
    lock = threading.RLock()

    def body(rank):
        with lock, lock:
            time.sleep(1)
        return True

    assert SimWorld(2).run(with_group(body)) == [True, True]


def test_a_queue_carries_items_between_ranks():
    items = queue.Queue()

    def body(rank):
        if rank == 0:
            time.sleep(3)
            for number in range(3):
                items.put(number)
            return None
        return items.get()

    assert sorted(SimWorld(4).run(with_group(body))[1:]) == [0, 1, 2]


def test_a_queue_nobody_fills_is_a_deadlock():
    items = queue.Queue()

    def body(rank):
        if rank == 1:
            items.get()
        dist.barrier()

    with pytest.raises(DeadlockError, match="waits in Queue.get") as caught:
        SimWorld(3).run(with_group(body))
    assert culprits(caught) == [1]


def test_an_event_nobody_sets_is_a_deadlock():
    event = threading.Event()

    def body(rank):
        if rank == 2:
            event.wait()
        dist.barrier()

    with pytest.raises(DeadlockError, match="waits in Event.wait") as caught:
        SimWorld(4).run(with_group(body))
    assert culprits(caught) == [2]


def test_waits_with_a_timeout_end_in_virtual_time():
    event, items, lock = threading.Event(), queue.Queue(), threading.Lock()

    def body(rank):
        start = time.time()
        found = [event.wait(100)]
        with pytest.raises(queue.Empty):
            items.get(timeout=100)
        lock.acquire(blocking=False)
        found.append(lock.acquire(timeout=100))
        return [*found, round(time.time() - start)]

    assert SimWorld(2).run(with_group(body))[0] == [False, False, 300]


def test_a_condition_and_a_barrier_of_threading_work_between_ranks():
    condition, barrier, ready = threading.Condition(), threading.Barrier(3), []

    def body(rank):
        if rank == 0:
            with condition:
                condition.wait_for(lambda: len(ready) == 2)
        else:
            time.sleep(rank)
            with condition:
                ready.append(rank)
                condition.notify_all()
        barrier.wait()
        return len(ready)

    assert SimWorld(3).run(with_group(body)) == [2, 2, 2]


def test_a_thread_of_a_rank_sees_the_rank_and_may_call_collectives():
    def body(rank):
        found = []

        def work():
            tensor = torch.tensor([float(dist.get_rank())])
            dist.all_reduce(tensor)
            found.append((dist.get_rank(), os.environ["RANK"], tensor.item()))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found

    assert SimWorld(3).run(with_group(body)) == [[(r, str(r), 3.0)] for r in range(3)]


def test_collectives_of_two_threads_on_two_groups_do_not_mix():
    def body(rank):
        groups = [dist.new_group([0, 1, 2]) for _ in range(2)]
        sums = {}

        def work(index):
            for step in range(5):
                tensor = torch.tensor([float(rank * (index + 1) + step)])
                dist.all_reduce(tensor, group=groups[index])
                sums.setdefault(index, []).append(tensor.item())

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sums

    expected = {0: [3.0 + 3 * s for s in range(5)], 1: [6.0 + 3 * s for s in range(5)]}
    for seed in range(5):
        assert SimWorld(3, seed=seed, schedule="random").run(with_group(body)) == [expected] * 3


def test_a_functional_collective_works_on_a_thread_of_a_rank():
    import torch.distributed._functional_collectives as functional

    def body(rank):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: functional.all_reduce(torch.ones(1), "sum", dist.group.WORLD).item()).result()

    assert SimWorld(2).run(with_group(body)) == [2.0, 2.0]


def test_a_group_cannot_be_used_from_another_rank():
    groups = {}

    def body(rank):
        groups[rank] = dist.group.WORLD
        dist.barrier()
        if rank == 1:
            dist.all_reduce(torch.ones(1), group=groups[0])
        dist.barrier()

    with pytest.raises(RankFailedError) as caught:
        SimWorld(2).run(with_group(body))
    assert culprits(caught) == [1]


def test_an_executor_that_nobody_shut_down_does_not_keep_the_run():
    def body(rank):
        pool = concurrent.futures.ThreadPoolExecutor(2)
        return pool.submit(dist.get_rank).result()

    assert SimWorld(2).run(with_group(body)) == [0, 1]


def test_a_daemon_thread_does_not_keep_the_run():
    def body(rank):
        def beat():
            while True:
                time.sleep(1)

        threading.Thread(target=beat, daemon=True).start()
        time.sleep(10)
        return rank

    assert SimWorld(2).run(with_group(body)) == [0, 1]


def test_a_heartbeat_thread_does_not_hide_a_deadlock():
    def body(rank):
        def beat():
            while True:
                time.sleep(1)

        threading.Thread(target=beat, daemon=True).start()
        if rank:
            dist.barrier()

    with pytest.raises(DeadlockError):
        SimWorld(3).run(with_group(body))


def test_other_threads_are_waited_for_at_the_end_of_a_rank():
    done = []

    def body(rank):
        def late():
            time.sleep(5)
            done.append(rank)

        threading.Thread(target=late).start()

    SimWorld(2).run(with_group(body))
    assert sorted(done) == [0, 1]


def test_a_collective_as_an_exit_function_is_shown_where_it_was_registered():
    def body(rank):
        if rank == 0:
            atexit.register(dist.barrier)

    def run():
        dist.init_process_group("gloo")
        body(dist.get_rank())

    with pytest.raises(DeadlockError) as caught:
        SimWorld(2).run(run)
    row = next(row for row in caught.value.report.rows if 0 in row.ranks)
    assert row.place.source == "atexit.register(dist.barrier)"


def test_an_import_that_another_rank_executes_is_shown_as_such(tmp_path, monkeypatch):
    (tmp_path / "meets_when_imported.py").write_text("import torch.distributed as dist\ndist.barrier()\n")
    monkeypatch.syspath_prepend(tmp_path)

    def run():
        dist.init_process_group("gloo")
        import meets_when_imported  # noqa: F401

    with pytest.raises(
        DeadlockError, match="waits in import of meets_when_imported, which rank 2 is executing"
    ) as caught:
        SimWorld(3).run(run)
    assert culprits(caught) == [2]
    row = next(row for row in caught.value.report.rows if 0 in row.ranks)
    assert row.place.source.startswith("import meets_when_imported")


def test_atexit_functions_run_at_the_end_of_their_rank():
    order = []

    def body(rank):
        atexit.register(order.append, (rank, "first"))
        atexit.register(order.append, (rank, "last"))
        removed = atexit.register(print, "never")
        atexit.unregister(removed)

    SimWorld(1).run(with_group(body))
    assert order == [(0, "last"), (0, "first")]


def test_a_rank_may_set_a_signal_handler_for_itself():
    before = signal.getsignal(signal.SIGTERM)

    def body(rank):
        signal.signal(signal.SIGTERM, lambda *_: None)
        return signal.signal(signal.SIGTERM, signal.SIG_IGN).__name__

    assert SimWorld(2).run(with_group(body)) == ["<lambda>", "<lambda>"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_event_loop_runs_in_virtual_time():
    async def both():
        await asyncio.gather(asyncio.sleep(30), asyncio.sleep(60))
        return True

    def body(rank):
        start = time.time()
        asyncio.run(both())
        return round(time.time() - start)

    start = time.clock_gettime(time.CLOCK_MONOTONIC)
    assert SimWorld(2).run(with_group(body)) == [60, 60]
    assert time.clock_gettime(time.CLOCK_MONOTONIC) - start < 30


def test_a_rank_that_blocks_on_something_real_is_named(capfd):
    reader, writer = os.pipe()

    def body(rank):
        if rank == 1:
            os.read(reader, 1)  # nobody writes
        dist.barrier()

    try:
        with pytest.raises(BlockedOutsideError, match="blocked outside the simulator") as caught:
            SimWorld(3, stall_after=0.2, stall_limit=0.6).run(with_group(body))
        (culprit,) = caught.value.report.culprits
        assert (culprit.rank, culprit.place.source) == (1, "os.read(reader, 1)  # nobody writes")
        assert "rank 1 has been blocked outside the simulator for" in capfd.readouterr().err
    finally:
        os.close(writer)
        os.close(reader)


def test_a_rank_that_computes_for_long_is_not_called_blocked(capfd):
    def body(rank):
        end = time.clock_gettime(time.CLOCK_MONOTONIC) + 0.5
        while time.clock_gettime(time.CLOCK_MONOTONIC) < end:
            pass

    SimWorld(1, stall_after=2.0).run(with_group(body))
    assert "blocked" not in capfd.readouterr().err


def double(number):
    return 2 * number


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index * 10


def test_a_data_loader_with_workers_works_on_every_rank():
    def body(rank):
        loader = torch.utils.data.DataLoader(Numbers(), batch_size=2, num_workers=1, multiprocessing_context="fork")
        return [batch.tolist() for batch in loader]

    assert SimWorld(2).run(with_group(body)) == [[[0, 10], [20, 30], [40, 50], [60, 70]]] * 2


def test_a_pipe_to_a_thread_of_the_same_rank_works():
    def body(rank):
        import multiprocessing

        near, far = multiprocessing.Pipe()
        threading.Thread(target=lambda: far.send(rank)).start()
        return near.recv()

    assert SimWorld(2).run(with_group(body)) == [0, 1]


def test_a_server_thread_and_its_client_work_in_one_rank():
    import http.server
    import urllib.request

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"reward 1.0")

        def log_message(self, *args):
            pass

    def body(rank):
        if rank == 0:
            server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}", timeout=10) as reply:
                    return reply.read()
            finally:
                server.shutdown()
                server.server_close()
        return None

    assert SimWorld(2).run(with_group(body))[0] == b"reward 1.0"


def test_file_locks_between_ranks_are_waited_for(tmp_path):
    import fcntl

    order = []

    def body(rank):
        with (tmp_path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            time.sleep(1)
            order.append(rank)
            fcntl.flock(file, fcntl.LOCK_UN)

    SimWorld(3).run(with_group(body))
    assert sorted(order) == [0, 1, 2]


def test_operations_use_one_thread_in_a_rank():
    before = torch.get_num_threads()
    assert SimWorld(2).run(torch.get_num_threads) == [1, 1]
    assert torch.get_num_threads() == before


def test_a_pool_of_processes_works_in_a_rank():
    def body(rank):
        import multiprocessing

        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(double, rank + 1).result()

    assert SimWorld(2).run(with_group(body)) == [2, 4]


def test_exiting_the_process_ends_the_rank_alone():
    def body(rank):
        if rank == 1:
            os._exit(0)
        return rank

    world = SimWorld(3)
    assert world.run(lambda: os._exit(0) if os.environ["RANK"] == "1" else "fine") == ["fine", None, "fine"]
    with pytest.raises(RankFailedError, match="SystemExit: 7"):
        world.run(lambda: os._exit(7) if os.environ["RANK"] == "1" else "fine")


def environment():
    return [os.environ.get("RANK"), len(os.sched_getaffinity(0))]


REPORT = """
import json, os
with open(file, "w") as answer:
    json.dump([os.environ.get("RANK"), len(os.sched_getaffinity(0))], answer)
"""


def test_a_spawned_and_a_forked_process_inherit_the_rank(tmp_path):
    script = tmp_path / "report.py"  # not a function of this module: a spawned process would import torch for it
    script.write_text(REPORT)

    def spawned(rank):
        file = tmp_path / str(rank)
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=runpy.run_path, args=(str(script), {"file": str(file)}))
        process.start()
        process.join()
        return json.loads(file.read_text())

    def forked():
        fork = multiprocessing.get_context("fork")
        answers = fork.SimpleQueue()
        process = fork.Process(target=lambda: answers.put(environment()))
        process.start()
        found = answers.get()
        process.join()
        return found

    cores = len(os.sched_getaffinity(0))
    found = SimWorld(2).run(with_group(lambda rank: (spawned(rank), forked(), environment())))
    assert found == [([str(rank), cores],) * 3 for rank in range(2)]
