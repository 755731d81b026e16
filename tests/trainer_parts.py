"""Small models with which trainers are tested: the interface of actors and critics, around a tiny Qwen2."""

import dataclasses
from typing import NamedTuple

import torch
from fake_models import tiny_model
from torch import nn

from lightrft.strategy import get_strategy

__all__ = ["Actor", "Critic", "Prompt", "made", "prompts"]


class Scores(NamedTuple):
    log_probs: torch.Tensor
    entropy: torch.Tensor | None


class Actor(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sequences, attention_mask, *, temperature=1.0, entropy=False):
        logits = self.model(input_ids=sequences, attention_mask=attention_mask).logits[:, :-1].float() / temperature
        every = logits.log_softmax(-1)
        found = every.gather(2, sequences[:, 1:].unsqueeze(2)).squeeze(2)
        return Scores(found, -(every.exp() * every).sum(2) if entropy else None)


class Critic(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.hidden_size, 1)

    def forward(self, sequences, attention_mask):
        hidden = self.model.model(input_ids=sequences, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden).squeeze(2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    prompt: str
    token_ids: tuple[int, ...]
    label: object = None
    images: tuple = ()
    index: int = 0


def prompts(count, longest=4):
    """Prompts of 1 to ``longest`` tokens; the label of each is its number."""
    return [
        Prompt(
            prompt=f"p{i}", token_ids=tuple(3 + (i + k) % 50 for k in range(1 + i % longest)), label=i, index=i
        )
        for i in range(count)
    ]


def made(folder, *, critic=True, initial=True, ema=False, lr=1e-2, **settings):
    """A strategy with an engine, and what a trainer is given beside it."""
    import transformers

    strategy = get_strategy(
        {"pretrain": folder, "prompt_max_len": 16, "generate_max_len": 8, "max_norm": 1.0, **settings}
    )

    def model():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    with strategy.init_model_context():
        actor, other = Actor(model()), Critic(model()) if critic else None
        reference = Actor(model()).requires_grad_(False) if initial else None
        average = Actor(model()).requires_grad_(False) if ema else None
    trained = []
    for each in (actor, other):
        optimizer = None if each is None else strategy.create_optimizer(each, lr=lr)
        rate = None if each is None else torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        trained.append((each, optimizer, rate))
    (actor, optim, rate), (other, critic_optim, critic_rate) = strategy.prepare(*trained, is_rlhf=True)
    reference = None if reference is None else strategy.prepare(reference)
    average = None if average is None else strategy.prepare(average)
    strategy.setup_inference_engine()
    return {
        "strategy": strategy, "actor": actor, "critic": other, "initial_model": reference, "ema_model": average,
        "actor_optim": optim, "critic_optim": critic_optim, "actor_scheduler": rate,
        "critic_scheduler": critic_rate,
    }  # fmt: skip


def model_folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    tiny_model(path)
    return path
