"""Prompts on their way to an engine and back."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError, LightRFTError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy.engines import Recorder
from lightrft.strategy import get_strategy, packing
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


class Unreadable:
    def __reduce__(self):
        raise OSError("image file is truncated")


@pytest.mark.parametrize("leads", [True, False])
@pytest.mark.parametrize(
    ("prompts", "images", "why"),
    [
        ([[(1,)], [(2**70,)]], None, "Overflow"),
        ([[(1,)], [(2,)]], [None, [Unreadable()]], "OSError: image file is truncated"),
    ],
    ids=["number", "image"],
)
def test_k10_a_prompt_that_cannot_be_sent_is_an_error_on_its_group(leads, prompts, images, why):
    more = {} if images is None else {"all_images": images}
    found = generate(2, 2, prompts, engine={"leads": leads}, **more)
    assert found[0] == found[1]
    assert found[0][0].startswith(
        "ConfigError: prompts were not gathered: rank 1: a prompt cannot be sent to other ranks"
    )
    assert why in found[0][0]
    assert found[0][1:] == ([], "asleep")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.text(max_size=3), st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple)),
            st.lists(st.binary(max_size=9), max_size=2).map(tuple),
            st.lists(st.text(max_size=3), max_size=2).map(tuple),
        ),
        max_size=5,
    ),
    st.integers(0, 3),
)
def test_packed_requests_are_as_they_were(prompts, padding):
    requests = [
        Request(**{"prompt" if isinstance(one, str) else "prompt_token_ids": one}, images=images, videos=videos)
        for one, images, videos in prompts
    ]
    data = packing.packed(requests)
    assert packing.unpacked(torch.nn.functional.pad(data, (0, 8 * padding))) == requests


def travelled(leads, **prompts):
    """Bytes that a rank, which is not the first of its two, has sent and received with prompts."""

    def program():
        strategy = get_strategy({"strategy": "fake", "train_batch_size": 2, "engine_tp_size": 2})
        strategy.inference_engine = Echo(leads=leads)
        strategy.gather_and_generate({"n": 1}, **prompts)
        dist.destroy_process_group()

    world = SimWorld(2)
    world.run(program)
    found = [event for event in world.trace if event.rank == 1 and event.shape and event.shape[-1] >= 8000]
    return [(event.operation, event.shape[-1]) for event in found]


def test_token_ids_travel_as_tensors_and_only_to_ranks_that_generate():
    ids = torch.arange(1000).tolist()
    words = 3 + 1 + 1000  # the sizes, the length of the prompt, the prompt
    assert travelled(False, all_prompt_token_ids=[ids]) == [("all_gather", 8 * words)]
    assert travelled(True, all_prompt_token_ids=[ids])[:1] == [("gather", 8 * words)]
    (with_image,) = travelled(False, all_prompt_token_ids=[ids, [1]], all_images=[None, b"x" * 100])
    assert 8 * (words + 2) + 100 < with_image[1] < 8 * (words + 2) + 250


def test_f12_ranks_that_ask_the_leader_for_other_things_are_told():
    def program(prompts):
        strategy = get_strategy({"strategy": "fake", "train_batch_size": 2, "engine_tp_size": 2})
        strategy.inference_engine = Echo(leads=True)
        try:
            return strategy.engine_generate_local({"n": 1}, prompt_token_ids=prompts[strategy.get_rank()])
        except ConfigError as error:
            return str(error)
        finally:
            dist.destroy_process_group()

    alike = SimWorld(2).run(program, [[(3, 4)], [(3, 4)]])
    assert alike == [[((3, 4), (), 0)]] * 2
    other = SimWorld(2).run(program, [[(3, 4)], [(3, 5)]])
    assert other[0] == other[1]
    assert "nothing was generated: the digest of prompts is" in other[0]
