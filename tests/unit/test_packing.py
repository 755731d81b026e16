"""Which samples share a row: nothing is lost, nothing is cut, and rows and ranks are well filled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError
from lightrft.models import balance, pack, pack_for_ranks
from lightrft.models.rows import NO_LABEL, check_batch, packed_rows, padded_rows

lengths = st.lists(st.integers(0, 20), max_size=30)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(20, 50))
def test_every_sample_is_in_one_row_that_holds_it(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(number for row in rows for number in row) == [i for i, length in enumerate(lengths) if length]
    totals = [sum(lengths[number] for number in row) for row in rows]
    assert all(0 < total <= capacity for total in totals)
    assert sum(sorted(totals)[:2]) > capacity or len(rows) < 2, "two rows that fit into one are one"


def test_rows_are_as_few_as_can_be_where_that_takes_some_thought():
    assert pack([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 2, 3, 5]]
    assert pack([], 10) == []
    assert pack([0, 0], 10) == []


@settings(max_examples=40, deadline=None)
@given(lengths.filter(any), st.integers(1, 8))
def test_parts_are_balanced_as_well_as_the_longest_sample_allows(lengths, parts):
    shares = balance(lengths, parts)
    assert sorted(number for share in shares for number in share) == list(range(len(lengths)))
    totals = [sum(lengths[number] for number in share) for share in shares]
    assert max(totals) - min(totals) <= max(lengths)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(20, 40), st.integers(1, 6))
def test_f11_every_rank_runs_as_many_rows_as_the_others(lengths, capacity, ranks):
    shares = pack_for_ranks(lengths, capacity, ranks)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for row in share]
    assert sorted(number for row in rows for number in row) == [i for i, length in enumerate(lengths) if length]
    assert all(sum(lengths[number] for number in row) <= capacity for row in rows)
    assert len(rows) < len(pack(lengths, capacity)) + ranks
    if [] in rows:
        assert all(len(row) < 2 for row in rows), "no row is empty while another one can be divided"


def test_ranks_get_nearly_as_many_tokens():
    shares = pack_for_ranks([9, 9, 3, 3, 3, 3], 9, 2)
    totals = [sum([9, 9, 3, 3, 3, 3][number] for row in share for number in row) for share in shares]
    assert max(totals) - min(totals) <= 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack([3, 11], 10), "sample 1 has 11 tokens: expected 0 to 10"),
        (lambda: pack([3, -1], 10), "sample 1 has -1 tokens"),
        (lambda: balance([3], 0), "got 0 ranks or parts"),
        (lambda: pack_for_ranks([3], 10, 0), "got 0 ranks or parts"),
    ],
)
def test_what_cannot_be_packed_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@st.composite
def batches(draw):
    """Token ids and mask of samples that begin anywhere in their row."""
    width = draw(st.integers(1, 9))
    spans = draw(st.lists(st.tuples(st.integers(0, width), st.integers(0, width)), min_size=1, max_size=6))
    mask = torch.zeros(len(spans), width, dtype=torch.long)
    for row, (one, other) in enumerate(spans):
        mask[row, min(one, other) : max(one, other)] = 1
    ids = torch.arange(1, mask.numel() + 1).view_as(mask)
    return ids, mask


@settings(max_examples=40, deadline=None)
@given(batches(), st.booleans())
def test_f15_tokens_go_into_rows_and_come_back(batch, one_row):
    ids, mask = batch
    real = check_batch(ids, mask)
    rows = packed_rows(ids, real, one_row=one_row)
    assert rows.unpacked(rows.input_ids).tolist() == (ids * mask).tolist()
    assert torch.equal(rows.packed(ids * mask), rows.input_ids)
    assert len(rows.input_ids) == 1 or not one_row
    assert rows.input_ids.count_nonzero() == mask.sum()
    assert rows.input_ids.shape[1] <= max(1, int(mask.sum() if one_row else mask.sum(1).max()))


@settings(max_examples=40, deadline=None)
@given(batches())
def test_f15_positions_and_labels_restart_with_each_sample(batch):
    ids, mask = batch
    for rows in (packed_rows(ids, mask.bool()), padded_rows(ids, mask.bool())):
        positions, labels = rows.unpacked(rows.position_ids), rows.unpacked(rows.labels)
        for row in range(len(ids)):
            place = mask[row].nonzero().flatten()
            assert positions[row][place].tolist() == list(range(len(place)))
            assert labels[row][place].tolist() == [NO_LABEL, *ids[row][place].tolist()[1:]][: len(place)]
        assert (rows.labels != NO_LABEL).sum() == (mask.sum(1) - 1).clamp(min=0).sum()
    restarts = torch.diff(packed_rows(ids, mask.bool()).position_ids, dim=1) != 1
    starts = packed_rows(ids, mask.bool()).labels[:, 1:] == NO_LABEL
    assert (restarts <= starts).all(), "no sample is torn apart"


def test_a_gap_in_a_sample_and_shapes_that_differ_are_refused():
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ConfigError, match="sample 1 has padding between real tokens"):
        check_batch(ids, torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]]))
    with pytest.raises(ConfigError, match=r"shape \(2, 4\) and an attention mask of shape \(2, 3\)"):
        check_batch(ids, ids[:, :3])
