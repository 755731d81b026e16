"""Log-probs in several ways: ``python -m benchmarks.models_child WHAT ...`` prints JSON.

Time is the processor time of this process, memory the growth of its peak, so ``output`` measures one way a process.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.groups import grown_mib
from lightrft.models import Actor, fused_linear_log_probs, tiny

VOCABULARY, TOKENS, WIDTH = 150_000, 4096, 512
SAMPLES, LONGEST, ROUNDS = 48, 512, 3


def plain(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def fused(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return fused_linear_log_probs(hidden, weight, tokens).log_probs


def trl(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """As trl 1.16 does it, where that is installed."""
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    found: Tensor = function.apply(hidden, weight, None, tokens, 1.0, chunk, None, 1.0, ())[0]
    return found


def liger(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """As liger-kernel 0.8 does it, where that is installed."""
    module = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    chunk = module._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    found: Tensor = module._ChunkedSelectiveLogProbFunction.apply(hidden, weight, tokens, None, 1.0, chunk)
    return found


WAYS = {"plain": plain, "fused": fused, "trl": trl, "liger": liger}


def output(way: str) -> dict[str, float]:
    """Seconds, and MiB above inputs, of log-probs of given tokens from hidden states and back, in one of ``WAYS``."""
    WAYS[way](torch.randn(2, 2), torch.randn(3, 2), torch.tensor([0, 1]))  # imports are not counted
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).requires_grad_()
    weight = torch.empty(VOCABULARY, WIDTH).normal_(std=0.05).requires_grad_()
    tokens = torch.randint(VOCABULARY, (TOKENS,))
    begin = time.process_time()
    mib = grown_mib(lambda: WAYS[way](hidden, weight, tokens).mean().backward())
    return {"seconds": time.process_time() - begin, "mib": mib}


def packing() -> dict[str, float]:
    """Seconds of a step of an actor on samples with a long tail of lengths, padded and packed; medians of turns."""
    actor = Actor(
        tiny.text_model(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                        num_key_value_heads=4, max_position_embeddings=LONGEST)
    )  # fmt: skip
    lengths = long_tail()
    ids = torch.randint(tiny.VOCABULARY, (SAMPLES, LONGEST), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + ROUNDS):
        for packed, seconds in taken.items():
            seconds.append(_seconds(lambda packed=packed: actor(ids, mask, packed=packed).log_probs.sum().backward()))
    padded, together = (statistics.median(seconds[1:]) for seconds in taken.values())
    return {"padded": padded, "packed": together, "ratio": together / padded, "real": mask.float().mean().item()}


def long_tail() -> Tensor:
    """Log-normal lengths as of answers: half of them below a tenth of the longest."""
    spread = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0)).exp()
    return (spread * LONGEST / 10).long().clamp(8, LONGEST)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    what, *arguments = sys.argv[1:]
    print(json.dumps({"output": output, "packing": packing}[what](*arguments)))
