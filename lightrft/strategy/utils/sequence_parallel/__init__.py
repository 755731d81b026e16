"""Sequence parallelism: the ranks of a group share each sequence, and attention exchanges heads for tokens (Ulysses).

Outside attention every operation of a transformer works on one token at a time, so a rank that holds a slice of the
tokens needs nothing of the others. Inside attention it holds all tokens of some heads: one all-to-all before, one
after (Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509, section 3).

- `SequenceParallelProcessor` slices a batch and gathers what the model makes of it;
- `enable` and `disable` change how the attention of one transformers model works; `group_of` says what it is now.

Nothing but a ``torch.distributed`` group is needed; what trains the model (FSDP2, DeepSpeed) is not told.
"""

from lightrft.strategy.utils.sequence_parallel.model import disable, enable, group_of
from lightrft.strategy.utils.sequence_parallel.processor import SequenceParallelProcessor, SequenceSlice

__all__ = ["SequenceParallelProcessor", "SequenceSlice", "disable", "enable", "group_of"]
