"""What trainers are tested with: an actor and a critic around a tiny transformer, and an engine without a model."""

import random
from typing import NamedTuple

import torch
from torch import nn

from lightrft.datasets import Prompt
from lightrft.sim.contracts.strategy import workload
from lightrft.sim.contracts.strategy.recorder import Recorder
from lightrft.strategy import get_strategy
from lightrft.strategy.requests import Completion
from lightrft.strategy.sampling import SamplingParams
from lightrft.strategy.utils.fingerprints import fingerprint
from lightrft.trainer.rewards import Rewards, RewardSource

__all__ = ["Actor", "Critic", "Draws", "EvenTokens", "Prompt", "parts", "prompts", "weights_of"]


class Scores(NamedTuple):
    log_probs: torch.Tensor
    entropy: torch.Tensor | None


class Actor(nn.Module):
    def __init__(self, seed=0, dropout=0.0):
        super().__init__()
        self.model = workload.transformer(seed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, sequences, attention_mask, *, temperature=1.0, entropy=False):
        every = (self.dropout(self.model(sequences))[:, :-1].float() / temperature).log_softmax(-1)
        found = every.gather(2, sequences[:, 1:].unsqueeze(2)).squeeze(2).clone()  # FSDP2 wants no view
        return Scores(found, -(every.exp() * every).sum(2) if entropy else None)


class Critic(nn.Module):
    def __init__(self, seed=1):
        super().__init__()
        self.model = workload.transformer(seed)

    def forward(self, sequences, attention_mask):
        return self.model(sequences)[..., 0].clone()


class Draws(Recorder):
    """An engine whose completions follow from the weights that it was sent, bit by bit, the prompt and the seed."""

    def generate(self, requests, sampling_params):
        self._must_be_able_to_generate()
        params = SamplingParams.of(sampling_params)
        self.requests.append(list(requests))
        digest = [fingerprint(tensor) for tensor in self.weights.values()]
        return [self._drawn(one, params, digest, sample) for one in requests for sample in range(params.n)]

    def _drawn(self, request, params, digest, sample):
        chance = random.Random(repr((digest, request.prompt_token_ids, params.seed, sample)))
        length = chance.randint(1, params.max_tokens)
        known = [token for token in range(2, workload.VOCABULARY) if token not in (params.logit_bias or {})]
        return Completion(
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=tuple(chance.choice(known) for _ in range(length)),
            log_probs=(-3.0,) * length,
            finish_reason="length" if length == params.max_tokens else "stop",
            weight_version=self.weight_version,
            text=f"answer {sample} to {request.prompt_token_ids}",
        )


class EvenTokens(RewardSource):
    """The share of even tokens in each response."""

    name = "even"

    def __call__(self, samples):
        shares = torch.tensor(
            [
                sum(token % 2 == 0 for token in one.output_token_ids) / max(len(one.output_token_ids), 1)
                for one in samples
            ],
            dtype=torch.float32,
        )
        return Rewards(rewards=shares, metrics={"accuracy": shares.round()} if samples else {})


def prompts(count, longest=4):
    """Prompts of 1 to ``longest`` tokens, each another one."""
    return [
        Prompt(prompt=f"p{i}", token_ids=(*[3] * (i % longest), 2 + i % 22), label=i, index=i) for i in range(count)
    ]


def parts(*, critic=True, initial=True, ema=False, engine=None, lr=1e-2, dropout=0.0, sgd=False, **settings):
    """A strategy with an engine, and what a trainer is given beside it; the fake strategy unless settings say more."""
    strategy = get_strategy(
        {
            "strategy": None if {"fsdp", "zero_stage"} & set(settings) else "fake",
            "train_batch_size": 8,
            "micro_train_batch_size": 2,
            "rollout_batch_size": 8,
            "micro_rollout_batch_size": 4,
            "prompt_max_len": 8,
            "generate_max_len": 6,
            **settings,
        }
    )
    trained = []
    for each in (Actor(dropout=dropout), Critic() if critic else None):
        optimizer = None if each is None else _optimizer(strategy, each, lr, sgd)
        rate = None if each is None else torch.optim.lr_scheduler.LambdaLR(optimizer, _falling)
        trained.append((each, optimizer, rate))
    (actor, optim, rate), (other, critic_optim, critic_rate) = strategy.prepare(*trained, is_rlhf=True)
    strategy.inference_engine = engine or Draws()
    return {
        "strategy": strategy,
        "actor": actor,
        "critic": other,
        "initial_model": strategy.prepare(Actor().requires_grad_(False)) if initial else None,
        "ema_model": strategy.prepare(Actor().requires_grad_(False)) if ema else None,
        "actor_optim": optim,
        "critic_optim": critic_optim,
        "actor_scheduler": rate,
        "critic_scheduler": critic_rate,
    }


def _optimizer(strategy, model, lr, sgd):
    return torch.optim.SGD(model.parameters(), lr=lr) if sgd else strategy.create_optimizer(model, lr=lr)


def _falling(step):
    return 0.9**step


def weights_of(trainer):
    """All weights of the models of ``trainer``, whole. *Collective*."""
    models = {"actor": trainer.actor, "critic": trainer.critic, "ema": trainer.ema_model}
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, model in models.items()
        if model is not None
        for key, tensor in trainer.strategy.full_parameters(model)
    }
