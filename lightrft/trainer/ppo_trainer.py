"""``SPMDPPOTrainer``: the loop of reinforcement learning, on any strategy and any engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError, EngineStateError
from lightrft.strategy.utils.agreement import Ranks
from lightrft.trainer.aggregation import step_totals
from lightrft.trainer.evaluation import evaluate
from lightrft.trainer.experience_maker import ExperienceMaker
from lightrft.trainer.generation import Generation, seed_of
from lightrft.trainer.images import ImageReader, media_tokens
from lightrft.trainer.kl import kl_controller
from lightrft.trainer.learner import Learner, Trained
from lightrft.trainer.metrics import Means, Stopwatch, now
from lightrft.trainer.prompt_stream import PromptStream
from lightrft.trainer.replay_buffer import ReplayBuffer
from lightrft.trainer.rewards import reward_source
from lightrft.trainer.run_log import RunLog
from lightrft.trainer.run_state import RunCheckpoints, RunState
from lightrft.trainer.scoring import Scoring
from lightrft.trainer.settings import TrainerConfig
from lightrft.trainer.stopping import StopRequest

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase

__all__ = ["SPMDPPOTrainer"]


class SPMDPPOTrainer:
    """Trains an actor by reinforcement learning; every rank runs the same program.

    All methods that train are *collective*. Models are as the strategy has prepared them; the strategy has its engine.

    Args:
        strategy: trains, and generates.
        actor: the policy: ``actor(sequences, attention_mask, temperature=..., entropy=...)`` gives log-probs. If its
            configuration names tokens for images, it also gets ``logit_bias={token: -100, ...}``, as the engine does.
        critic: ``critic(sequences, attention_mask)`` gives values; ``None`` unless advantages are those of ``gae``.
        reward_model: what gives rewards: a model, a function, an address, a ``RewardSource``, or a list of them; may be
            ``None`` if the settings name one.
        initial_model: an actor that the policy is not to leave too far; ``None`` if ``init_kl_coef`` is 0.
        ema_model: gets the moving average of the actor's weights, or ``None``.
        actor_optim: of the actor.
        critic_optim: of the critic.
        actor_scheduler: of the actor's learning rate.
        critic_scheduler: of the critic's.
        tokenizer: makes text of tokens, for rewards, where the engine does not; it is saved with the model.
        processor: makes images what the model sees, if prompts have some.
        config: of the trainer; the entries that the strategy was given if ``None``.
        settings: win over ``config``: ``n_samples_per_prompt=8``.

    Attributes:
        strategy, actor, critic, ema_model, actor_optim, critic_optim, actor_scheduler, critic_scheduler: as given.
        config: the settings, checked.
        state: how far the run is.
        replay_buffer: what is trained on next.

    Raises:
        ConfigError: settings and models do not fit.
    """

    def __init__(
        self,
        strategy: StrategyBase,
        actor: Any,
        critic: Any = None,
        reward_model: Any = None,
        initial_model: Any = None,
        ema_model: Any = None,
        actor_optim: Any = None,
        critic_optim: Any = None,
        actor_scheduler: Any = None,
        critic_scheduler: Any = None,
        *,
        tokenizer: Any = None,
        processor: Any = None,
        config: TrainerConfig | Mapping[str, Any] | Any = None,
        **settings: Any,
    ) -> None:
        self.strategy = strategy
        self.config = TrainerConfig.from_args(strategy.config if config is None else config, **settings)
        self.config.check_strategy(strategy.config, strategy.groups.dp_size)
        self.actor, self.actor_optim, self.actor_scheduler = actor, actor_optim, actor_scheduler
        self.critic, self.critic_optim, self.critic_scheduler = critic, critic_optim, critic_scheduler
        self.initial_model = initial_model
        self.ema_model = ema_model
        self.tokenizer = tokenizer
        self._check_models()
        self.state = RunState(kl=kl_controller(self.config.init_kl_coef, self.config.kl_target, self.config.kl_horizon))
        self.replay_buffer = ReplayBuffer()
        self._stop = StopRequest()
        self._watch = Stopwatch()
        self._rewards = reward_source(reward_model, strategy, self.config)
        self._reader = None if processor is None else ImageReader(processor)
        self._scoring = Scoring(
            temperature=self.config.temperature, forbidden=media_tokens(strategy.unwrap_model(actor))
        )
        self._learner = self._make_learner()
        self._maker = self._make_maker()
        self._checkpoints = RunCheckpoints(
            strategy=strategy,
            config=self.config,
            actor=self._learner.actor,
            critic=self._learner.critic,
            ema_model=ema_model,
        )

    # -- The run ------------------------------------------------------------------------------------------------------

    def fit(self, prompts: Any, eval_prompts: Any = None) -> dict[str, float]:
        """Train until the prompts, or ``max_steps`` iterations, are through, or somebody asks to stop. *Collective*.

        Args:
            prompts: a data set of prompts, as in ``lightrft.datasets``; the same on every rank.
            eval_prompts: prompts that are evaluated at the beginning, every ``eval_steps`` iterations and at the end.

        Returns:
            The metrics of the last iteration, the same on every rank but for times.
        """
        resumed = self.config.resume and self._checkpoints.load(self.state)
        stream = PromptStream(self.strategy, prompts, self.state.consumed_prompts)
        total = self.config.iterations(len(prompts), self.strategy.config)
        most = self.config.num_episodes * len(prompts) - stream.batch_size

        def goes_on() -> bool:
            return self.state.step < total and stream.consumed <= most

        self._sync_engine()
        metrics: dict[str, float] = {}
        self.strategy.print(f"resumed after iteration {self.state.step}" if resumed else "training begins")
        with self._stop, self._log(total) as log:
            if eval_prompts is not None and self.config.eval_steps and not self.state.step:
                log(0, self.evaluate(eval_prompts) | self._watch.taken())
            while goes_on():
                metrics = self.iteration(stream)
                self.state.step += 1
                self.state.consumed_prompts = stream.consumed
                if eval_prompts is not None and self._is_due(self.config.eval_steps, last=not goes_on()):
                    metrics |= self.evaluate(eval_prompts)
                log(self.state.step, metrics | self._watch.taken())
                if self._is_due(self.config.save_steps):
                    self.save()
                if self._stops():
                    break
        if goes_on():
            self.strategy.print(f"stopped after iteration {self.state.step}")
        self._finish()
        return metrics

    def iteration(self, stream: PromptStream) -> dict[str, float]:
        """One iteration: prompts in, weights of the actor in the engine at the end. *Collective*.

        Args:
            stream: of prompts.

        Returns:
            The metrics, the same on every rank but for times.
        """
        begin, means = now(), Means()
        rollout = self._maker.collect(stream, self.state.step, means)  # prompts, gather_and_generate, rewards
        experience = self._maker.experiences(rollout, means)  # log-probs, values, advantages
        self.replay_buffer.extend([experience])
        self.replay_buffer.filler = self._maker.filler(rollout.samples)
        with self._watch.phase("train"):
            status = self.ppo_train(self.state.step)  # backward, optimizer_step on micro-batches
        with self._watch.phase("sync"):
            self._sync_engine_once()  # update_engine_weights
        metrics = means.over_ranks(self.strategy) | status | self._throughput(rollout, now() - begin)
        if "kl/sequence" in metrics:
            self.state.kl.update(metrics["kl/sequence"], round(metrics["samples"]))
        return metrics

    def ppo_train(self, global_steps: int = 0) -> dict[str, float]:
        """Train on what is in the replay buffer, which is empty afterwards. *Collective*.

        Ranks may have different numbers of samples, also none: all take the same number of optimizer steps.

        Args:
            global_steps: iterations that are done; seeds the order of samples.

        Returns:
            The means of losses, gradient norms and learning rates.
        """
        means = Means()
        micro = {
            "micro_batch_size": self.strategy.config.micro_train_batch_size,
            "micro_batches": self.strategy.accumulated_gradient,
        }
        count = int(self.strategy.all_reduce(self.replay_buffer.steps_needed(**micro), op="max"))
        self._train_mode()
        for epoch in range(self.config.max_epochs):
            seed = seed_of(self.strategy.config.seed, global_steps, epoch, self.strategy.groups.dp_rank)
            steps = self.replay_buffer.steps(count, seed=seed, device=self.strategy.device, **micro)
            totals = step_totals(self.strategy, [[batch.action_mask for batch in step] for step in steps])
            for step, total in zip(steps, totals, strict=True):
                for batch in step:
                    self._learner.learn(batch, total, means)
        self.replay_buffer.clear()
        if self.ema_model is not None:
            self.strategy.moving_average(self.actor, self.ema_model, beta=self.config.ema_beta)
        return means.over_ranks(self.strategy)

    def evaluate(self, prompts: Any) -> dict[str, float]:
        """The mean rewards of one completion of each prompt. *Collective*.

        Args:
            prompts: a data set of prompts, the same on every rank.

        Returns:
            ``eval/reward``, ``eval/response_length``, and what rewards report beside.
        """
        with self._watch.phase("eval"):
            return evaluate(
                self.strategy, self._generation(n=1, temperature=self.config.eval_temperature), self._rewards, prompts
            )

    def save(self) -> None:
        """Write a checkpoint of the run to ``ckpt_path``. *Collective*."""
        with self._watch.phase("save"):
            self._checkpoints.save(self.state)

    def request_stop(self) -> None:
        """Let the run end after this iteration, with a checkpoint, as Ctrl-C does. One rank is enough."""
        self._stop.make()

    # -- Parts of a run -----------------------------------------------------------------------------------------------

    def _is_due(self, every: int, *, last: bool = False) -> bool:
        return bool(every) and (last or self.state.step % every == 0)

    def _stops(self) -> bool:
        """Whether some rank was asked to stop."""
        return bool(self.strategy.all_reduce(int(self._stop.is_made), op="max"))

    def _finish(self) -> None:
        """What is written at the end."""
        if self.config.ckpt_path is not None and not (self.state.step and self._is_due(self.config.save_steps)):
            self.save()
        if self.config.save_path is not None:
            self.strategy.save_model(self.actor, self.tokenizer, self.config.save_path)

    @contextmanager
    def _log(self, total: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """Writes the metrics of an iteration, on rank 0; nothing on the others."""
        folder, bar = self.strategy.config.log_dir, self.config.progress_bar
        log: RunLog | None = None
        with Ranks().together("the log was not opened", ConfigError):
            if self.strategy.is_rank_0():
                log = RunLog(folder, self.strategy.print, total=total, done=self.state.step, bar=bar)
        with log or nullcontext():
            yield _quiet if log is None else log.step

    def _sync_engine(self) -> None:
        """Give the engine the weights of the actor, whatever it had."""
        if self.strategy.inference_engine is None:
            raise EngineStateError("the trainer needs an engine: call strategy.setup_inference_engine(args) first")
        self.strategy.update_engine_weights(self.actor)
        self._updates = self.strategy.engine_updates

    def _sync_engine_once(self) -> None:
        """The same, unless an overridden ``ppo_train`` has done so."""
        if self.strategy.engine_updates == self._updates:
            self._sync_engine()
        self._updates = self.strategy.engine_updates
        self.state.weight_version += 1

    def _train_mode(self) -> None:
        self.actor.train()
        if self._learner.critic is not None:
            self.critic.train()

    def _throughput(self, rollout: Any, seconds: float) -> dict[str, float]:
        tokens = float(sum(len(one.tokens) for one in rollout.samples))
        both = self.strategy.all_reduce({"tokens": tokens, "samples": float(len(rollout.samples))}, op="sum")
        shares = self.strategy.groups.sp_size
        return {
            "tokens_per_second": both["tokens"] / shares / seconds,
            "samples": both["samples"] / shares,
            "kl_coef": self.state.kl.value,
            "weight_version": float(self.state.weight_version),
        }

    # -- What the trainer is made of ----------------------------------------------------------------------------------

    def _check_models(self) -> None:
        config, needs_critic = self.config, self.config.advantage_estimator == "gae"
        problems = []
        if needs_critic and self.critic is None:
            problems.append("advantage_estimator='gae' needs a critic: pass one, or take another estimator")
        if config.init_kl_coef and self.initial_model is None:
            problems.append(f"init_kl_coef={config.init_kl_coef} needs initial_model: pass one, or set it to 0")
        trained = {"actor": self.actor} | ({"critic": self.critic} if needs_critic else {})
        problems += [
            f"{name}_optim is missing: pass the optimizer that strategy.prepare returned"
            for name, model in trained.items()
            if model is not None and getattr(self, f"{name}_optim") is None
        ]
        if problems:
            raise ConfigError("\n".join(problems))
        if self.critic is not None and not needs_critic and self.strategy.is_rank_0():
            warnings.warn(
                f"advantage_estimator={config.advantage_estimator!r} needs no critic: it is neither asked nor trained",
                UserWarning,
                stacklevel=3,
            )

    def _make_learner(self) -> Learner:
        critic = None
        if self.config.advantage_estimator == "gae":
            critic = Trained(
                model=self.critic, optimizer=self.critic_optim, scheduler=self.critic_scheduler, name="critic"
            )
        actor = Trained(model=self.actor, optimizer=self.actor_optim, scheduler=self.actor_scheduler, name="actor")
        return Learner(
            strategy=self.strategy,
            config=self.config,
            actor=actor,
            critic=critic,
            scoring=self._scoring,
            kl=self.state.kl,
        )

    def _make_maker(self) -> ExperienceMaker:
        return ExperienceMaker(
            strategy=self.strategy,
            config=self.config,
            actor=self.actor,
            critic=None if self._learner.critic is None else self.critic,
            initial_model=self.initial_model if self.config.init_kl_coef else None,
            rewards=self._rewards,
            generation=self._generation(
                n=self.config.n_samples_per_prompt,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                needs_log_probs=self.config.importance_cap > 0,
            ),
            scoring=self._scoring,
            kl=self.state.kl,
            moments=self.state.moments,
            watch=self._watch,
        )

    def _generation(self, **sampling: Any) -> Generation:
        decode = None if self.tokenizer is None else _decoding(self.tokenizer)
        forbidden = self._scoring.forbidden
        return Generation(strategy=self.strategy, decode=decode, reader=self._reader, forbidden=forbidden, **sampling)


def _quiet(step: int, metrics: Mapping[str, float]) -> None:
    """What ranks other than the first one write."""


def _decoding(tokenizer: Any) -> Callable[[Any], str]:
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True))
