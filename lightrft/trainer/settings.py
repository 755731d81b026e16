"""``TrainerConfig``: every setting of the trainer, checked when it is built.

What a strategy needs too (batch sizes, lengths, learning rates, the seed) is in ``StrategyConfig``. Flags are derived
from the fields, as there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError
from lightrft.strategy.configuration import Configuration
from lightrft.strategy.setting import setting
from lightrft.trainer import names

if TYPE_CHECKING:
    from lightrft.strategy.config import StrategyConfig

__all__ = ["TrainerConfig"]

_ALGORITHM = "Algorithm"
_KL = "Divergence from the initial model"
_SAMPLING = "Sampling"
_REWARDS = "Rewards"
_RUN = "Run"
_CHECKPOINTS = "Checkpoints of a run"


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainerConfig(Configuration):
    """Every setting of the trainer. It cannot be changed once built: ``replace`` makes another one.

    Two settings follow from others: ``loss_aggregation`` from ``policy_loss``, as its paper has it, and
    ``kl_estimator`` from ``use_kl_loss``: ``k3`` with it, ``k1`` without.

    Raises:
        ConfigError: as ``StrategyConfig``.
    """

    advantage_estimator: str = setting("gae", _ALGORITHM, "how advantages are estimated", choices=names.ADVANTAGES)
    policy_loss: str = setting("ppo", _ALGORITHM, "the loss of the policy", choices=names.POLICY_LOSSES)
    loss_aggregation: str | None = setting(
        None,
        _ALGORITHM,
        "how the losses of tokens become one number; by default as in the paper of policy_loss",
        choices=names.AGGREGATIONS,
    )
    eps_clip_low: float = setting(
        0.2, _ALGORITHM, "ratios of probabilities below 1 - X are clipped", at_least=0, at_most=1
    )
    eps_clip_high: float = setting(0.2, _ALGORITHM, "ratios of probabilities above 1 + X are clipped", at_least=0)
    value_clip: float = setting(0.2, _ALGORITHM, "how far values may move in an iteration; 0: any", at_least=0)
    gamma: float = setting(1.0, _ALGORITHM, "discount of later rewards, by token", at_least=0, at_most=1)
    lambd: float = setting(1.0, _ALGORITHM, "lambda of generalised advantage estimation", at_least=0, at_most=1)
    whiten_advantages: bool = setting(
        True, _ALGORITHM, "give the advantages of gae mean 0 and variance 1", off_flag="keep_advantages"
    )
    entropy_coef: float = setting(0.0, _ALGORITHM, "weight of the bonus for entropy; 0: none", at_least=0)
    high_entropy_token_ratio: float = setting(
        1.0, _ALGORITHM, "share of an iteration's tokens, those of highest entropy, that are trained on", above=0,
        at_most=1,
    )  # fmt: skip
    policy_drift_coef: float = setting(
        0.0, _ALGORITHM, "weight of the divergence from the policy that generated; 0: none", at_least=0
    )
    importance_cap: float = setting(
        0.0, _ALGORITHM, "largest weight in truncated importance sampling, for engines that compute otherwise; 0: off",
        at_least=0,
    )  # fmt: skip
    max_epochs: int = setting(1, _ALGORITHM, "how often the samples of an iteration are trained on", at_least=1)
    ema_beta: float = setting(
        0.992, _ALGORITHM, "the averaged model keeps this share of itself in each iteration", at_least=0, at_most=1
    )

    init_kl_coef: float = setting(0.01, _KL, "weight of the divergence; 0: no initial model is asked", at_least=0)
    kl_estimator: str | None = setting(
        None, _KL, "its estimator; by default k3 as a loss, k1 in the reward", choices=names.KL_ESTIMATORS
    )
    use_kl_loss: bool = setting(False, _KL, "make the divergence a loss instead of a part of the reward")
    kl_target: float = setting(
        0.0, _KL, "divergence of a sequence that the weight is adapted to; 0: it stays", at_least=0
    )
    kl_horizon: int = setting(10000, _KL, "samples over which the weight is adapted", at_least=1)

    n_samples_per_prompt: int = setting(1, _SAMPLING, "completions of each prompt", at_least=1)
    temperature: float = setting(1.0, _SAMPLING, "of the distributions that are drawn from", above=0)
    top_p: float = setting(
        1.0, _SAMPLING, "draw from the likeliest tokens that have this probability", above=0, at_most=1
    )
    dynamic_sampling: bool = setting(
        False, _SAMPLING, "leave out prompts whose completions all get the same reward, and generate for others"
    )
    dynamic_sampling_rounds: int = setting(4, _SAMPLING, "most generations for one iteration", at_least=1)

    reward_function: str | None = setting(None, _REWARDS, "path/to/file.py:function or package.module:function")
    remote_reward_url: str | None = setting(None, _REWARDS, "address of a reward service: http://host:port/path")
    remote_reward_timeout: float = setting(60.0, _REWARDS, "seconds that one request may take", above=0)
    remote_reward_attempts: int = setting(5, _REWARDS, "how often a request is tried", at_least=1)
    reward_weights: str | None = setting(
        None, _REWARDS, "weights of several rewards, such as 0.7,0.3; by default all the same"
    )
    offload_reward_models: bool = setting(False, _REWARDS, "keep reward models on the CPU, and load one at a time")
    normalize_reward: bool = setting(False, _REWARDS, "give rewards mean 0 and variance 1, over the whole run")
    reward_clip: float = setting(0.0, _REWARDS, "rewards are clipped to -X and X; 0: never", at_least=0)
    overlong_buffer_len: int = setting(
        0, _REWARDS, "tokens before generate_max_len over which a penalty grows; 0: none", at_least=0
    )
    overlong_penalty: float = setting(1.0, _REWARDS, "that penalty at generate_max_len", at_least=0)

    num_episodes: int = setting(1, _RUN, "how often the prompts are gone through", at_least=1)
    max_steps: int = setting(0, _RUN, "most iterations; 0: any number", at_least=0)
    eval_steps: int = setting(0, _RUN, "evaluate every N iterations, and at the end; 0: never", at_least=0)
    eval_temperature: float = setting(0.0, _RUN, "temperature of evaluations; 0: greedy", at_least=0)
    progress_bar: bool = setting(True, _RUN, "show a progress bar", off_flag="no_progress_bar")

    ckpt_path: str | None = setting(None, _CHECKPOINTS, "folder of checkpoints; without it there are none")
    save_steps: int = setting(0, _CHECKPOINTS, "save every N iterations; 0: at the end alone", at_least=0)
    resume: bool = setting(False, _CHECKPOINTS, "go on from the latest checkpoint in ckpt_path, if there is one")
    max_ckpt_num: int = setting(3, _CHECKPOINTS, "how many checkpoints are kept", at_least=1)
    max_ckpt_mem: float = setting(1000.0, _CHECKPOINTS, "GB that they may have together", above=0)
    save_path: str | None = setting(None, _CHECKPOINTS, "folder for the trained model, written at the end")

    extra_args: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Entries that are no settings, read-only; ``get_extra_arg`` reads one."""

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropy of the policy's distributions is computed when samples are scored."""
        return self.high_entropy_token_ratio < 1

    def weights_of_rewards(self) -> list[float] | None:
        """``reward_weights`` as numbers; ``None`` if they are not given.

        Raises:
            ConfigError: they are no numbers.
        """
        if self.reward_weights is None:
            return None
        try:
            return [float(word) for word in self.reward_weights.split(",")]
        except ValueError:
            raise ConfigError(
                f"reward_weights={self.reward_weights!r}: expected numbers with commas between, such as 0.7,0.3"
            ) from None

    def iterations(self, prompts: int, config: StrategyConfig) -> int:
        """The most iterations of a run on a data set of as many prompts."""
        possible = self.num_episodes * prompts // config.rollout_batch_size
        return min(possible, self.max_steps or possible)

    def optimizer_steps(self, prompts: int, config: StrategyConfig) -> int:
        """The most optimizer steps of that run: what the schedules of learning rates are made for. At least 1."""
        of_iteration = -(-config.rollout_batch_size * self.n_samples_per_prompt // config.train_batch_size)
        return max(1, self.iterations(prompts, config) * self.max_epochs * of_iteration)

    def check_strategy(self, config: StrategyConfig, dp_size: int) -> None:
        """Check that these settings fit those of the strategy, and ``dp_size`` data-parallel ranks.

        Raises:
            ConfigError: they do not; the message names all that does not fit.
        """
        problems = list(_misfits(self, config, dp_size))
        if problems:
            raise ConfigError("\n".join(problems))

    def _follow(self) -> None:
        if self.loss_aggregation is None:
            object.__setattr__(self, "loss_aggregation", names.AGGREGATION_OF[self.policy_loss])
        if self.kl_estimator is None:
            object.__setattr__(self, "kl_estimator", "k3" if self.use_kl_loss else "k1")

    def _contradictions(self) -> Iterator[str]:
        yield from _algorithm_problems(self)
        yield from _run_problems(self)


def _algorithm_problems(config: TrainerConfig) -> Iterator[str]:
    compared = [f"advantage_estimator={config.advantage_estimator!r}"] * (config.advantage_estimator in names.GROUPED)
    compared += ["dynamic_sampling"] * config.dynamic_sampling
    if compared and config.n_samples_per_prompt == 1:
        yield (f"{compared[0]} compares the samples of a prompt, and n_samples_per_prompt is 1: set it to 2 or more")
    if config.init_kl_coef == 0 and config.use_kl_loss:
        yield "use_kl_loss with init_kl_coef=0 changes nothing: give the loss a weight, or leave it out"
    if config.init_kl_coef == 0 and config.kl_target:
        yield f"kl_target={config.kl_target} with init_kl_coef=0: a weight of 0 cannot be adapted; give it a value"
    if config.use_kl_loss and config.kl_estimator == "k1":
        yield "kl_estimator='k1' as a loss has no gradient that lowers the divergence: use k2 or k3"
    if config.eps_clip_low == 1 and config.policy_loss in ("gmpo", "cpgd"):
        yield f"eps_clip_low=1 with policy_loss={config.policy_loss!r} is a logarithm of 0: set it below 1"


def _run_problems(config: TrainerConfig) -> Iterator[str]:
    if config.ckpt_path is None:
        for name in ("save_steps", "resume"):
            if getattr(config, name):
                yield f"{name} needs ckpt_path: say where checkpoints are"
    try:
        config.weights_of_rewards()
    except ConfigError as error:
        yield str(error)


def _misfits(config: TrainerConfig, strategy: StrategyConfig, dp_size: int) -> Iterator[str]:
    if config.overlong_buffer_len > strategy.generate_max_len:
        yield (
            f"overlong_buffer_len={config.overlong_buffer_len} is larger than generate_max_len="
            f"{strategy.generate_max_len}: expected at most that"
        )
    if strategy.rollout_batch_size % dp_size:
        below = strategy.rollout_batch_size // dp_size * dp_size
        yield (
            f"rollout_batch_size={strategy.rollout_batch_size} is no multiple of {dp_size} data parallel ranks: use "
            f"rollout_batch_size={below or ''}{' or ' if below else ''}{below + dp_size}"
        )
