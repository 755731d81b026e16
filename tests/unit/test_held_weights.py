"""What a model of an engine holds, as the weights of its checkpoint."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightrft.sim import SimWorld
from lightrft.strategy.utils import held_weights
from lightrft.strategy.utils.agreement import Ranks
from lightrft.strategy.utils.fingerprints import fingerprint

QUERIES, KEYS, WIDTH, VOCABULARY = 8, 4, 6, 5
WHOLE = {
    "model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH),
    "model.layers.0.q_proj.weight": torch.randn(QUERIES, WIDTH),
    "model.layers.0.k_proj.weight": torch.randn(KEYS, WIDTH),
    "model.layers.0.v_proj.weight": torch.randn(KEYS, WIDTH),
    "model.layers.0.q_proj.bias": torch.randn(QUERIES),
    "model.layers.0.k_proj.bias": torch.randn(KEYS),
    "model.layers.0.v_proj.bias": torch.randn(KEYS),
    "model.layers.0.o_proj.weight": torch.randn(WIDTH, QUERIES),
    "model.layers.0.gate_proj.weight": torch.randn(WIDTH, WIDTH),
    "model.layers.0.up_proj.weight": torch.randn(WIDTH, WIDTH),
    "model.norm.weight": torch.randn(WIDTH),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WHOLE.items()}


def layer(weight, bias=None, **attributes):
    made = nn.Module()
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def engine_model(rank=0, size=1):
    """What a rank of an engine has: fused, cut, keys and values on as many ranks as there are too few, padded."""

    def share(name, dim=0, parts=size):
        return WHOLE[f"model.layers.0.{name}"].chunk(parts, dim)[rank * parts // size]

    keys = min(size, 2)  # heads of keys and values
    padded = torch.cat([WHOLE["model.embed_tokens.weight"], torch.zeros(8 - VOCABULARY, WIDTH)])
    several = [("q_proj", size), ("k_proj", keys), ("v_proj", keys)]
    sizes = [QUERIES // size, KEYS // keys, KEYS // keys]
    decoder = nn.Module()
    decoder.qkv_proj = layer(
        *(torch.cat([share(f"{name}.{kind}", parts=parts) for name, parts in several]) for kind in ("weight", "bias")),
        output_partition_sizes=sizes,
        num_kv_head_replicas=size // keys,
    )
    decoder.o_proj = layer(share("o_proj.weight", dim=1))
    both = [share(f"{name}.weight", parts=size if WIDTH % size == 0 else 1) for name in ("gate_proj", "up_proj")]
    decoder.gate_up_proj = layer(torch.cat(both), output_partition_sizes=[len(one) for one in both])
    inner = nn.Module()
    inner.embed_tokens = layer(padded.chunk(size)[rank])
    inner.layers = nn.ModuleList([decoder])
    inner.norm = layer(WHOLE["model.norm.weight"])
    model = nn.Module()
    model.model = inner
    return model


EXPECTED = {name: fingerprint(tensor) for name, tensor in WHOLE.items()}


def test_fused_and_padded_weights_are_told_by_the_names_of_the_checkpoint():
    assert held_weights.fingerprints(engine_model(), SHAPES) == EXPECTED
    other = engine_model()
    with torch.no_grad():
        other.model.layers[0].qkv_proj.weight[QUERIES, 0] += 1
    told = held_weights.fingerprints(other, SHAPES)
    assert [name for name in EXPECTED if told[name] != EXPECTED[name]] == ["model.layers.0.k_proj.weight"]


@pytest.mark.parametrize("size", [2, 4])
def test_shards_of_ranks_are_put_together(size):
    shapes = {name: shape for name, shape in SHAPES.items() if size == 2 or ("gate" not in name and "up_" not in name)}

    def program():
        dist.init_process_group("gloo")
        ranks = Ranks()
        found = held_weights.fingerprints(engine_model(ranks.rank, size), shapes, gather=ranks.gather)
        dist.destroy_process_group()
        return found

    assert SimWorld(size).run(program) == [{name: EXPECTED[name] for name in shapes}] * size


def test_names_are_mapped_as_the_engine_maps_them():
    model = nn.Module()
    model.language_model = engine_model()
    model.hf_to_vllm_mapper = SimpleNamespace(map_name=lambda name: f"language_model.{name}")
    assert held_weights.fingerprints(model, SHAPES) == EXPECTED


def test_an_output_layer_that_is_not_there_is_the_embedding():
    shapes = {"lm_head.weight": (VOCABULARY, WIDTH)}
    told = held_weights.fingerprints(engine_model(), shapes)
    assert told == {"lm_head.weight": EXPECTED["model.embed_tokens.weight"]}


def test_weights_are_told_in_the_dtype_of_the_engine():
    model = engine_model().double()
    assert held_weights.fingerprints(model, SHAPES, dtype=torch.float32) == EXPECTED
    assert held_weights.fingerprints(model, SHAPES) != EXPECTED


def test_what_is_packed_is_told_by_what_it_computes():
    model = engine_model()
    packed = WHOLE["model.layers.0.o_proj.weight"].clone()
    output = model.model.layers[0].o_proj
    output.weight, output.input_size = nn.Parameter(torch.empty(0)), QUERIES
    output.cpu_linear = lambda x, weight, bias: nn.functional.linear(x, packed, bias)
    assert held_weights.fingerprints(model, SHAPES) == EXPECTED
    output.weight = nn.Parameter(packed.clone())
    packed += 1  # the plain weight is the right one, and is not what computes
    told = held_weights.fingerprints(model, SHAPES)
    assert [name for name in EXPECTED if told[name] != EXPECTED[name]] == ["model.layers.0.o_proj.weight"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.other.weight", (3,)),
        ("model.layers.0.experts.weight", (3,)),
        ("model.norm.weight", (WIDTH + 1,)),
        ("model.norm.weight", (WIDTH, 1)),
        ("model.layers.0.o_proj.weight", (WIDTH + 1, QUERIES + 1)),
    ],
)
def test_what_cannot_be_told_is_not_told(name, shape):
    assert held_weights.fingerprints(engine_model(), {**SHAPES, name: shape}) is None
