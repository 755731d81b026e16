"""Weights on their way to an engine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.errors import ConfigError, EngineStateError, StaleWeightsError, WeightSyncError
from lightrft.strategy.engine import EngineStatus, RolloutEngine, StatefulEngine
from lightrft.strategy.utils.fingerprints import fingerprint
from lightrft.strategy.weight_sync import in_buckets, send


class Holder(StatefulEngine):
    """Holds what it is sent; ``reads`` says how."""

    def __init__(self, reads=None):
        super().__init__("the holder")
        self.held, self.resets, self.calls = {}, 0, 0
        self._reads = reads or (lambda buckets: [self._put(bucket) for bucket in buckets])

    def _put(self, bucket):
        self.calls += 1
        self.held.update({name: tensor.clone() for name, tensor in bucket})

    def _load(self, buckets):
        self._reads(buckets)

    def _reset_caches(self):
        self.resets += 1

    def fingerprints(self):
        return {name: fingerprint(tensor) for name, tensor in self.held.items()}

    _generate = _sleep = _wake_up = _shutdown = lambda *_: None


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
tensors = st.builds(
    lambda shape, dtype: torch.arange(torch.Size(shape).numel()).to(dtype).view(shape),
    st.lists(st.integers(0, 7), max_size=3),
    st.sampled_from(DTYPES),
)  # fmt: skip


@given(st.lists(tensors, max_size=12), st.integers(1, 600), st.booleans(), st.sampled_from([None, torch.bfloat16]))
def test_f07_buckets_hold_everything_once_in_order_and_within_the_limit(weights, limit, poison, dtype):
    named = [(f"w{index}", tensor) for index, tensor in enumerate(weights)]
    kept, found = [tensor.clone() for tensor in weights], []
    copies = [] if poison else None
    for bucket in in_buckets(iter(named), limit, dtype=dtype, copies=copies):
        size = sum(tensor.numel() * tensor.itemsize for _, tensor in bucket)
        assert len(bucket) == 1 or size <= limit
        found += [(name, tensor.clone()) for name, tensor in bucket]
    assert [name for name, _ in found] == [name for name, _ in named]
    for (_, got), given_ in zip(found, kept, strict=True):
        wanted = given_.to(dtype) if dtype and given_.dtype is torch.float32 and given_.dim() > 1 else given_
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(got, wanted)
    for tensor, before in zip(weights, kept, strict=True):
        assert torch.equal(tensor, before)


def test_f07_as_few_buckets_as_fit():
    weights = [(f"w{index}", torch.zeros(100)) for index in range(10)]
    assert [len(bucket) for bucket in map(list, in_buckets(weights, 1200))] == [3, 3, 3, 1]
    with pytest.raises(ConfigError, match="a bucket of 0 bytes"):
        next(in_buckets(weights, 0))


def test_k09_no_more_than_a_bucket_and_one_tensor_exist_at_a_time():
    alive, most = 0, 0

    class Counted(torch.Tensor):
        pass

    def gathered():
        nonlocal alive, most
        for index in range(20):
            tensor = torch.zeros(100)
            alive += 400
            most = max(most, alive)
            weakref.finalize(tensor.untyped_storage(), lose)
            yield f"w{index}", tensor
            del tensor

    def lose():
        nonlocal alive
        alive -= 400

    import weakref

    engine = Holder(lambda buckets: [None for _ in buckets])
    send(engine, gathered(), bucket_bytes=1200)
    assert alive == 0
    assert most <= 1200 + 400


def test_f08_a_reader_that_keeps_a_bucket_reads_nothing_plausible(monkeypatch):
    weights = [(f"w{index}", torch.ones(4)) for index in range(4)]
    for variable, asked, poisoned in (("0", None, False), ("1", None, True), ("0", True, True), ("1", False, False)):
        kept = []
        monkeypatch.setenv("LIGHTRFT_POISON_BUCKETS", variable)
        holder = Holder(lambda buckets, kept=kept: [kept.extend(bucket) for bucket in buckets])
        send(holder, weights, bucket_bytes=32, poison=asked)
        assert [bool(tensor.isnan().all()) for _, tensor in kept] == [poisoned] * 4
    assert all(tensor.eq(1).all() for _, tensor in weights)


def test_an_update_counts_resets_and_verifies():
    engine = Holder()
    weights = {"a": torch.randn(3, 3), "b": torch.randn(1, 5, dtype=torch.float64)}
    first = send(engine, weights.items(), bucket_bytes=64, dtype=torch.float32, verify=True)
    assert (first.version, first.names, first.buckets, first.bytes) == (1, ["a", "b"], 1, 56)
    assert (engine.weight_version, engine.resets, engine.calls) == (1, 1, 1)
    assert engine.held["b"].dtype == torch.float32
    assert send(engine, weights.items(), bucket_bytes=8).buckets == 2
    assert (engine.weight_version, engine.resets) == (2, 2)


def test_only_matrices_wider_than_the_engines_weights_are_rounded_on_the_way():
    weights = {
        "matrix": torch.randn(3, 3), "vector": torch.randn(3),
        "narrow": torch.randn(3, 3).bfloat16(), "numbers": torch.ones(3, 3, dtype=torch.int64),
    }  # fmt: skip
    engine = Holder()
    for dtype, rounded in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (None, torch.float32)):
        sent = send(engine, weights.items(), bucket_bytes=64, dtype=dtype, verify=True)
        assert {name: one.dtype for name, one in engine.held.items()} == {
            "matrix": rounded, "vector": torch.float32, "narrow": torch.bfloat16, "numbers": torch.int64
        }  # fmt: skip
        assert sent.bytes == sum(one.nbytes for one in engine.held.values())


def test_f06_verify_names_what_arrived_otherwise():
    def wrong(buckets):
        for bucket in buckets:
            engine.held.update({name: tensor.clone() for name, tensor in bucket if name != "b"})

    engine = Holder(wrong)
    with pytest.raises(WeightSyncError, match="holds other weights than were sent: b$"):
        send(engine, [("a", torch.ones(2)), ("b", torch.ones(2))], bucket_bytes=8, verify=True)
    assert engine.status is EngineStatus.STALE
    with pytest.raises(StaleWeightsError, match="the holder holds other weights than were sent"):
        engine.generate([{"prompt_token_ids": [1]}], {})
    engine._reads = lambda buckets: [engine._put(bucket) for bucket in buckets]
    send(engine, [("a", torch.ones(2)), ("b", torch.ones(2))], bucket_bytes=8, verify=True)
    assert engine.status is EngineStatus.AWAKE


def test_f06_an_engine_without_states_that_holds_other_weights_ends():
    class Stateless(Holder):
        spoil = RolloutEngine.spoil

    engine = Stateless(list)
    with pytest.raises(WeightSyncError, match="holds other weights than were sent: a$"):
        send(engine, [("a", torch.ones(2))], bucket_bytes=8, verify=True)
    assert engine.status is EngineStatus.DEAD


def test_f06_a_name_that_comes_twice_is_an_error_that_leaves_the_engine_stale():
    engine = Holder()
    with pytest.raises(WeightSyncError, match="a was sent twice"):
        send(engine, [("a", torch.ones(2)), ("a", torch.ones(2))], bucket_bytes=8)
    assert engine.status is EngineStatus.STALE
    assert engine.weight_version == 0


@pytest.mark.parametrize(
    ("reads", "error", "message"),
    [
        (next, WeightSyncError, "the holder stopped reading before the last bucket"),
        (lambda buckets: next(buckets) and 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_f17_an_engine_that_stops_reading_is_stale_and_everything_is_gathered_nevertheless(reads, error, message):
    gathered = []

    def parameters():
        for index in range(6):
            gathered.append(index)
            yield f"w{index}", torch.ones(2)

    engine = Holder(reads)
    with pytest.raises(error, match=message):
        send(engine, parameters(), bucket_bytes=8)
    assert gathered == list(range(6))
    assert engine.status is EngineStatus.STALE


def test_f17_the_error_of_the_engine_is_told_although_the_source_fails_too():
    def failing():
        yield "w0", torch.ones(2)
        raise OSError("the disk is gone")

    engine = Holder()
    engine.state.sleep(1, lambda: None)
    with pytest.raises(EngineStateError, match="wake its weights up first"):
        send(engine, failing(), bucket_bytes=8)


def test_an_engine_that_cannot_tell_what_it_holds_is_not_verified():
    engine = Holder()
    engine.fingerprints = lambda: None
    with pytest.raises(ConfigError, match="Holder cannot tell which weights it holds"):
        send(engine, [], bucket_bytes=8, verify=True)


@given(tensors, st.data())
def test_a_fingerprint_depends_on_every_bit_shape_and_dtype(tensor, data):
    plain = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == plain
    assert fingerprint(tensor[None]) != plain
    if tensor.numel():
        place = data.draw(st.integers(0, tensor.numel() * tensor.itemsize - 1))
        other = tensor.clone()
        other.view(-1).view(torch.uint8)[place] ^= 1 << data.draw(st.integers(0, 7))
        assert fingerprint(other) != plain


def test_a_fingerprint_of_many_words_depends_on_their_order():
    tensor = torch.arange(5 * (1 << 15) + 3, dtype=torch.int64)
    plain = fingerprint(tensor)
    for first, second in [(0, 1 << 15), (5, 3 << 15), (1, 2), (0, tensor.numel() - 1)]:
        other = tensor.clone()
        other[first], other[second] = tensor[second], tensor[first]
        assert fingerprint(other) != plain
    assert fingerprint(tensor[1:]) == fingerprint(tensor[1:].clone())
