"""Where parts of parameters lie in the flat tensors of ZeRO, and what has to be copied from one layout to another."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.strategy.deepspeed.pieces import Piece, evenly_split, laid_out, overlaps

ELEMENTS = st.lists(st.integers(1, 12), min_size=1, max_size=5)
WORLDS = st.integers(1, 5)


def one_after_the_other(elements, world_size):
    """Pieces of each rank, as ZeRO 1 and 2 cut all parameters of a group together; rank, offset and length by name."""
    total = sum(elements)
    share = -(-total // world_size)
    ranks = []
    for rank in range(world_size):
        addresses, begin = {}, 0
        for number, count in enumerate(elements):
            first, last = max(begin, rank * share), min(begin + count, (rank + 1) * share)
            if first < last:
                addresses[f"p{number}"] = (first - rank * share, last - first)
            begin += count
        ranks.append([addresses])
    return laid_out(ranks)


def each_by_itself(elements, world_size):
    groups = [{f"p{number}": count for number, count in enumerate(elements)}]
    return [list(evenly_split(groups, rank, world_size)) for rank in range(world_size)]


def values(elements):
    """For each parameter its elements, all different."""
    return {f"p{number}": 100 * number + torch.arange(count) for number, count in enumerate(elements)}


def written(elements, pieces):
    flat = torch.full((sum(elements) + len(elements),), -1)
    for piece in pieces:
        flat[piece.offset : piece.offset + piece.length] = values(elements)[piece.name][piece.start :][: piece.length]
    return flat


@given(ELEMENTS, WORLDS, WORLDS, st.booleans(), st.booleans())
def test_every_element_arrives_where_it_belongs(elements, saved_by, loaded_by, saved_together, loaded_together):
    saved = (one_after_the_other if saved_together else each_by_itself)(elements, saved_by)
    wanted = (one_after_the_other if loaded_together else each_by_itself)(elements, loaded_by)
    flats = [written(elements, pieces) for pieces in saved]
    for pieces in wanted:
        found = torch.full((sum(elements) + len(elements),), -1)
        for overlap in overlaps(saved, pieces):
            rank, _, run = overlap.saved
            found[overlap.wanted[1]] = flats[rank][run]
        assert torch.equal(found, written(elements, pieces))


@given(ELEMENTS, WORLDS, st.booleans())
def test_the_pieces_of_all_ranks_are_the_whole_parameters(elements, world_size, together):
    ranks = (one_after_the_other if together else each_by_itself)(elements, world_size)
    covered = sorted((p.name, p.start + i) for pieces in ranks for p in pieces for i in range(p.length))
    assert covered == sorted((f"p{n}", i) for n, count in enumerate(elements) for i in range(count))


def test_the_last_share_is_filled_up():
    assert list(evenly_split([{"a": 5}, {"b": 2}], 1, 2)) == [
        Piece(name="a", start=3, length=2, flat=0, offset=0),
        Piece(name="b", start=1, length=1, flat=1, offset=0),
    ]
    assert list(evenly_split([{"b": 1}], 3, 4)) == []
