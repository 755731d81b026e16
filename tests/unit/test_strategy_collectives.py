"""K12: what strategies reduce and gather, over ranks that hold dicts, tensors and numbers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import results_and_collectives

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.strategy.utils.collectives import OPS, all_gather, all_reduce

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def on_ranks(size, body, **options):
    """Run ``body(rank)`` on ``size`` ranks that have a group; the results by rank, and the names of the collectives."""
    return results_and_collectives(size, lambda: body(dist.get_rank()), **options)


def refused_everywhere(size, body):
    """What each of ``size`` ranks is told by the ConfigError that ``body(rank)`` raises."""

    def main(rank):
        with pytest.raises(ConfigError) as caught:
            body(rank)
        return str(caught.value)

    return on_ranks(size, main)[0]


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


# -- how many collectives ---------------------------------------------------------------------------------------------


def test_k12_thirty_metrics_are_one_collective():
    def body(rank):
        return all_reduce({f"metric{i}": float(rank + i) for i in range(30)})

    results, collectives = on_ranks(4, body)
    assert results == [{f"metric{i}": 1.5 + i for i in range(30)}] * 4
    assert collectives == ["all_reduce"]


@pytest.mark.parametrize("op", OPS)
def test_k12_values_of_several_dtypes_are_one_collective_while_they_are_few(op):
    def body(rank):
        return all_reduce({"a": 0.5, "b": 3, "c": torch.ones(4, dtype=torch.bfloat16), "d": torch.tensor(True)}, op)

    assert on_ranks(2, body)[1] == ["all_reduce"]


@pytest.mark.parametrize("op", OPS)
def test_k12_large_values_are_one_collective_per_dtype_and_one_for_agreement(op):
    def body(rank):
        tensors = {f"{dtype}{i}": torch.full((300,), rank, dtype=dtype) for dtype in FLOATS for i in range(3)}
        return all_reduce({**tensors, "count": 7, "ids": torch.full((300,), rank)}, op)

    results, collectives = on_ranks(3, body)
    assert collectives == ["all_reduce"] * (1 + len(["float64", "float32", "int64"]))  # half travels as float32
    expected = {"mean": 1, "sum": 3, "max": 2, "min": 0}[op]
    assert all(result["torch.float161"].tolist() == [expected] * 300 for result in results)
    assert all(result["ids"].tolist() == [expected] * 300 for result in results)


@pytest.mark.parametrize("op", OPS)
def test_k12_more_metrics_than_a_packet_holds_are_two_collectives(op):
    results, collectives = on_ranks(2, lambda rank: all_reduce({str(i): i + 0.5 + rank for i in range(200)}, op))
    shift = {"mean": 0.5, "max": 1, "min": 0}
    expected = {str(i): 2 * i + 2.0 if op == "sum" else i + 0.5 + shift[op] for i in range(200)}
    assert results == [expected] * 2
    assert collectives == ["all_reduce"] * 2


def test_k12_alone_nothing_is_sent_and_no_group_is_needed():
    assert all_reduce({"loss": 2, "n": {"x": True}}) == {"loss": 2.0, "n": {"x": 1.0}}
    assert all_gather({"loss": 0.5})["loss"].tolist() == [0.5]
    assert on_ranks(1, lambda rank: (all_reduce(1.0), all_gather(1.0)))[1] == []


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("mean", {1: (0.0, 0.5, 0.0), 2: (0.5, 1.0, 0.5), 3: (1.0, 1.5, 2 / 3)}),
        ("sum", {1: (0, 0.5, 0), 2: (1, 2.0, 1), 3: (3, 4.5, 2)}),
        ("max", {1: (0, 0.5, False), 2: (1, 1.5, True), 3: (2, 2.5, True)}),
        ("min", {1: (0, 0.5, False), 2: (0, 0.5, False), 3: (0, 0.5, False)}),
    ],
)
def test_k12_python_numbers_come_back_as_python_numbers(size, op, expected):
    results, _ = on_ranks(size, lambda rank: tuple(all_reduce(v, op) for v in (rank, rank + 0.5, rank > 0)))
    for result in results:
        assert result == pytest.approx(expected[size])
        assert list(map(type, result)) == list(map(type, expected[size]))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("count", [1, 200])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool, torch.complex64], ids=str)
def test_k12_tensors_keep_shape_and_dtype_and_the_mean_of_integers_is_a_float(dtype, count, size):
    ops = ("mean", "sum") if dtype.is_complex else OPS

    def body(rank):
        value = torch.full((count, 1, 2), rank).to(dtype)
        results = {op: all_reduce(value, op) for op in ops}
        assert same(value, torch.full((count, 1, 2), rank).to(dtype))
        return results

    total, most = (0, 0) if size == 1 else (2, 1) if dtype == torch.bool else (3, 2)
    real = dtype if dtype.is_floating_point or dtype.is_complex else torch.float32
    expected = {
        "mean": torch.full((count, 1, 2), total / size).to(real),
        "sum": torch.full((count, 1, 2), total).to(torch.int64 if dtype == torch.bool else dtype),
        "max": torch.full((count, 1, 2), most).to(dtype),
        "min": torch.zeros(count, 1, 2).to(dtype),
    }
    for result in on_ranks(size, body)[0]:
        for op in ops:
            assert same(result[op], expected[op]), op


@pytest.mark.parametrize("size", [1, 2])
def test_k12_a_tensor_without_dimensions_stays_one_and_an_empty_one_stays_empty(size):
    results, _ = on_ranks(size, lambda rank: all_reduce({"loss": torch.tensor(2.0), "none": torch.empty(0, 3)}))
    for result in results:
        assert same(result["loss"], torch.tensor(2.0))
        assert same(result["none"], torch.empty(0, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [4, 400])
def test_k12_the_mean_of_half_precision_is_computed_in_float32(dtype, count):
    # The sum overflows float16, and in bfloat16 256 + 1 is 256.
    values = {torch.float16: [60000.0, 60000.0], torch.bfloat16: [256.0, 1.0, 1.0, 1.0, 1.0]}[dtype]
    results, _ = on_ranks(len(values), lambda rank: all_reduce(torch.full((count,), values[rank], dtype=dtype)))
    assert all(same(r, torch.full((count,), sum(values) / len(values)).to(dtype)) for r in results)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("count", [3, 300])
def test_k12_the_input_is_not_modified_and_the_result_is_another_tensor(size, count):
    def body(rank):
        leaf = torch.ones(count, requires_grad=True)
        data = {"x": leaf, "y": {"z": torch.full((count,), 2.0)[::1]}, "n": 1}
        before = [leaf._version, data["y"]["z"]._version]
        result = all_reduce(data, "sum")
        gathered = all_gather(data)
        assert [leaf._version, data["y"]["z"]._version] == before
        assert data["x"] is leaf
        assert leaf.requires_grad
        for output in (result["x"], gathered["x"]):
            assert not output.requires_grad
            output.zero_()
        result["y"]["z"].zero_()
        gathered["y"]["z"].zero_()
        assert leaf.tolist() == [1.0] * count
        assert data["y"]["z"].tolist() == [2.0] * count
        assert data["n"] == 1

    on_ranks(size, body)


@pytest.mark.parametrize("call", [partial(all_reduce, op="sum"), all_gather], ids=["reduce", "gather"])
def test_k12_a_result_that_is_kept_keeps_no_other_one_in_memory(call):
    results, _ = on_ranks(2, lambda rank: call({str(n): torch.ones(n, dtype=torch.float64) for n in (1, 2, 500, 600)}))
    for result in results:
        assert [value.untyped_storage().nbytes() for value in result.values()] == [v.nbytes for v in result.values()]


def test_k12_tensors_that_are_not_contiguous_are_reduced_and_gathered_as_they_read():
    def body(rank):
        value = torch.arange(6.0).reshape(2, 3).t() + rank
        return all_reduce(value, "sum"), all_gather(value)

    for reduced, gathered in on_ranks(2, body)[0]:
        first = torch.arange(6.0).reshape(2, 3).t()
        assert torch.equal(reduced, 2 * first + 1)
        assert torch.equal(gathered, torch.cat([first, first + 1]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize("owner", [0, 1, 2])
def test_k12_a_nan_of_one_rank_reaches_all(op, count, owner):
    def body(rank):
        value = math.nan if rank == owner else math.inf if op == "max" else -math.inf
        reduced = all_reduce({"x": torch.full((count,), value), "y": value, "z": torch.full((count,), 1.0)}, op)
        return reduced["x"].isnan().all().item(), math.isnan(reduced["y"]), reduced["z"].isnan().any().item()

    assert on_ranks(3, body, profile="gloo")[0] == [(True, True, False)] * 3


@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("count", [1, 300])
def test_k12_infinities_are_ordered_as_numbers_are(op, count):
    def body(rank):
        return all_reduce(torch.tensor([math.inf, -math.inf, 0.0] * count).roll(rank), op)

    largest = {"max": [math.inf, math.inf, 0.0], "min": [0.0, -math.inf, -math.inf]}[op]
    assert on_ranks(2, body)[0][0].tolist() == largest * count


@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_k12_integers_beyond_float64_stay_exact(op):
    def body(rank):
        odd = (1 << 60) + 1 + 2 * rank
        return all_reduce({"x": odd, "y": torch.tensor([odd, -odd]), "z": 3, "w": 0.5}, op)

    results, collectives = on_ranks(2, body)
    first, second = (1 << 60) + 1, (1 << 60) + 3
    fold = {"sum": sum, "max": max, "min": min}[op]
    for result in results:
        assert result["x"] == fold([first, second])
        assert result["y"].tolist() == [fold([first, second]), fold([-first, -second])]
        assert (result["z"], result["w"]) == ((6, 1.0) if op == "sum" else (3, 0.5))
    assert collectives == ["all_reduce"] * 2


def test_k12_a_large_integer_on_one_rank_only_takes_all_ranks_along():
    results, collectives = on_ranks(3, lambda rank: all_reduce({"x": (1 << 62) - 1 if rank == 2 else -1}, "sum"))
    assert results == [{"x": (1 << 62) - 3}] * 3
    assert collectives == ["all_reduce"] * 2


def test_k12_small_integers_wrap_around_as_their_dtype_does():
    results, _ = on_ranks(2, lambda rank: all_reduce(torch.tensor([200], dtype=torch.uint8), "sum"))
    assert results[0].tolist() == [(200 + 200) % 256]


def test_k12_a_mean_takes_an_int_on_one_rank_and_a_float_on_another():
    assert on_ranks(2, lambda rank: all_reduce({"kl": 0 if rank else 0.5}))[0] == [{"kl": 0.25}] * 2


def test_k12_a_group_reduces_among_its_members_only():
    def body(rank):
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        return all_reduce(rank, "sum", group=groups[rank % 2]), all_gather(rank, group=groups[rank % 2]).tolist()

    assert on_ranks(4, body)[0] == [(2, [0, 2]), (4, [1, 3]), (2, [0, 2]), (4, [1, 3])]


def test_k12_numbers_of_numpy_count_as_those_of_python():
    result = all_reduce({"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)}, "max")
    assert result == {"a": 0.5, "b": 3, "c": True}
    assert [type(value) for value in result.values()] == [float, int, bool]


def test_k12_who_is_not_in_the_group_is_told():
    def body(rank):
        group = dist.new_group([0])
        if rank == 0:
            return all_reduce(5, group=group)
        with pytest.raises(ConfigError, match="rank 1 is not in the group"):
            all_reduce(5, group=group)
        return None

    assert on_ranks(2, body)[0] == [5.0, None]


def test_k12_on_nccl_values_of_the_host_travel_on_the_device():
    def main():
        dist.init_process_group("nccl")
        rank = dist.get_rank()
        device = torch.device("cuda", rank)
        value = torch.tensor([1.0 + rank])
        result = all_reduce({"x": value, "n": rank}, "max", device=device), all_gather(value, device=device)
        dist.destroy_process_group()
        return result

    for reduced, gathered in SimWorld(2, cuda=True, stall_limit=15).run(main):
        assert (reduced["x"].tolist(), reduced["n"]) == ([2.0], 1)
        assert gathered.tolist() == [1.0, 2.0]


# -- hypothesis: any dict, against what each value says alone ---------------------------------------------------------

KINDS = ["int", "float", "bool", *FLOATS, *INTEGERS, torch.bool]
SHAPES = [(), (0,), (1,), (3, 2), (130,)]


def value_of(kind, shape, seed, rank):
    """The value that ``rank`` holds: a function of its arguments, so that the expectation can be computed anew."""
    numbers = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed * 31 + rank))
    if isinstance(kind, str):
        number = int(torch.randint(-100, 100, (), generator=torch.Generator().manual_seed(seed * 31 + rank)))
        return {"int": number, "float": number / 8, "bool": number > 0}[kind]
    return (numbers / 8 if kind.is_floating_point else numbers > 0 if kind == torch.bool else numbers).to(kind)


@st.composite
def layouts(draw, depth=2):
    """Nested dicts whose leaves are (kind, shape, seed)."""
    leaf = st.tuples(st.sampled_from(KINDS), st.sampled_from(SHAPES), st.integers(0, 999))
    inner = leaf if depth == 0 else st.one_of(leaf, layouts(depth - 1))
    keys = st.one_of(st.text("ab/ é", min_size=1, max_size=3), st.integers(0, 3))
    return draw(st.dictionaries(keys, inner, max_size=5))


def filled(layout, rank, *, backwards=False):
    if not isinstance(layout, dict):
        return value_of(*layout, rank)
    items = list(layout.items())
    return {key: filled(inner, rank, backwards=backwards) for key, inner in (items[::-1] if backwards else items)}


def check(layout, result, expect):
    """Compare every value of ``result`` with what ``expect`` makes of its leaf in ``layout``."""
    if isinstance(layout, dict):
        assert set(layout) == set(result)
        for key, inner in layout.items():
            check(inner, result[key], expect)
        return
    expected = expect(*layout)
    assert type(result) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    assert torch.equal(torch.as_tensor(result), torch.as_tensor(expected)), (layout, result, expected)


def reduced_alone(op, size):
    """The expectation: eighths of small integers add exactly in float64, so that no tolerance is needed."""

    def expect(kind, shape, seed):
        values = [value_of(kind, shape, seed, rank) for rank in range(size)]
        if isinstance(kind, str):
            return {"mean": lambda v: sum(v) / size, "sum": sum, "max": max, "min": min}[op](values)
        stacked = torch.stack(values)
        wide = stacked.double() if kind.is_floating_point else stacked.to(torch.int64)
        if op == "mean":
            return (wide.sum(0).double() / size).to(kind if kind.is_floating_point else torch.float32)
        if op == "sum":
            return wide.sum(0).to(torch.int64 if kind == torch.bool else kind)
        return (wide.amax(0) if op == "max" else wide.amin(0)).to(kind)

    return expect


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(layouts(), st.sampled_from([1, 2, 4]), st.sampled_from(OPS), st.integers(0, 9))
def test_k12_any_dict_is_reduced_as_each_of_its_values_alone(layout, size, op, seed):
    def body(rank):
        return all_reduce(filled(layout, rank, backwards=rank % 2 == 1), op)

    results, collectives = on_ranks(size, body, schedule="random", seed=seed)
    for result in results:
        check(layout, result, reduced_alone(op, size))
    assert len(collectives) <= (0 if size == 1 else 4)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(layouts(), st.sampled_from([1, 2, 3]), st.integers(0, 9))
def test_any_dict_is_gathered_as_each_of_its_values_alone(layout, size, seed):
    def expect(kind, shape, leaf_seed):
        values = [torch.as_tensor(value_of(kind, shape, leaf_seed, rank)) for rank in range(size)]
        if kind == "float":
            values = [value.double() for value in values]
        return torch.cat([value if value.dim() else value.reshape(1) for value in values])

    def body(rank):
        return all_gather(filled(layout, rank, backwards=rank % 2 == 1))

    def leaves(inner):
        return sum(map(leaves, inner.values())) if isinstance(inner, dict) else 1

    results, collectives = on_ranks(size, body, schedule="random", seed=seed)
    for result in results:
        check(layout, result, expect)
    assert len(collectives) <= (0 if size == 1 else 2 if leaves(layout) <= 30 else 3)


# -- gathering --------------------------------------------------------------------------------------------------------


def test_gathering_goes_in_rank_order_and_takes_uneven_first_dimensions():
    def body(rank):
        return all_gather({"x": torch.full((rank, 2), float(rank)), "y": torch.full((3 - rank,), rank > 0), "n": rank})

    for result in on_ranks(3, body)[0]:
        assert result["x"].tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
        assert result["y"].tolist() == [False] * 3 + [True] * 3
        assert result["n"].tolist() == [0, 1, 2]


def test_gathering_stacks_what_has_no_dimension():
    for loss, number in on_ranks(3, lambda rank: (all_gather(torch.tensor(rank * 0.5)), all_gather(rank * 0.1)))[0]:
        assert same(loss, torch.tensor([0.0, 0.5, 1.0]))
        assert same(number, torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64))


def test_gathering_takes_more_values_than_fit_into_a_header():
    def body(rank):
        return all_gather({f"{i:02}": torch.full((i % (rank + 2),), float(i)) for i in range(70)})

    results, collectives = on_ranks(2, body)
    for result in results:
        assert {key: value.tolist() for key, value in result.items()} == {
            f"{i:02}": [float(i)] * (i % 2 + i % 3) for i in range(70)
        }
    assert collectives == ["all_gather"] * 3


# -- disagreement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [all_reduce, all_gather], ids=["reduce", "gather"])
def test_k12_different_keys_are_an_error_on_every_rank_that_names_them(call):
    def body(rank):
        call({"loss": 1.0, "actor": {"kl" if rank != 1 else "entropy": 1.0}})

    said = refused_everywhere(3, body)
    assert len(set(said)) == 1
    assert "rank 1 lacks actor/kl and has actor/entropy in addition" in said[0]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("holder", range(4))
def test_k12_whoever_differs_all_ranks_are_told(op, holder):
    said = refused_everywhere(4, lambda rank: all_reduce({"a": 1.0} if rank != holder else {"a": 1.0, "b": 2}, op))
    assert said == [said[0]] * 4
    assert f"rank {holder} has b in addition" in said[0]


def test_k12_a_rank_without_any_metric_is_told_too():
    said = refused_everywhere(2, lambda rank: all_reduce({} if rank else {"loss": 1.0, "kl": 0.1}))
    assert "loss" in said[0]
    assert "kl" in said[1]


def test_k12_other_shapes_dtypes_and_types_are_named():
    def body(rank):
        odd = rank == 2
        data = {"x": torch.ones(300 if odd else 200), "y": torch.ones(1, dtype=torch.float64 if odd else torch.float32)}
        all_reduce({**data, "n": 1.0 if odd else 1}, "max")

    said = refused_everywhere(3, body)[0]
    assert "rank 2 holds a Python float for n where the others hold a Python int" in said
    assert "a float32 tensor of shape (300) for x where the others hold a float32 tensor of shape (200)" in said
    assert "a float64 tensor of shape (1) for y" in said


def test_gathering_names_other_trailing_shapes():
    said = refused_everywhere(3, lambda rank: all_gather({"x": torch.ones(rank, 3 if rank == 1 else 2)}))[0]
    assert "rank 1 holds a float32 tensor of shape (any, 3) for x" in said


@pytest.mark.parametrize("call", [all_reduce, all_gather], ids=["reduce", "gather"])
def test_k12_a_value_of_another_type_on_one_rank_reaches_all_ranks(call):
    said = refused_everywhere(3, lambda rank: call({"kl": None if rank == 0 else 0.5, "loss": 1.0}))
    assert said == [said[0]] * 3
    assert "rank 0 holds a NoneType: expected a tensor, a number, or a dict of these for kl" in said[0]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("call", [all_reduce, all_gather], ids=["reduce", "gather"])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("0.5", "a/b is a str: expected a tensor, a number, or a dict"),
        ([0.5], "a/b is a list: expected"),
        (1 << 70, "a/b is an integer of more than 64 bits: give a float"),
    ],
)
def test_k12_a_value_of_another_type_is_named(size, call, value, problem):
    assert all(problem in said for said in refused_everywhere(size, lambda rank: call({"a": {"b": value}})))


@pytest.mark.parametrize("size", [1, 2])
def test_k12_what_has_no_order_or_no_sum_is_refused(size):
    complex_number = torch.ones(1, dtype=torch.complex64)
    for op in ("max", "min"):
        assert "complex" in refused_everywhere(size, lambda rank, op=op: all_reduce(complex_number, op))[0]
    unsigned = torch.ones(1, dtype=torch.uint64)
    assert "uint64" in refused_everywhere(size, lambda rank: all_reduce(unsigned))[0]


def test_k08_an_unknown_op_is_an_error_that_names_the_allowed_ones():
    with pytest.raises(ConfigError, match="op='avg' is unknown: expected one of mean, max, min, sum"):
        all_reduce(1.0, "avg")


def test_k12_an_error_in_one_call_leaves_the_group_usable():
    def body(rank):
        with pytest.raises(ConfigError):
            all_reduce({rank: 1.0})
        return all_reduce(rank, "sum")

    assert on_ranks(3, body)[0] == [3] * 3


@pytest.mark.parametrize(("one", "other"), [("mean", "sum"), ("max", "min")])
def test_k12_different_ops_are_an_error_on_every_rank(one, other):
    said = refused_everywhere(2, lambda rank: all_reduce(1.0, one if rank else other))
    assert said[0] == said[1]
    assert f"rank 1 holds {one} for the operation where the others hold {other}" in said[0]
