"""Batches of samples for tests of models, and what each sample gives by itself."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightrft.models import tiny

LENGTHS = (9, 3, 1, 0, 12, 4, 5)


def batch(lengths=LENGTHS, width=14, side="right", seed=0):
    """Token ids and mask; what is padding is no token that the model knows as such."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), width), 77)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        begin = {"right": 0, "left": width - length, "both": (width - length) // 2}[side]
        ids[row, begin : begin + length] = torch.randint(6, tiny.VOCABULARY, (length,), generator=generator)
        mask[row, begin : begin + length] = 1
    return ids, mask


def one_by_one(model, ids, mask, temperature=1.0, images=None, never=()):
    """Log-probs and entropies of each sample by itself, by the plainest formula; tokens ``never`` are not drawn."""
    log_probs = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    entropy = torch.zeros_like(log_probs)
    for row in range(len(ids)):
        places = mask[row].nonzero().flatten()
        if len(places) < 2:
            continue
        own = ids[row][places][None]
        logits = model(input_ids=own, **({} if images is None else images[row])).logits[0, :-1].float()
        logits = logits.index_fill(-1, torch.tensor(never, dtype=torch.int64), -1e4)
        logs = (logits / temperature).log_softmax(-1)
        log_probs[row, places[:-1]] = logs.gather(1, own[0, 1:, None])[:, 0]
        entropy[row, places[:-1]] = -(logs.exp() * logs).sum(-1)
    return log_probs, entropy


class Images:
    """Three samples: two images, none, one video and an image."""

    def __init__(self):
        processor = tiny.image_processor()
        self.sizes = [(56, 28), (28, 28), (84, 56)]
        generator = torch.Generator().manual_seed(0)
        pictures = [torch.randint(256, (3, *size), generator=generator).byte().numpy() for size in self.sizes]
        seen = [processor([one], return_tensors="pt") for one in pictures]
        self.pixels = [one["pixel_values"] for one in seen]
        self.grids = [one["image_grid_thw"] for one in seen]
        self.counts = [int(grid.prod()) // 4 for grid in self.grids]

    def tokens(self, number):
        return [tiny.VISION_START, *[tiny.IMAGE] * self.counts[number], tiny.VISION_END]

    def given(self, *numbers):
        if not numbers:
            return {}
        return {
            "pixel_values": torch.cat([self.pixels[number] for number in numbers]),
            "image_grid_thw": torch.cat([self.grids[number] for number in numbers]),
        }


def seen_batch(width=24, side="right"):
    images = Images()
    samples = [[9, *images.tokens(0), 10, *images.tokens(1), 11], [12, 13, 14], [*images.tokens(2), 15, 16, 17, 18]]
    ids = torch.full((len(samples), width), 77)
    mask = torch.zeros_like(ids)
    each = [images.given(0, 1), {}, images.given(2)]
    for row, sample in enumerate(samples):
        begin = 0 if side == "right" else width - len(sample)
        ids[row, begin : begin + len(sample)] = torch.tensor(sample)
        mask[row, begin : begin + len(sample)] = 1
        if each[row]:
            each[row]["mm_token_type_ids"] = (torch.tensor([sample]) == tiny.IMAGE).int()
    return ids, mask, images.given(0, 1, 2), each


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.seen |= {tuple(one.shape) for one in tree_leaves(found) if isinstance(one, torch.Tensor)}
        return found
