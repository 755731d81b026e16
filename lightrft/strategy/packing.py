"""Requests as bytes: on their way to the ranks whose engine wants them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lightrft.errors import ConfigError
from lightrft.strategy.requests import Request

if TYPE_CHECKING:
    from lightrft.strategy.utils.agreement import Ranks

__all__ = ["packed", "sent", "unpacked"]

_WORD = 8  # bytes
_HEADER = 3  # words: of requests, of token ids, of pickled bytes
_TEXT = -1  # in the place of the length of a prompt that is text


def packed(requests: Sequence[Request]) -> torch.Tensor:
    """``requests`` as ``uint8`` of shape ``(bytes,)``, whole words: token ids as they are, the rest pickled.

    Raises:
        ConfigError: a token id has more than 64 bits; or an image or a video cannot be pickled, or not be read.
    """
    lengths = [_TEXT if one.prompt_token_ids is None else len(one.prompt_token_ids) for one in requests]
    tokens = [token for one in requests for token in one.prompt_token_ids or ()]
    rest = {index: (one.prompt, one.images, one.videos) for index, one in enumerate(requests) if not one.is_tokens}
    try:
        pickled = pickle.dumps(rest) if rest else b""
        words = torch.tensor([len(lengths), len(tokens), len(pickled), *lengths, *tokens], dtype=torch.int64)
    except Exception as error:
        raise ConfigError(f"a prompt cannot be sent to other ranks: {type(error).__name__}: {error}") from error
    if not rest:
        return words.view(torch.uint8)
    whole = bytearray(pickled) + bytes(-len(pickled) % _WORD)
    return torch.cat([words.view(torch.uint8), torch.frombuffer(whole, dtype=torch.uint8)])


def unpacked(data: torch.Tensor) -> list[Request]:
    """The requests of what :func:`packed` has made, which may be padded."""
    words = data.cpu().view(torch.int64)
    count, total, size = words[:_HEADER].tolist()
    ends = _HEADER + count, _HEADER + count + total
    tokens = tuple(words[ends[0] : ends[1]].tolist())
    pickled = words[ends[1] :].view(torch.uint8)[:size]
    rest = pickle.loads(pickled.numpy().tobytes()) if size else {}
    requests = []
    offset = 0
    for index, length in enumerate(words[_HEADER : ends[0]].tolist()):
        ids = None if length == _TEXT else tokens[offset : offset + length]
        prompt, images, videos = rest.get(index, (None, (), ()))
        requests.append(Request.received(ids, prompt, images, videos))
        offset += max(length, 0)
    return requests


def sent(
    data: torch.Tensor, sizes: Sequence[int], ranks: Ranks, device: torch.device, *, to_all: bool
) -> list[torch.Tensor]:
    """What each rank has packed, by rank; on rank 0 alone if not ``to_all``, and nothing on the others. *Collective*.

    Args:
        data: of this rank.
        sizes: how long it is on each rank.
        ranks: who takes part.
        device: where tensors of the group travel.
        to_all: whether all ranks want it.
    """
    if ranks.world_size == 1:
        return [data]
    mine = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    mine[: len(data)] = data
    if to_all:
        found = list(mine.new_empty(ranks.world_size, len(mine)))
        dist.all_gather(found, mine, group=ranks.group)
        return found
    found = list(mine.new_empty(ranks.world_size, len(mine))) if ranks.rank == 0 else []
    dist.gather(mine, found or None, group=ranks.group, group_dst=0)
    return found
