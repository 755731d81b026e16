"""Prompts on their way to an engine and back."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError, LightRFTError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy.engines import Recorder
from lightrft.strategy import get_strategy
from lightrft.strategy.requests import Request, requests_of


class Echo(Recorder):
    """Completes a prompt by what it is asked for: the prompt's tokens, ``n`` times."""

    def __init__(self, *, leads=False, fails_on=None):
        super().__init__()
        self._leads, self._fails_on = leads, fails_on

    @property
    def runs_on_all_ranks(self):
        return not self._leads

    def generate(self, requests, sampling_params):
        self.asked.append(len(requests))
        if self._fails_on == dist.get_rank():
            raise ValueError("no memory left")
        return [
            (request.prompt or request.prompt_token_ids, request.images + request.videos, sample)
            for request in requests
            for sample in range(sampling_params["n"])
        ]


def generate(size, tp, prompts, *, n=1, engine=None, **more):
    """What each rank gets for its entry of ``prompts``; and how often its engine was called."""

    def program():
        strategy = get_strategy({"strategy": "fake", "train_batch_size": size, "engine_tp_size": tp})
        strategy.inference_engine = own = Echo(**(engine or {}))
        rank = strategy.get_rank()
        mine = {name: values[rank] for name, values in more.items()}
        try:
            found = strategy.gather_and_generate({"n": n}, all_prompt_token_ids=prompts and prompts[rank], **mine)
        except LightRFTError as error:
            found = f"{type(error).__name__}: {error}"
        asked = [one for one in own.asked if isinstance(one, int)]
        dist.destroy_process_group()
        return found, asked, str(strategy.inference_engine_status)

    return SimWorld(size).run(program)


ranks_prompts = st.lists(
    st.lists(st.lists(st.integers(0, 2**31), max_size=5).map(tuple), max_size=4), min_size=4, max_size=4
)


@settings(max_examples=30, deadline=None)
@given(ranks_prompts, st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans())
def test_k05_every_rank_gets_the_completions_of_its_own_prompts(prompts, tp, n, leads):
    found = generate(4, tp, prompts, n=n, engine={"leads": leads})
    for rank, (completions, asked, status) in enumerate(found):
        assert completions == [(tuple(prompt), (), sample) for prompt in prompts[rank] for sample in range(n)]
        first = rank - rank % tp
        total = sum(len(each) for each in prompts[first : first + tp])
        runs = total > 0 and (not leads or rank == first)
        assert asked == ([total] if runs else [])
        assert status == "asleep"


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_k06_text_and_media_mix_across_ranks(kind):
    media = {f"all_{kind}": [["i", "j", "k"], [None]], f"{kind}_num": [[1, 2], None]}
    found = generate(2, 2, None, all_prompts=[["a", "b"], ["c"]], **media)
    assert [completions for completions, *_ in found] == [[("a", ("i",), 0), ("b", ("j", "k"), 0)], [("c", (), 0)]]


def test_k06_images_and_videos_of_one_prompt():
    (one, other) = requests_of(prompts=["a", "b"], images=["i", None], videos=["v", "w"], videos_num=[0, 2])
    assert (one.images, one.videos, other.images, other.videos) == (("i",), (), (), ("v", "w"))
    with pytest.raises(ConfigError, match="videos_num asks for 2 videos, and there are none"):
        requests_of(prompts=["a"], videos_num=[2])
    with pytest.raises(ConfigError, match="all_videos has 2 entries for 1 prompts: .* or videos_num"):
        requests_of(prompts=["a"], videos=["v", "w"])
    with pytest.raises(ConfigError, match="videos_num adds up to 3, and there are 2 videos"):
        requests_of(prompts=["a"], videos=["v", "w"], videos_num=[3])


@pytest.mark.parametrize("leads", [True, False])
def test_k10_an_error_on_one_rank_reaches_its_group_and_no_other(leads):
    found = generate(4, 2, [[(1,)]] * 4, engine={"leads": leads, "fails_on": 2})
    texts = [str(completions) for completions, *_ in found]
    assert texts[:2] == ["[((1,), (), 0)]"] * 2
    assert texts[2] == texts[3]
    assert "no memory left" in texts[2]


def test_k10_bad_prompts_on_one_rank_are_an_error_on_its_group():
    found = generate(2, 2, None, all_prompts=[["a"], ["b"]], all_images=[None, ["i", "j"]])
    assert found[0][0] == found[1][0]
    assert "ConfigError" in found[0][0]
    assert "2 entries for 1 prompts" in found[0][0]


def test_images_are_shared_out_as_their_numbers_say():
    found = requests_of(prompts=["a", "b", "c"], images=["i", "j", "k"], images_num=[2, 0, 1])
    assert [request.images for request in found] == [("i", "j"), (), ("k",)]
    with pytest.raises(ConfigError, match="adds up to 2, and there are 3"):
        requests_of(prompts=["a", "b"], images=["i", "j", "k"], images_num=[2, 0])
    with pytest.raises(ConfigError, match="not both"):
        requests_of(token_ids=[[1]], prompts=["a"])
    with pytest.raises(ConfigError, match="not both"):
        Request()


def test_token_ids_travel_as_tensors():
    def program():
        strategy = get_strategy({"strategy": "fake", "train_batch_size": 2, "engine_tp_size": 2})
        strategy.inference_engine = Echo()
        strategy.gather_and_generate({"n": 1}, all_prompt_token_ids=[torch.arange(1000).tolist()])
        dist.destroy_process_group()

    world = SimWorld(2)
    world.run(program)
    sizes = [event.shape for event in world.trace if event.rank == 0 and event.operation.startswith("all_gather")]
    assert any(size and 8000 <= size[-1] <= 8100 for size in sizes), sizes
