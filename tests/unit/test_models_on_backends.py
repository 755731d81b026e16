"""Actor, critic and reward model under every backend: the numbers of the plain model, engines, files."""

import pytest
import torch
import torch.distributed as dist
from model_batches import batch, seen_batch

from lightrft.errors import CollectiveMismatchError, DeadlockError, RankFailedError
from lightrft.models import Actor, Critic, RewardModel, tiny
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import SETTINGS
from lightrft.strategy import get_strategy

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("deepspeed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries below

SIZE = 2
RATE = 0.01
WAYS = {
    "plain": {},
    "fused": {"fused_linear_logprob": True, "chunk_size": 50},
    "packed": {"packing_samples": True},
    "packed, fused, recomputed": {
        "packing_samples": True, "fused_linear_logprob": True, "gradient_checkpointing": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    tiny.tiny_text_model(path, tie_word_embeddings=request.param)
    return path


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    tiny.tiny_text_model(path)
    return path


def in_world(program, *args, size=SIZE):
    def on_rank():
        try:
            return program(*args)
        finally:
            dist.destroy_process_group()

    return SimWorld(size, stall_limit=15).run(on_rank)


def strategy_of(name, **settings):
    return get_strategy({**SETTINGS[name], "train_batch_size": SIZE, "max_norm": 0.0, **settings})


def own(strategy):
    """What this rank trains on: of its own, or shared by its sequence-parallel group."""
    return batch((7, 3, 5), 8, seed=strategy.groups.dp_rank)


def loss_of(found):
    if isinstance(found, torch.Tensor):
        return found.pow(2).mean()
    return found.log_probs.pow(2).mean() / 10 + found.entropy.mean()


def called(model, ids, mask, **images):
    """What ``model`` says; an actor inside of an engine of DeepSpeed too."""
    inner = getattr(model, "module", model)
    more = {"temperature": 0.7, "entropy": True} if isinstance(inner, Actor) else {}
    return model(ids, mask, **more, **images)


def numbers(found):
    return found.detach().clone() if isinstance(found, torch.Tensor) else found.log_probs.detach().clone()


def trained(name, kind, folder, settings, meta=False, **how):
    """What the model says before and after a step, the norm of its gradient, and its weights."""
    strategy = strategy_of(name, **settings)
    with strategy.init_model_context(meta_init=meta):
        model = kind.from_pretrained(folder, settings=strategy.config, **how)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=RATE)
    model, optimizer, _ = strategy.prepare((model, optimizer, None))
    ids, mask = own(strategy)
    found = []
    for _ in range(2):
        scores = called(model, ids, mask)
        found.append(numbers(scores))
        strategy.backward(loss_of(scores), model, optimizer)
        norm = strategy.optimizer_step(optimizer, model)
    return found, norm, {key: one.detach().clone() for key, one in strategy.full_parameters(model)}


def plainly(kind, folder, ranks=SIZE):
    """The same with the samples of all ranks, in one process without a backend."""
    model = kind.from_pretrained(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    found = [[] for _ in range(ranks)]
    for _ in range(2):
        for rank in range(ranks):
            scores = called(model, *batch((7, 3, 5), 8, seed=rank))
            found[rank].append(numbers(scores))
            (loss_of(scores) / ranks).backward()
        norm = torch.nn.utils.get_total_norm(one.grad for one in model.parameters()).item()
        optimizer.step()
        optimizer.zero_grad()
    return found, norm, {name: one.detach() for name, one in model.named_parameters()}


def same(found, expected):
    scores, norm, weights = expected
    for rank, (got, got_norm, got_weights) in enumerate(found):
        torch.testing.assert_close(got, scores[rank % len(scores)], atol=1e-4, rtol=1e-4)
        assert got_norm == pytest.approx(norm, rel=1e-4)
        assert got_weights.keys() == weights.keys()
        torch.testing.assert_close(got_weights, weights, atol=2e-5, rtol=2e-5)


def usual(name, *usual_ones):
    """One of several kinds; those that say the least more take their time apart."""
    return pytest.param(*name, marks=() if name in usual_ones else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        usual((name, way), ("FSDP", "plain"), ("ZeRO-2", "fused"), ("ZeRO-3", "packed, fused, recomputed"))
        for name in SETTINGS
        for way in WAYS
    ],
)
def test_f15_an_actor_trains_the_same_everywhere(name, way, folder):
    same(in_world(trained, name, Actor, folder, WAYS[way]), plainly(Actor, folder))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        usual((name, kind), ("FSDP", Critic), ("ZeRO-2", RewardModel), ("ZeRO-3", Critic))
        for name in SETTINGS
        for kind in (Critic, RewardModel)
    ],
)
def test_values_are_trained_the_same_everywhere(name, kind, untied):
    same(in_world(trained, name, kind, untied, {"packing_samples": kind is Critic}), plainly(kind, untied))


@pytest.mark.parametrize(
    ("name", "kind"),
    [usual((name, kind), ("FSDP", Critic)) for name in ("FSDP", "ZeRO-3") for kind in (Actor, Critic)],
)
def test_models_may_be_built_where_they_have_no_storage(name, kind, folder):
    same(in_world(trained, name, kind, folder, {}, True), plainly(kind, folder))


@pytest.mark.parametrize(
    ("name", "kind"),
    [usual((name, kind), ("FSDP", Actor), ("ZeRO-2", Critic)) for name in SETTINGS for kind in (Actor, Critic)],
)
def test_f14_ranks_may_share_sequences(name, kind, untied):
    settings = {
        "train_batch_size": 1,
        "sp_size": 2,
        "packing_samples": name == "FSDP",
        "fused_linear_logprob": name != "fake, as FSDP",
    }
    same(in_world(trained, name, kind, untied, settings), plainly(kind, untied, ranks=1))


@pytest.mark.parametrize(
    ("name", "kind"), [usual((name, kind), ("FSDP", Actor)) for name in SETTINGS for kind in (Actor, Critic)]
)
def test_in_16_bits_numbers_come_in_32_and_are_nearly_the_same(name, kind, untied):
    settings = {"bf16": True, "fused_linear_logprob": True, "packing_samples": True}
    expected, norm, _ = plainly(kind, untied)
    for rank, (got, got_norm, _) in enumerate(in_world(trained, name, kind, untied, settings)):
        assert got[0].dtype == torch.float32
        torch.testing.assert_close(got[0], expected[rank][0], atol=0.3, rtol=0.1)
        assert got_norm == pytest.approx(norm, rel=0.15)


@pytest.mark.parametrize("name", [usual((name,), ("FSDP",)) for name in ("FSDP", "ZeRO-3")])
def test_a_frozen_reference_shares_sequences_too(name, untied):
    def program():
        strategy = strategy_of(name, sp_size=2)
        reference = strategy.prepare_reward_model(Actor.from_pretrained(untied))
        return numbers(called(reference, *batch(seed=0)))

    expected = numbers(called(Actor.from_pretrained(untied), *batch(seed=0)))
    for found in in_world(program):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [usual((name,), ("FSDP",)) for name in SETTINGS])
def test_adapters_are_trained_the_same_everywhere(name, untied):
    scores = in_world(trained, "fake, as FSDP", Actor, untied, {})[0][0]
    plain = in_world(lambda: trained("fake, as FSDP", Actor, untied, {}, lora={"r": 2}))
    for meta in (False, True):
        found = in_world(lambda built=meta: trained(name, Actor, untied, {}, built, lora={"r": 2}))
        for (got, got_norm, got_weights), (expected, expected_norm, expected_weights) in zip(found, plain, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            assert got_norm == pytest.approx(expected_norm, rel=1e-4)
            torch.testing.assert_close(got_weights, expected_weights, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(plain[0][0][0], scores[0])
    assert not torch.equal(plain[0][0][1], scores[1])


def with_nothing_on_one_rank(name, kind, folder, settings):
    """Two steps in which rank 1 has nothing but padding."""
    strategy = strategy_of(name, **settings)
    model = kind.from_pretrained(folder, settings=strategy.config)
    model, optimizer, _ = strategy.prepare((model, torch.optim.SGD(model.parameters(), lr=RATE), None))
    ids, mask = batch((7, 3, 5) if strategy.get_rank() == 0 else (0, 0, 0), 8)
    for _ in range(2):
        scores = called(model, ids, mask)
        strategy.backward(loss_of(scores), model, optimizer)
        norm = strategy.optimizer_step(optimizer, model)
    return numbers(scores), norm


@pytest.mark.parametrize(
    ("name", "kind", "way"),
    [
        usual((name, kind, way), ("FSDP", Actor, "packed"), ("ZeRO-3", Actor, "fused"))
        for name in SETTINGS
        for kind in (Actor, RewardModel)
        for way in WAYS
    ],
)
def test_k11_k23_a_rank_with_nothing_but_padding_keeps_step(name, kind, way, untied):
    (first, norm), (second, other) = in_world(with_nothing_on_one_rank, name, kind, untied, WAYS[way])
    assert first.abs().sum() > 0
    assert second.abs().sum() == 0
    assert norm == other > 0


# -- Engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [usual((name,), ("FSDP",)) for name in SETTINGS])
@pytest.mark.parametrize("lora", [None, {"r": 2, "init_lora_weights": False}])
def test_f06_f16_an_engine_generates_with_the_actors_weights(name, lora, folder):
    def program():
        settings = {"pretrain": folder, "prompt_max_len": 16, "generate_max_len": 16}
        strategy = strategy_of(name, **settings)
        with strategy.init_model_context():
            actor = Actor.from_pretrained(folder, lora=lora, settings=strategy.config)
        optimizer = torch.optim.SGD([one for one in actor.parameters() if one.requires_grad], lr=RATE)
        actor, optimizer, _ = strategy.prepare((actor, optimizer, None))
        ids, mask = own(strategy)
        strategy.backward(loss_of(called(actor, ids, mask)), actor, optimizer)
        strategy.optimizer_step(optimizer, actor)
        strategy.setup_inference_engine()
        strategy.update_engine_weights(actor)
        params = {"temperature": 0.7, "max_tokens": 8, "logprobs": 0, "ignore_eos": True}
        (one,) = strategy.gather_and_generate(params, all_prompt_token_ids=[[9, 10 + strategy.get_rank()]])
        whole = torch.tensor([[*one.prompt_token_ids, *one.output_token_ids]])
        found = actor(whole, torch.ones_like(whole), temperature=0.7).log_probs[0, -8:].detach()
        strategy.inference_engine.shutdown()
        return (found - torch.tensor(one.log_probs)).abs().max().item()

    assert max(in_world(program)) < 1e-4


# -- Files ------------------------------------------------------------------------------------------------------------


def saves(name, kind, folder, target, lora):
    strategy = strategy_of(name)
    with strategy.init_model_context():
        model = kind.from_pretrained(folder, settings=strategy.config, lora=lora)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=RATE)
    model, optimizer, _ = strategy.prepare((model, optimizer, None))
    ids, mask = own(strategy)
    strategy.backward(loss_of(called(model, ids, mask)), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    strategy.save_model(model, tiny.tokenizer(), target)
    strategy.save_ckpt(model, f"{target}/checkpoints")
    before = numbers(called(model, ids, mask))
    strategy.backward(loss_of(called(model, ids, mask)), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    after = numbers(called(model, ids, mask))
    strategy.load_ckpt(model, f"{target}/checkpoints")
    assert not torch.allclose(after, before, atol=1e-4)
    torch.testing.assert_close(numbers(called(model, ids, mask)), before, atol=1e-5, rtol=0)
    return ids, mask, before


@pytest.mark.parametrize(
    ("name", "kind", "lora"),
    [
        usual((name, kind, lora), ("FSDP", Actor, None), ("FSDP", Critic, None), ("FSDP", Actor, 2))
        for name in SETTINGS
        for kind in (Actor, Critic, RewardModel)
        for lora in (None, 2)
    ],
)
def test_a_model_is_saved_and_loaded(name, kind, lora, untied, tmp_path):
    target = str(tmp_path)
    for ids, mask, before in in_world(saves, name, kind, untied, target, lora and {"r": lora}):
        loaded = kind.from_pretrained(target)
        torch.testing.assert_close(numbers(called(loaded, ids, mask)), before, atol=2e-5, rtol=1e-5)
    if kind is Actor and lora is None:
        plain = transformers.AutoModelForCausalLM.from_pretrained(target)
        torch.testing.assert_close(numbers(called(Actor(plain), ids, mask)), before, atol=2e-5, rtol=1e-5)


# -- Images on some ranks ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sees(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    tiny.tiny_vision_model(path)
    return path


def trained_on_images(name, kind, folder, settings):
    """Rank 0 has images, rank 1 has none; in the second step neither has."""
    strategy = strategy_of(name, **settings)
    model = kind.from_pretrained(folder, settings=strategy.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model, optimizer, _ = strategy.prepare((model, optimizer, None))
    found = []
    for step in range(2):
        ids, mask, images, _ = seen_batch()
        first = strategy.get_rank() == 0 and step == 0
        own = slice(None) if first else slice(1, 2)
        scores = called(model, ids[own], mask[own], **images if first else {})
        found.append(numbers(scores))
        strategy.backward(loss_of(scores), model, optimizer)
        norm = strategy.optimizer_step(optimizer, model)
    return found, norm, {key: one.detach().clone() for key, one in strategy.full_parameters(model)}


def plainly_on_images(kind, folder):
    model = kind.from_pretrained(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = [[], []]
    for step in range(2):
        for rank in range(2):
            ids, mask, images, _ = seen_batch()
            first = rank == 0 and step == 0
            own = slice(None) if first else slice(1, 2)
            scores = called(model, ids[own], mask[own], **images if first else {})
            found[rank].append(numbers(scores))
            (loss_of(scores) / 2).backward()
        grads = [one.grad for one in model.parameters() if one.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item()
        optimizer.step()
        optimizer.zero_grad()
    return found, norm, {key: one.detach() for key, one in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [usual((name, kind), ("FSDP", Actor), ("ZeRO-3", Critic)) for name in SETTINGS for kind in (Actor, Critic)],
)
def test_f11_k24_mixed_mm_data_keeps_ranks_with_and_without_images_together(name, kind, sees):
    settings = {"mixed_mm_data": True, "packing_samples": name == "FSDP"}
    same(in_world(trained_on_images, name, kind, sees, settings), plainly_on_images(kind, sees))


@pytest.mark.parametrize("name", ["FSDP", "ZeRO-3"])
def test_f11_without_it_ranks_that_see_something_and_others_come_apart(name, sees):
    with pytest.raises((CollectiveMismatchError, DeadlockError, RankFailedError)):
        in_world(trained_on_images, name, Actor, sees, {})


def saves_what_sees(name, kind, folder, lora, target):
    strategy = strategy_of(name)
    with strategy.init_model_context(meta_init=True):
        model = kind.from_pretrained(folder, settings=strategy.config, lora=lora)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    model, optimizer, _ = strategy.prepare((model, optimizer, None))
    ids, mask, images, _ = seen_batch()
    first = called(model, ids, mask, **images)
    strategy.backward(loss_of(first), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    strategy.save_model(model, None, target)
    return numbers(first), numbers(called(model, ids, mask, **images))


@pytest.mark.parametrize(
    ("name", "kind", "lora"),
    [
        usual((name, kind, lora), ("FSDP", Actor, None))
        for name in SETTINGS
        for kind in (Actor, Critic, RewardModel)
        for lora in (None, 2)
    ],
)
def test_a_model_that_sees_is_saved_and_loaded(name, kind, lora, sees, tmp_path):
    (first, last), _ = in_world(saves_what_sees, name, kind, sees, lora and {"r": lora}, str(tmp_path))
    assert not torch.allclose(first, last, atol=1e-4)
    ids, mask, images, _ = seen_batch()
    loaded = kind.from_pretrained(tmp_path)
    torch.testing.assert_close(numbers(called(loaded, ids, mask, **images)), last, atol=5e-5, rtol=1e-5)
