"""Sequence parallelism: what it computes is what one rank computes."""

import contextlib
import copy
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import sequence_parallel as programs
from torch.nn import functional
from transformers import AttentionInterface, Mamba2Config, Mamba2ForCausalLM, Qwen2Config, Qwen2Model, T5Config, T5Model

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.strategy.utils.sequence_parallel import SequenceParallelProcessor, disable, enable

pytestmark = pytest.mark.slow

shapes = pytest.mark.parametrize(("ranks", "sp"), [(2, 2), (4, 4), (4, 2)])
"""Ranks, and ranks that share a sequence."""

ignore_warnings_of_libraries = pytest.mark.filterwarnings("ignore")


def check(ranks, sp, architecture, kind, **options):
    found = SimWorld(ranks, stall_limit=60).run(programs.step, architecture, kind, sp, **options)
    programs.check_equal(found, architecture, kind, sp)


def on_ranks(body, ranks=2):
    """Runs ``body(group)`` on simulated ranks that are one group."""

    def run():
        dist.init_process_group("gloo")
        try:
            return body(dist.group.WORLD)
        finally:
            dist.destroy_process_group()

    world = SimWorld(ranks, stall_limit=60)
    return world, world.run(run)


def refused(body, message):
    """``body(group)`` raises a ConfigError on every rank."""

    def run(group):
        with pytest.raises(ConfigError, match=message):
            body(group)

    on_ranks(run)


# -- equal to one rank ------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("kind", ["plain", "odd", "short", "left_padded", "right_padded", "packed", "packed_odd"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen2_gqa"])
def test_f14_every_kind_of_batch_gives_the_same_loss_log_probs_and_gradients(architecture, kind, ranks, sp):
    check(ranks, sp, architecture, kind)


@shapes
@pytest.mark.parametrize("kind", ["odd", "left_padded", "packed"])
@pytest.mark.parametrize("architecture", sorted(programs.CONFIGS.keys() - {"qwen2", "qwen2_gqa"}))
def test_f14_every_architecture_gives_the_same_loss_log_probs_and_gradients(architecture, kind, ranks, sp):
    check(ranks, sp, architecture, kind)


@ignore_warnings_of_libraries
@shapes
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_f14_sharded_models_give_the_same_loss_log_probs_and_gradients(backend, checkpointing, ranks, sp):
    check(ranks, sp, "qwen2_gqa", "packed_odd", backend=backend, checkpointing=checkpointing)


@pytest.mark.parametrize("kind", ["odd", "left_padded", "packed"])
def test_f14_recomputed_layers_give_the_same_loss_log_probs_and_gradients(kind):
    check(4, 2, "llama", kind, checkpointing=True)


def test_f14_packed_sequences_are_what_each_is_alone():
    policy = programs.model("qwen2")
    inputs, _ = programs.batch("packed", 0)
    alone = torch.zeros(programs.BATCH, inputs["input_ids"].shape[1] - 1)
    for row, positions in enumerate(inputs["position_ids"]):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        for first, end in itertools.pairwise(starts):
            part = SequenceParallelProcessor().preprocess(inputs["input_ids"][row : row + 1, first:end])
            found = SequenceParallelProcessor().gather_log_probs(policy(**part.inputs).logits, part)
            alone[row, first : end - 1] = found[0]

    def run(group):
        mine = programs.model("qwen2")
        enable(mine, group)
        processor = SequenceParallelProcessor(group)
        part = processor.preprocess(inputs)
        found = processor.gather_log_probs(mine(**part.inputs).logits, part)
        return torch.where(inputs["position_ids"][:, 1:] == 0, 0, found)

    for found in on_ranks(run, ranks=4)[1]:
        assert programs.largest_difference(found, alone) <= 1e-5


def test_f14_a_recomputed_layer_gets_the_mask_of_its_own_forward_pass():
    def gradients(group):
        policy, processor = programs.model("qwen2"), SequenceParallelProcessor(group)
        if group is not None:
            policy.activation_checkpointing_enable()
            enable(policy, group)
        sum(programs.loss_of(policy, processor, kind, 0)[0] for kind in ("left_padded", "packed", "plain")).backward()
        for parameter in policy.parameters() if group is not None else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        return {name: parameter.grad for name, parameter in policy.named_parameters()}

    expected = gradients(None)
    for found in on_ranks(gradients)[1]:
        assert programs.largest_difference(found, expected) <= 1e-5


def fake_flash_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, sliding_window=None, **others):
    """Takes what flash attention takes from transformers, and answers by a full mask."""
    assert module.config._attn_implementation == "flash_attention_2"
    assert others.get("position_ids") is None
    batch, heads, length, _ = query.shape
    place = torch.arange(length)
    seen = (place[:, None] >= place).expand(batch, 1, length, length)
    if sliding_window is not None:
        seen = seen & (place[:, None] - place < sliding_window)
    if attention_mask is not None:
        assert attention_mask.shape == (batch, length)
        seen = seen & attention_mask[:, None, None, :].bool()
    elif cu_seq_lens_q is not None:
        assert torch.equal(cu_seq_lens_q, others["cu_seq_lens_k"])
        assert others["max_length_q"] == others["max_length_k"] == cu_seq_lens_q.diff().max()
        number = torch.repeat_interleave(cu_seq_lens_q.diff()).view(batch, length)
        seen = seen & (number[:, None, :, None] == number[:, None, None, :])
    key, value = (tensor.repeat_interleave(heads // key.shape[1], dim=1) for tensor in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2), None


@pytest.mark.parametrize("kind", ["odd", "left_padded", "right_padded", "packed", "packed_odd"])
@pytest.mark.parametrize("architecture", ["qwen2_gqa", "mistral_sliding"])
def test_f14_flash_attention_gets_the_padding_and_the_boundaries_of_the_full_sequences(architecture, kind):
    def run(group):
        AttentionInterface.register("flash_attention_2", fake_flash_attention)
        policy = programs.model(architecture)
        policy.config = copy.copy(policy.config)
        for module in policy.modules():
            if hasattr(module, "config"):
                module.config = policy.config
        policy.config._attn_implementation = "flash_attention_2"
        enable(policy, group)
        return programs.loss_of(policy, SequenceParallelProcessor(group), kind, 0)[1]

    expected = programs.plain(architecture, kind)[1][0]
    for found in on_ranks(run, ranks=4)[1]:
        assert programs.largest_difference(found, expected) <= 1e-5


def test_a_batch_that_is_just_causal_needs_no_mask():
    def run(group):
        skipped = []

        def see(module, query, key, value, mask, **others):
            skipped.append(mask is None)
            return query.transpose(1, 2), None

        AttentionInterface.register("sdpa", see)
        policy, processor = programs.model("qwen2"), SequenceParallelProcessor(group)
        enable(policy, group)
        for kind in ("odd", "left_padded", "packed"):
            policy(**processor.preprocess(programs.batch(kind, 0)[0]).inputs)
        return skipped

    for found in on_ranks(run)[1]:
        assert found == [True, True, False, False, False, False]


def test_a_forward_pass_gathers_masks_once_and_exchanges_twice_a_layer():
    def run(group):
        policy = programs.model("qwen2_gqa")
        enable(policy, group)
        part = SequenceParallelProcessor(group).preprocess(programs.batch("left_padded", 0)[0])
        policy(**part.inputs)

    world, _ = on_ranks(run)
    mine = [event for event in world.trace if event.rank == 0]
    config = programs.CONFIGS["qwen2_gqa"][1]
    assert Counter(event.operation for event in mine)["all_gather"] == 1
    exchanged = [event.shape for event in mine if event.operation == "all_to_all_single"]
    tokens = programs.BATCH * 10 // 2
    to_heads = tokens * (config.hidden_size // 2 + config.hidden_size // 4)  # two kv heads for two ranks: none repeated
    assert exchanged == [(2, to_heads), (2, tokens * config.hidden_size // 2)] * 2


# -- slices and gathering ---------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(ranks=st.integers(1, 4), batch=st.integers(1, 3), length=st.integers(1, 13), seed=st.integers(0, 9))
def test_slices_put_together_are_the_batch(ranks, batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids, labels, positions, mask = (torch.randint(1, 50, (batch, length), generator=generator) for _ in range(4))
    scores = torch.randn(batch, length, 2, generator=generator)
    missing = -length % ranks

    def run(group):
        processor = SequenceParallelProcessor(group)
        part = processor.preprocess(ids, mask, positions, labels)
        names = ("input_ids", "attention_mask", "position_ids", "next_ids", "shift_labels")
        whole = {name: processor.postprocess(getattr(part, name), part.length) for name in names}
        local = functional.pad(scores, (0, 0, 0, missing)).chunk(ranks, dim=1)[dist.get_rank()]
        return part, whole, processor.postprocess(local, length)

    results = on_ranks(run, ranks)[1]
    for part, whole, gathered in results:
        assert part.length == length
        assert part.input_ids.shape == (batch, (length + missing) // ranks)
        assert torch.equal(whole["input_ids"], ids)
        assert torch.equal(whole["attention_mask"], mask)
        assert torch.equal(whole["position_ids"], positions)
        assert torch.equal(whole["next_ids"][:, :-1], ids[:, 1:])
        assert torch.equal(whole["shift_labels"][:, :-1], labels[:, 1:])
        assert torch.all(whole["shift_labels"][:, -1] == -100)
        assert torch.equal(gathered, scores)
    padding = torch.cat([part.attention_mask for part, _, _ in results], dim=1)[:, length:]
    targets = torch.cat([part.shift_labels for part, _, _ in results], dim=1)[:, length:]
    assert not padding.any()
    assert torch.all(targets == -100)


def test_the_gradient_of_gathered_values_is_the_own_slice_times_the_number_of_ranks():
    def run(group):
        mine = torch.ones(1, 2, requires_grad=True)
        gathered = SequenceParallelProcessor(group).postprocess(mine, 3)
        (gathered * torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
        return mine.grad.tolist()

    assert on_ranks(run)[1] == [[[2.0, 4.0]], [[6.0, 0.0]]]


@pytest.mark.parametrize("group", [None, "world"])
def test_with_one_rank_nothing_is_cut_and_no_model_is_changed(group):
    def run(world):
        processor = SequenceParallelProcessor(None if group is None else world)
        ids, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]])
        part = processor.preprocess(ids, mask, labels=ids)
        assert part.input_ids is ids
        assert part.attention_mask is mask
        assert part.position_ids is None
        assert part.next_ids.tolist() == [[2, 3, 0]]
        assert part.shift_labels.tolist() == [[2, 3, -100]]
        values = torch.ones(1, 3, 4)
        assert processor.postprocess(values, 3) is values
        policy = programs.model("qwen2")
        enable(policy, world)
        assert policy.config._attn_implementation == "sdpa"

    world, _ = on_ranks(run, ranks=1)
    assert world.trace == []


def test_a_batch_may_come_as_a_mapping():
    inputs, _ = programs.batch("left_padded", 0)

    def run(group):
        processor = SequenceParallelProcessor(group)
        one, other = processor.preprocess(inputs), processor.preprocess(**inputs)
        return all(torch.equal(value, other.inputs[name]) for name, value in one.inputs.items())

    assert on_ranks(run)[1] == [True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.ones(3)}, r"input_ids of shape \(3,\), expected \(batch, length\)"),
        ({"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 2)}, r"attention_mask .*expected \(1, 3\)"),
        ({"input_ids": torch.ones(2, 3), "position_ids": torch.ones(3)}, r"expected \(2, 3\) or \(1, 3\)"),
        ({"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 4)}, r"labels of shape \(1, 4\)"),
        ({"input_ids": {"input_ids": torch.ones(1, 3), "advantages": torch.ones(1, 3)}}, "got a batch with advantages"),
        ({"input_ids": {}}, "got a batch with nothing"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SequenceParallelProcessor().preprocess(**arguments)


def test_values_that_do_not_fit_the_slice_are_refused():
    def run(group):
        SequenceParallelProcessor(group).postprocess(torch.ones(1, 5), length=5)

    refused(run, r"values of shape \(1, 5\) for sequences of length 5 on 2 ranks, expected \(batch, 3")


# -- on and off -------------------------------------------------------------------------------------------------------


def full_log_probs(policy):
    return programs.loss_of(policy, SequenceParallelProcessor(), "left_padded", 0)[1]


def test_a_disabled_model_works_on_full_sequences_again():
    def run(group):
        policy = programs.model("qwen2")
        modules = {name: set(vars(module)) for name, module in policy.named_modules()}
        enable(policy, group)
        assert policy.config._attn_implementation == "lightrft_ulysses"
        enable(policy, group)  # again is a no-op
        disable(policy)
        disable(policy)
        assert policy.config._attn_implementation == "sdpa"
        assert {name: set(vars(module)) for name, module in policy.named_modules()} == modules
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in policy.modules())
        return full_log_probs(policy)

    world, results = on_ranks(run)
    assert world.trace == []
    assert all(torch.equal(found, full_log_probs(programs.model("qwen2"))) for found in results)


def test_another_model_of_the_same_configuration_is_not_touched():
    def run(group):
        policy, reference = programs.model("qwen2"), programs.model("qwen2")
        assert policy.config is reference.config
        enable(policy, group)
        return full_log_probs(reference)

    world, results = on_ranks(run)
    assert world.trace == []
    assert all(torch.equal(found, full_log_probs(programs.model("qwen2"))) for found in results)


def test_a_copy_of_an_enabled_model_is_enabled_and_disabled_on_its_own():
    expected = full_log_probs(programs.model("qwen2"))

    def run(group):
        policy, processor = programs.model("qwen2"), SequenceParallelProcessor(group)
        enable(policy, group)
        average = copy.deepcopy(policy)
        sliced = programs.loss_of(average, processor, "left_padded", 0)[1]
        disable(average)
        return sliced, full_log_probs(average), programs.loss_of(policy, processor, "left_padded", 0)[1]

    for results in on_ranks(run)[1]:
        for found in results:
            assert programs.largest_difference(found, expected) <= 1e-5


def test_a_model_saved_while_it_is_enabled_says_nothing_of_it(tmp_path):
    def run(group):
        policy = programs.model("qwen2")
        enable(policy, group)
        policy.save_pretrained(tmp_path / str(dist.get_rank()))

    on_ranks(run)
    saved = json.loads((tmp_path / "0" / "config.json").read_text())
    assert "lightrft" not in json.dumps(saved)
    assert saved["num_attention_heads"] == 4


class Critic(torch.nn.Module):
    """A value for each token, from a model without head."""

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Qwen2Model(config)
        self.head = torch.nn.Linear(config.hidden_size, 1)

    def forward(self, **inputs):
        return self.head(self.backbone(**inputs).last_hidden_state).squeeze(-1)


def test_f14_values_of_a_critic_are_the_same():
    config = programs.CONFIGS["qwen2_gqa"][1]
    ids = programs.batch("odd", 0)[0]["input_ids"]

    def run(group):
        critic, processor = Critic(config), SequenceParallelProcessor(group)
        enable(critic, group)
        part = processor.preprocess(ids)
        return processor.postprocess(critic(**part.inputs), part.length).detach()

    expected = Critic(config)(input_ids=ids).detach()
    for found in on_ranks(run)[1]:
        assert programs.largest_difference(found, expected) <= 1e-5


@ignore_warnings_of_libraries
def test_f14_adapters_get_the_same_gradients():
    import peft

    def gradients(group):
        base, processor = programs.model("qwen2"), SequenceParallelProcessor(group)
        base.config = copy.deepcopy(base.config)  # peft writes to it
        torch.manual_seed(1)
        policy = peft.get_peft_model(
            base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        if group is not None:
            enable(policy, group)
        programs.loss_of(policy, processor, "left_padded", 0)[0].backward()
        trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
        for parameter in trained.values() if group is not None else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        return {name: parameter.grad for name, parameter in trained.items()}

    expected = gradients(None)
    for found in on_ranks(gradients)[1]:
        assert programs.largest_difference(found, expected) <= 1e-5


# -- refused ----------------------------------------------------------------------------------------------------------


def tiny_qwen2(**more):
    return Qwen2Model(Qwen2Config(**{**programs._settings(4, 4), **more}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "got Linear, in which there is no transformers model"),
        (lambda: tiny_qwen2(num_attention_heads=3, num_key_value_heads=1, hidden_size=24), "sp_size 2 and 3 attention"),
        (
            lambda: T5Model(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
            "several parts",
        ),
        (
            lambda: Mamba2ForCausalLM(
                Mamba2Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_heads=2, head_dim=8, n_groups=1)
            ),
            "sequence parallelism knows full_attention, sliding_attention",
        ),
        (lambda: tiny_qwen2(layer_types=["full_attention", "chunked_attention"]), "of type chunked_attention"),
        (lambda: tiny_qwen2(attn_implementation="flex_attention"), "attention 'flex_attention'; expected one of sdpa"),
    ],
)
def test_a_model_that_cannot_be_sequence_parallel_is_refused(make, message):
    model = make()
    refused(lambda group: enable(model, group), message)


def test_a_second_group_is_refused():
    def run(group):
        policy = programs.model("qwen2")
        enable(policy, group)
        enable(policy, dist.new_group([0, 1]))

    refused(run, "enabled with another group: disable it first")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": None}, "got position_ids of none .*pass those that preprocess returns"),
        ({"position_ids": torch.arange(10)[None]}, r"position_ids of shape \(1, 10\)"),
        ({"attention_mask": torch.ones(2, 10)}, r"attention mask of shape \(2, 10\) in Qwen2Model, expected \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"attention mask of shape \(2, 1, 5, 5\)"),
        ({"labels": torch.ones(2, 5, dtype=torch.long)}, "got labels in Qwen2ForCausalLM"),
        ({"past_key_values": object()}, r"disable\(model\) to generate"),
    ],
)
def test_inputs_that_would_give_wrong_results_are_refused(change, message):
    def run(group):
        policy = programs.model("qwen2")
        enable(policy, group)
        part = SequenceParallelProcessor(group).preprocess(programs.batch("left_padded", 0)[0])
        policy(**{**part.inputs, **change})

    refused(run, message)


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_pass_around_the_hooks_is_refused(fails):
    def run(group):
        policy = programs.model("qwen2")
        enable(policy, group)
        part = SequenceParallelProcessor(group).preprocess(programs.batch("left_padded", 0)[0])
        with pytest.raises(IndexError) if fails else contextlib.nullcontext():
            policy(**{**part.inputs, "input_ids": part.input_ids + fails * 1000})
        policy.model.forward(**part.inputs)  # what the others knew of their sequences is forgotten

    refused(run, r"expected model\(\.\.\.\), not model\.forward")


def test_shift_labels_give_the_loss_of_the_slice():
    def run(group):
        policy, processor = programs.model("qwen2"), SequenceParallelProcessor(group)
        enable(policy, group)
        part = processor.preprocess({**inputs, "labels": labels})
        loss = policy(**part.inputs, labels=part.shift_labels, shift_labels=part.shift_labels).loss
        return loss.item() * (part.shift_labels != -100).sum().item()

    inputs, _ = programs.batch("odd", 0)
    labels = torch.where(inputs["input_ids"] % 3 == 0, -100, inputs["input_ids"])
    expected = programs.model("qwen2")(**inputs, labels=labels).loss.item() * (labels[:, 1:] != -100).sum().item()
    assert sum(on_ranks(run)[1]) == pytest.approx(expected, rel=1e-5)


def test_the_example_of_the_page_works():
    page = (Path(__file__).parents[2] / "docs" / "sequence-parallelism.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {"__name__": "example"})
