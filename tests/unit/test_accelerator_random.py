"""Random numbers that are drawn on simulated devices."""

import pytest
import torch
from ranks_with_devices import in_rank, on_two_ranks
from torch.utils.checkpoint import checkpoint

DRAWS = [
    lambda: torch.rand(5, device="cuda"),
    lambda: torch.randn(5, device=torch.device("cuda")),
    lambda: torch.randint(0, 1000, (5,), device="cuda"),
    lambda: torch.randperm(50, device="cuda:0"),
    lambda: torch.normal(0.0, 1.0, (5,), device=0),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_on_a_device_follow_its_seed_and_nothing_else(draw):
    def ask():
        torch.cuda.manual_seed(5)
        first = draw()
        second = draw()
        torch.cuda.manual_seed_all(5)
        cpu = torch.get_rng_state()
        assert torch.equal(draw(), first)
        assert torch.equal(torch.get_rng_state(), cpu)
        torch.rand(3)
        assert torch.equal(draw(), second)
        assert not torch.equal(first, second)

    in_rank(ask)


def test_the_cpu_generator_does_not_follow_the_device_seed():
    def ask():
        torch.manual_seed(3)
        torch.cuda.manual_seed(99)
        return torch.rand(3)

    assert torch.equal(in_rank(ask), torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_manual_seed_seeds_the_devices_too():
    def ask():
        torch.manual_seed(3)
        first = torch.rand(3, device="cuda:1")
        torch.manual_seed(3)
        assert torch.equal(torch.rand(3, device="cuda:1"), first)
        assert torch.cuda.initial_seed() == 3

    in_rank(ask)


def test_a_seed_set_before_there_is_a_context_goes_to_device_0():
    def ask():
        torch.cuda.manual_seed(5)
        torch.cuda.set_device(1)
        return [generator.initial_seed() for generator in torch.cuda.default_generators]

    assert in_rank(ask) == [5, torch.Generator().initial_seed()]


def test_random_state_is_16_bytes_that_can_be_put_back():
    def ask():
        states = torch.cuda.get_rng_state_all()
        assert [tuple(state.shape) for state in states] == [(16,), (16,)]
        first = torch.rand(3, device="cuda")
        assert torch.cuda.default_generators[0].get_offset() == 4
        torch.cuda.set_rng_state_all(states)
        assert torch.equal(torch.rand(3, device="cuda"), first)
        state = torch.cuda.get_rng_state("cuda:0")
        after = torch.rand(3, device="cuda")
        torch.cuda.set_rng_state(state, 0)
        with torch.random.fork_rng(devices=[0]):
            assert torch.equal(torch.rand(3, device="cuda"), after)
        assert torch.equal(torch.rand(3, device="cuda", generator=torch.cuda.default_generators[0]), after)
        with pytest.raises(RuntimeError, match="expected the 16 bytes"):
            torch.cuda.set_rng_state(torch.get_rng_state())

    in_rank(ask)


def test_a_random_seed_is_the_same_in_every_run_and_another_on_every_rank():
    def ask():
        torch.cuda.init()
        torch.cuda.seed()
        first = torch.cuda.initial_seed()
        torch.cuda.seed()
        return first, torch.cuda.initial_seed()

    seeds = on_two_ranks(ask)
    assert len({*seeds[0], *seeds[1]}) == 4
    assert on_two_ranks(ask) == seeds


def test_a_generator_for_a_device_draws_for_it():
    def ask():
        generator = torch.Generator(device="cuda").manual_seed(1)
        assert isinstance(generator, torch.Generator)
        assert isinstance(torch.default_generator, torch.Generator)
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(3, device="cuda", generator=generator)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        return drawn

    assert torch.equal(in_rank(ask), torch.rand(3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_draws_on_a_device(reentrant):
    def ask():
        factors = []

        def layer(x):
            factors.append(torch.rand(4, device="cuda"))
            return x * factors[-1]

        x = torch.ones(4, device="cuda", requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        assert len(factors) == 2
        assert torch.equal(x.grad, factors[0])
        assert torch.equal(*factors)

    in_rank(ask)
