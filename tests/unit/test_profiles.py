"""What ``strict``, ``gloo`` and ``nccl`` accept. ``tests/processes/test_gloo_agrees.py`` asks the real gloo."""

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import all_gather_single, reduce_scatter_single

from lightrft.errors import CollectiveMismatchError, ConfigError, DeadlockError, RankFailedError, RefusedError
from lightrft.sim import SimWorld
from lightrft.sim.profiles import COMMON_DTYPES, PROFILES, profile_for

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
FNUZ = [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
NOBODYS = [torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.float8_e8m0fnu]


def outcome(body, *, backend="nccl", profile="strict", size=2):
    """``None`` if ``body()`` works on every rank, else the message of the refusal."""

    def main():
        dist.init_process_group(backend)
        body()
        dist.destroy_process_group()

    try:
        SimWorld(size, profile=profile).run(main)
    except RankFailedError as error:
        if isinstance(error.__cause__, RefusedError):
            return str(error.__cause__)
        raise
    return None


# A group that was made with a backend, in each profile.
EVERYWHERE = [
    ("strict", "gloo"),
    ("strict", "nccl"),
    ("strict", "cpu:gloo,cuda:nccl"),
    ("gloo", "nccl"),
    ("nccl", "gloo"),
]
STRICT = EVERYWHERE[:3]


def accepted(body, where=EVERYWHERE, size=2):
    """The places in ``where`` that accept ``body``."""
    return [place for place in where if outcome(body, profile=place[0], backend=place[1], size=size) is None]


def test_an_unknown_profile_is_refused():
    with pytest.raises(ConfigError, match="profile='mpi' is unknown: expected one of strict, gloo, nccl"):
        SimWorld(2, profile="mpi")


def test_a_profile_is_made_once_for_each_backend():
    assert profile_for("strict", "nccl") is profile_for("strict", "nccl")
    assert {profile_for(name, "undefined").name for name in PROFILES} == set(PROFILES)


def test_strict_accepts_no_more_than_the_backend_of_the_group():
    for real in ("gloo", "nccl"):
        strict, backend = profile_for("strict", real), profile_for(real, real)
        assert strict.dtypes <= backend.dtypes
        assert strict.reductions <= backend.reductions
        assert strict.uneven <= backend.uneven
        assert strict.only_here <= backend.only_here
        assert strict.strided <= backend.strided
        assert strict.copying >= backend.copying
        for operation in {*strict.dtypes_of, *backend.dtypes_of}:
            real_dtypes = backend.dtypes_of.get(operation, backend.dtypes)
            assert strict.dtypes_of.get(operation, strict.dtypes) <= real_dtypes


# -- dtypes -----------------------------------------------------------------------------------------------------------


def zeros(dtype, count=2):
    return torch.zeros(count * dtype.itemsize, dtype=torch.uint8).view(dtype)


def moving(dtype):
    def body():
        dist.broadcast(zeros(dtype), 0)
        all_gather_single(zeros(dtype, 4), zeros(dtype))
        dist.all_gather([zeros(dtype), zeros(dtype)], zeros(dtype))
        dist.all_to_all_single(zeros(dtype), zeros(dtype))

    return body


def reducing(dtype):
    def body():
        dist.all_reduce(zeros(dtype))
        reduce_scatter_single(zeros(dtype), zeros(dtype, 4))

    return body


@pytest.mark.parametrize("dtype", sorted(COMMON_DTYPES, key=str), ids=str)
def test_every_backend_takes_the_common_dtypes(dtype):
    assert accepted(moving(dtype)) == accepted(reducing(dtype)) == EVERYWHERE


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_eight_bit_floats_are_for_nccl(dtype):
    has_nccl = [EVERYWHERE[1], EVERYWHERE[2], EVERYWHERE[4]]
    assert accepted(moving(dtype)) == accepted(reducing(dtype)) == has_nccl
    assert outcome(moving(dtype), backend="gloo") == f"broadcast: {dtype} is not supported by gloo"


@pytest.mark.parametrize("dtype", FNUZ, ids=str)
def test_eight_bit_floats_of_the_other_kind_are_moved_but_not_reduced(dtype):
    assert accepted(moving(dtype), STRICT) == STRICT[1:]
    assert accepted(reducing(dtype), STRICT) == []


@pytest.mark.parametrize("dtype", NOBODYS, ids=str)
def test_dtypes_that_no_backend_has_are_refused(dtype):
    assert accepted(moving(dtype)) == accepted(reducing(dtype)) == []


def test_gloo_sends_every_dtype():
    def body():
        for dtype in [*NOBODYS, *FP8, torch.complex64]:
            tensor = torch.ones(2 * dtype.itemsize, dtype=torch.uint8).view(dtype)
            if dist.get_rank() == 0:
                dist.send(tensor, 1)
            else:
                received = torch.empty_like(tensor)
                dist.recv(received, 0)
                assert torch.equal(received.view(torch.uint8), tensor.view(torch.uint8))

    assert accepted(body) == [EVERYWHERE[0], EVERYWHERE[2], EVERYWHERE[3]]


def test_complex_numbers():
    number = torch.ones(2, dtype=torch.complex64)

    def reduce_scatter():
        reduce_scatter_single(torch.empty(1, dtype=torch.complex64), number)

    def gather():
        dist.gather(number, [number.clone(), number.clone()] if dist.get_rank() == 0 else None)

    assert accepted(lambda: dist.reduce(number.clone(), 0)) == EVERYWHERE
    assert accepted(reduce_scatter, STRICT) == [STRICT[0], STRICT[2]]
    assert accepted(gather) == []


# -- reductions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BAND", "BOR", "BXOR"])
def test_bits_are_combined_by_gloo_and_only_in_integers(name):
    op = getattr(dist.ReduceOp, name)
    assert accepted(lambda: dist.all_reduce(torch.tensor([1]), op)) == [EVERYWHERE[0], EVERYWHERE[2], EVERYWHERE[3]]
    assert accepted(lambda: dist.all_reduce(torch.tensor([1.0]), op)) == []
    assert (
        outcome(lambda: dist.all_reduce(torch.tensor([1]), op))
        == f"all_reduce: ReduceOp.{name} is not supported by nccl"
    )


def test_averages_of_integers_are_refused_except_by_nccl():
    assert accepted(lambda: dist.all_reduce(torch.tensor([1, 2]), dist.ReduceOp.AVG)) == [("nccl", "gloo")]
    assert accepted(lambda: dist.all_reduce(torch.tensor([True]), dist.ReduceOp.AVG)) == []
    assert "use SUM and divide" in outcome(lambda: dist.all_reduce(torch.tensor([1]), dist.ReduceOp.AVG))


def test_premul_sum_is_for_nccl_and_floating_point():
    op = dist._make_nccl_premul_sum(2.0)
    assert accepted(lambda: dist.all_reduce(torch.tensor([1.0]), op)) == [EVERYWHERE[1], EVERYWHERE[2], EVERYWHERE[4]]
    assert accepted(lambda: dist.all_reduce(torch.tensor([1]), op)) == []


def test_factors_of_premul_sum_must_agree():
    def main():
        dist.init_process_group("nccl")
        dist.all_reduce(torch.ones(1), dist._make_nccl_premul_sum(1.0 + dist.get_rank()))

    with pytest.raises(CollectiveMismatchError, match=r"PREMUL_SUM\(2\)"):
        SimWorld(2).run(main)


@pytest.mark.parametrize("name", ["PRODUCT", "MIN", "MAX"])
def test_what_has_no_meaning_for_complex_numbers_is_refused(name):
    op = getattr(dist.ReduceOp, name)
    message = outcome(lambda: dist.reduce(torch.ones(1, dtype=torch.complex64), 0, op), backend="gloo")
    assert message == f"reduce: ReduceOp.{name} has no meaning for torch.complex64"


# -- layout -----------------------------------------------------------------------------------------------------------


def strided():
    return torch.arange(8.0)[::2]


def dense():
    return torch.arange(4.0)


def pair(make):
    return [make() for _ in range(2)]


def at_root(lists):
    return lists if dist.get_rank() == 0 else None


WITH_STRIDES = {
    "all_reduce": lambda: dist.all_reduce(strided()),
    "broadcast": lambda: dist.broadcast(strided(), 0),
    "reduce": lambda: dist.reduce(strided(), 0),
    "scatter into": lambda: dist.scatter(strided(), at_root(pair(dense))),
    "reduce_scatter into": lambda: dist.reduce_scatter(strided(), pair(dense)),
    "all_to_all_single from": lambda: dist.all_to_all_single(dense(), strided()),
    "all_to_all_single into": lambda: dist.all_to_all_single(strided(), dense()),
    "send": lambda: dist.isend(strided(), 1 - dist.get_rank()),
    "recv": lambda: dist.irecv(strided(), 1 - dist.get_rank()),
}
COPIED_BY_GLOO = {
    "all_gather from": lambda: dist.all_gather(pair(dense), strided()),
    "all_gather into": lambda: dist.all_gather(pair(strided), dense()),
    "all_gather_single from": lambda: all_gather_single(torch.empty(8), strided()),
    "all_gather_single into": lambda: all_gather_single(torch.empty(16)[::2], dense()),
    "gather from": lambda: dist.gather(strided(), at_root(pair(dense))),
    "gather into": lambda: dist.gather(dense(), at_root(pair(strided))),
    "reduce_scatter from": lambda: dist.reduce_scatter(dense(), pair(strided)),
    "reduce_scatter_single from": lambda: reduce_scatter_single(torch.empty(2), strided()),
    "reduce_scatter_single into": lambda: reduce_scatter_single(torch.empty(4)[::2], dense()),
    "all_to_all from": lambda: dist.all_to_all(pair(dense), pair(strided)),
    "all_to_all into": lambda: dist.all_to_all(pair(strided), pair(dense)),
}


@pytest.mark.parametrize("name", WITH_STRIDES)
def test_a_tensor_that_is_not_contiguous_is_refused(name):
    assert accepted(WITH_STRIDES[name]) == []
    assert "is not contiguous" in outcome(WITH_STRIDES[name])


@pytest.mark.parametrize("name", COPIED_BY_GLOO)
def test_a_tensor_that_is_not_contiguous_is_taken_only_where_gloo_copies_it(name):
    assert accepted(COPIED_BY_GLOO[name]) == [("gloo", "nccl")]


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_inputs_with_strides_may_be_under_way(dtype):
    def body():
        for count in (0, 1, 3):
            given, found = torch.ones(2 * count).to(dtype)[::2], [torch.zeros(2 * count).to(dtype)[::2] for _ in "ab"]
            dist.all_gather(found, given, async_op=True).wait()
            assert [t.tolist() for t in found] == [given.tolist()] * 2

    assert outcome(body, profile="gloo") is None


def test_gloo_gets_strides_right_where_it_copies():
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        buffer, single, part = torch.zeros(size, 4), torch.zeros(8), torch.zeros(4)
        dist.all_gather([row[::2] for row in buffer], strided()[:2] + rank)
        all_gather_single(single[::2], torch.full((2,), float(rank)))
        reduce_scatter_single(part[::2], strided())
        assert buffer.tolist() == [[0, 0, 2, 0], [1, 0, 3, 0]]
        assert single.tolist() == [0, 0, 0, 0, 1, 0, 1, 0]
        assert part.tolist() == ([0, 0, 4, 0] if rank == 0 else [8, 0, 12, 0])

    assert outcome(body, profile="gloo") is None


def test_layouts_that_differ_between_ranks_are_a_mismatch():
    def main():
        dist.init_process_group("nccl")
        layout = torch.channels_last if dist.get_rank() else torch.contiguous_format
        dist.all_reduce(torch.ones(2, 3, 4, 5).to(memory_format=layout))

    with pytest.raises(CollectiveMismatchError, match="the shape differs"):
        SimWorld(2).run(main)


# -- shapes -----------------------------------------------------------------------------------------------------------

UNUSUAL_SHAPES = {
    "all_gather_single, stacked": lambda: all_gather_single(torch.empty(2, 3), torch.ones(3)),
    "all_gather_single, flat": lambda: all_gather_single(torch.empty(12), torch.ones(2, 3)),
    "all_gather_single of a scalar": lambda: all_gather_single(torch.empty(2), torch.tensor(1.0)),
    "reduce_scatter_single, stacked": lambda: reduce_scatter_single(torch.empty(3), torch.ones(2, 3)),
    "reduce_scatter_single, flat": lambda: reduce_scatter_single(torch.empty(2, 3), torch.ones(12)),
    "reduce_scatter_single into a scalar": lambda: reduce_scatter_single(torch.tensor(0.0), torch.ones(2)),
    "all_gather into another shape": lambda: dist.all_gather(pair(lambda: torch.empty(4)), torch.ones(2, 2)),
    "reduce_scatter into another shape": lambda: dist.reduce_scatter(torch.empty(2, 2), pair(lambda: torch.ones(4))),
}


@pytest.mark.parametrize("name", UNUSUAL_SHAPES)
def test_only_nccl_is_free_in_the_shape_of_an_output(name):
    assert accepted(UNUSUAL_SHAPES[name]) == [("nccl", "gloo")]


def test_a_refused_shape_is_answered_with_the_right_one():
    message = outcome(UNUSUAL_SHAPES["all_gather_single, stacked"])
    assert "the output is torch.float32[2, 3], expected torch.float32[6]" in message
    assert "reshape the scalar to [1]" in outcome(UNUSUAL_SHAPES["all_gather_single of a scalar"])


WRONG_SHAPES = {
    "an output too small": lambda: all_gather_single(torch.empty(5), torch.ones(3)),
    "an input too large": lambda: reduce_scatter_single(torch.empty(3), torch.ones(7)),
    "an output of another dtype": lambda: all_gather_single(torch.empty(6).double(), torch.ones(3)),
    "an own output too small": lambda: dist.all_gather(pair(lambda: torch.empty(2)), torch.ones(3)),
    "a list too long": lambda: dist.all_gather(pair(dense) * 2, dense()),
    "a list too short": lambda: dist.reduce_scatter(dense(), [dense()]),
    "a gathered list too long": lambda: dist.gather(dense(), at_root(pair(dense) * 2)),
    "a scattered list too short": lambda: dist.scatter(dense(), at_root([dense()])),
    "gathered into another shape": lambda: dist.gather(torch.ones(2, 2), at_root(pair(dense))),
    "scattered into another shape": lambda: dist.scatter(torch.ones(2, 2), at_root(pair(dense))),
    "exchanged lists too short": lambda: dist.all_to_all([dense()], [dense()]),
    "parts that do not come out even": lambda: dist.all_to_all_single(torch.empty(3), torch.ones(3)),
    "splits that add up to less": lambda: dist.all_to_all_single(torch.empty(4), torch.ones(4), [2, 2], [1, 2]),
    "splits below zero": lambda: dist.all_to_all_single(torch.empty(4), torch.ones(4), [2, 2], [5, -1]),
    "too few splits": lambda: dist.all_to_all_single(torch.empty(4), torch.ones(4), [4], [2, 2]),
    "rows of another length": lambda: dist.all_to_all_single(torch.empty(4, 1), torch.ones(2, 2)),
    "a scalar to split": lambda: dist.all_to_all_single(torch.tensor(0.0), torch.tensor(1.0)),
    "a root outside the group": lambda: dist.broadcast(dense(), 2),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_a_call_that_fits_nowhere_is_refused_by_all(name):
    assert accepted(WRONG_SHAPES[name]) == []


def test_lists_of_unlike_dtypes_are_refused_below_torch_too():
    def body():
        group = dist.distributed_c10d._get_default_group()
        outputs = [torch.empty(2).double() for _ in range(2)]
        outputs[dist.get_rank()] = torch.empty(2)
        group.allgather([outputs], [torch.ones(2)])

    assert "torch.float64 in a list that goes with torch.float32" in outcome(body)


@pytest.mark.parametrize(
    "call",
    [
        lambda: dist.all_gather([torch.empty(1), torch.empty(2)], torch.ones(1 + dist.get_rank())),
        lambda: dist.all_to_all(
            pair(lambda: torch.empty(1 + dist.get_rank())) and [torch.empty(1), torch.empty(2)],
            pair(lambda: torch.ones(1 + dist.get_rank())),
        ),
    ],
    ids=["all_gather", "all_to_all"],
)
def test_uneven_lists_are_for_nccl(call):
    assert accepted(call) == [EVERYWHERE[1], EVERYWHERE[2], EVERYWHERE[4]]


def test_an_uneven_reduce_scatter_is_for_everybody():
    def body():
        dist.reduce_scatter(torch.empty(1 + dist.get_rank()), [torch.ones(1), torch.ones(2)])

    assert accepted(body) == EVERYWHERE


def test_only_strict_compares_shapes_beyond_the_number_of_elements():
    def main():
        dist.init_process_group("gloo")
        tensor = torch.ones(4) if dist.get_rank() else torch.ones(2, 2)
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 0)
        dist.destroy_process_group()
        return tensor.tolist()

    with pytest.raises(CollectiveMismatchError, match="the shape differs"):
        SimWorld(2).run(main)
    assert SimWorld(2, profile="gloo").run(main) == SimWorld(2, profile="nccl").run(main)
    assert SimWorld(2, profile="gloo").run(main) == [[[2.0, 2.0], [2.0, 2.0]], [2.0, 2.0, 2.0, 2.0]]


# -- autograd ---------------------------------------------------------------------------------------------------------


def leaf(count=1):
    return torch.zeros(count, requires_grad=True)


INTO_LEAVES = {
    "all_gather": lambda: dist.all_gather(pair(leaf), torch.ones(1)),
    "all_gather_single": lambda: all_gather_single(leaf(2), torch.ones(1)),
    "reduce_scatter": lambda: dist.reduce_scatter(leaf(), [torch.ones(1)] * 2),
    "reduce_scatter_single": lambda: reduce_scatter_single(leaf(), torch.ones(2)),
    "gather": lambda: dist.gather(torch.ones(1), at_root(pair(leaf))),
    "all_to_all": lambda: dist.all_to_all(pair(leaf), [torch.ones(1)] * 2),
}


@pytest.mark.parametrize("name", INTO_LEAVES)
def test_gloo_does_not_copy_into_a_parameter_while_autograd_records(name):
    assert "requires grad" in outcome(INTO_LEAVES[name])
    assert outcome(INTO_LEAVES[name], profile="gloo") is not None
    assert outcome(torch.no_grad()(INTO_LEAVES[name])) is None


def test_gloo_does_not_gather_an_input_of_the_graph_into_one_tensor():
    def body():
        all_gather_single(torch.empty(2), torch.ones(1, requires_grad=True) * 2)

    assert accepted(body) == [("nccl", "gloo")]
    assert outcome(torch.no_grad()(body)) is None


# -- messages and the rest --------------------------------------------------------------------------------------------


def test_receiving_from_anybody_is_for_gloo():
    def body():
        if dist.get_rank():
            dist.send(torch.ones(1), 0)
        else:
            assert dist.recv(torch.empty(1)) == 1

    assert accepted(body) == [EVERYWHERE[0], EVERYWHERE[2], EVERYWHERE[3]]


def test_a_message_to_oneself_is_for_nccl():
    def body():
        received = torch.empty(1)
        works = [dist.isend(torch.ones(1), dist.get_rank()), dist.irecv(received, dist.get_rank())]
        for work in works:
            work.wait()
        assert received.item() == 1

    assert accepted(body) == [EVERYWHERE[1], EVERYWHERE[2], EVERYWHERE[4]]


def test_gloo_matches_messages_by_tag():
    def main():
        dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            works = [dist.isend(torch.tensor([float(tag)]), 1, tag=tag) for tag in (1, 2, 3)]
            for work in works:
                work.wait()
            return None
        received = [torch.empty(1) for _ in range(3)]
        for tag in (3, 1, 2):
            dist.recv(received[tag - 1], 0, tag=tag)

        return torch.cat(received).tolist()

    world = SimWorld(2, profile="gloo")
    with pytest.warns(match="never destroyed"):
        assert world.run(main)[1] == [1.0, 2.0, 3.0]
    with pytest.raises(CollectiveMismatchError, match="sent with tag 1, received with tag 3"):
        SimWorld(2).run(main)


def test_nccl_knows_no_tags():
    def main():
        dist.init_process_group("nccl")
        tensor = torch.full((1,), float(dist.get_rank()))
        if dist.get_rank() == 0:
            dist.send(tensor, 1, tag=5)
        else:
            dist.recv(tensor, 0, tag=6)
        dist.destroy_process_group()
        return tensor.item()

    assert SimWorld(2, profile="nccl").run(main) == [0.0, 0.0]
    with pytest.raises(CollectiveMismatchError, match="tags differ"):
        SimWorld(2).run(main)


@pytest.mark.parametrize("profile", PROFILES)
def test_no_backend_buffers_a_send(profile):
    def main():
        dist.init_process_group("gloo")
        dist.send(torch.ones(1), 1 - dist.get_rank())
        dist.recv(torch.ones(1), 1 - dist.get_rank())

    with pytest.raises(DeadlockError, match="send"):
        SimWorld(2, profile=profile).run(main)


def test_the_coalescing_manager_with_a_device_is_for_nccl():
    def body():
        with dist._coalescing_manager(device=torch.device("cpu")):
            dist.all_reduce(torch.ones(1))

    assert accepted(body) == [EVERYWHERE[1], EVERYWHERE[2], EVERYWHERE[4]]


def test_futures_of_a_reduce_scatter_are_for_nccl():
    def body():
        output = torch.empty(1)
        future = reduce_scatter_single(output, torch.ones(2), async_op=True).get_future()
        assert future.wait()[0].item() == 2.0

    assert outcome(body) is None
    assert outcome(body, backend="gloo") == "get_future() of a reduce_scatter_single is not supported by gloo"
