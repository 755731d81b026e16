"""Requests: what is given is checked, and kept as it was."""

import numpy as np
import pytest
import torch

from lightrft.errors import ConfigError
from lightrft.strategy.requests import Request, request_of, requests_of


@pytest.mark.parametrize(
    "given",
    [
        [[3, 4], [5]],
        [(3, 4), (5,)],
        [np.array([3, 4]), np.array([5])],
        [torch.tensor([3, 4]), torch.tensor([5])],
        [[np.int32(3), torch.tensor(4)], [np.uint8(5)]],
    ],
)
def test_token_ids_are_plain_integers_whatever_holds_them(given):
    found = requests_of(given)
    assert [request.prompt_token_ids for request in found] == [(3, 4), (5,)]
    assert found == [request_of({"prompt_token_ids": ids}) for ids in given]
    assert {type(token) for request in found for token in request.prompt_token_ids} == {int}


@pytest.mark.parametrize(
    "given", ["12", b"12", [1.7, 2.9], [True, False], ["1"], [torch.tensor(True)], torch.tensor([1.0]), 3]
)
def test_what_is_no_token_id_is_refused(given):
    with pytest.raises(ConfigError, match="the prompt .* is no list of token ids: "):
        requests_of([given])
    with pytest.raises(ConfigError, match="the prompt .* is no list of token ids: "):
        request_of({"prompt_token_ids": given})


@pytest.mark.parametrize("given", ["12", {"input_ids": [[3]]}])
def test_prompts_are_a_list(given):
    with pytest.raises(
        ConfigError, match=f"all_prompt_token_ids is a {type(given).__name__}: expected a list of lists"
    ):
        requests_of(given)


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="the prompt 5 is a int: expected a text"):
        requests_of(prompts=[5])


@pytest.mark.parametrize("numbers", [[2, -1], [0.5, 0.5], ["1", "0"], [True, False], [None, 1], 3])
def test_numbers_of_images_are_counts(numbers):
    with pytest.raises(ConfigError, match="images_num=.*: expected (0 or more|an integer) for each prompt"):
        requests_of([[3], [4]], images=["i"], images_num=numbers)
    assert requests_of([[3], [4]], images=["i"], images_num=torch.tensor([0, 1]))[1].images == ("i",)


def test_lists_that_were_given_can_be_changed_afterwards():
    tokens, images = [1, 2], ["i"]
    request = Request(prompt_token_ids=tokens, images=images)
    tokens.append(3)
    images.append("j")
    assert request == Request(prompt_token_ids=(1, 2), images=("i",))
    assert hash(request) == hash(Request(prompt_token_ids=(1, 2), images="i"))
