"""What a strategy does with its inference engine."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError, EngineStateError, LightRFTError, LostRanksError, WeightSyncError
from lightrft.strategy import engine as engines
from lightrft.strategy import requests, rollout, weight_sync
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.engine_settings import EngineSettings
from lightrft.strategy.model_files import ModelFiles
from lightrft.strategy.utils.agreement import Ranks
from lightrft.strategy.utils.checkpoint_form import in_checkpoint_form
from lightrft.strategy.utils.generation_lengths import GenerationLengths
from lightrft.strategy.utils.saving import persistent_buffers, savable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import torch
    from torch.distributed import ProcessGroup

    from lightrft.strategy.prepared import Registry

__all__ = ["EngineCalls"]

_GONE = (engines.EngineStatus.ABSENT, engines.EngineStatus.DEAD)


class EngineCalls(ABC):
    """The part of ``StrategyBase`` that speaks of inference engines; what it needs of the rest is declared here."""

    config: StrategyConfig
    device: torch.device
    engine_mp_group: ProcessGroup | None
    inference_engine: Any
    inference_engine_type: str | None
    engine_updates: int
    prepared: Registry
    _engine_model: str | None = None
    _lengths: GenerationLengths | None = None
    _in_engine: weakref.ref[torch.nn.Module] | None = None

    @abstractmethod
    def drop_partial_accumulation(self, model: torch.nn.Module) -> int:
        """See ``StrategyBase``."""

    @abstractmethod
    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """See ``StrategyBase``."""

    @abstractmethod
    def full_parameters(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``StrategyBase``."""

    @property
    def inference_engine_status(self) -> engines.EngineStatus:
        """``absent``, ``awake``, ``asleep`` or ``dead``."""
        return engines.status_of(self.inference_engine)

    def setup_inference_engine(
        self,
        args: Any = None,
        engine_type: str | None = None,
        actor: torch.nn.Module | None = None,
    ) -> Any:
        """Start the engine, awake. *Collective*.

        Args:
            args: settings; those of the strategy if ``None``.
            engine_type: ``"vllm"`` or ``"sglang"``; as the settings say if ``None``.
            actor: whose weights it gets at once; if ``None``, it has those of ``args.pretrain``.

        Returns:
            The engine, also in ``strategy.inference_engine``.

        Raises:
            EngineStateError: there is one already.
            ConfigError: there is no such engine, or its package is missing.
        """
        if self.inference_engine_status not in _GONE:
            raise EngineStateError(
                f"this strategy has an inference engine already ({self.inference_engine_type}): shut it down before "
                "setting up another one"
            )
        config = self.config if args is None else StrategyConfig.from_args(args)
        chosen = engines.check_engine_type(engine_type or config.engine_type)
        settings = EngineSettings.of(config, device=self.device, group=self.engine_mp_group)
        self.inference_engine = self._start_engine(chosen, settings)
        self.inference_engine_type = chosen
        self._engine_model = settings.model
        if actor is not None:
            self.update_engine_weights(actor)
        return self.inference_engine

    def _start_engine(self, engine_type: str, settings: EngineSettings) -> engines.RolloutEngine:
        if ModelFiles.of(settings.model).shapes is None and Ranks().rank == 0:
            warnings.warn(
                f"{settings.model}: no weights lie on this machine, as safetensors or pytorch_model.bin. Names and "
                "shapes of what is sent to the engine are not checked, and verify=True is refused: download the model "
                "first",
                UserWarning,
                stacklevel=3,
            )
        return engines.start(engine_type, settings)

    def _engine(self, purpose: str) -> Any:
        if self.inference_engine_status in _GONE:
            raise EngineStateError(
                f"{purpose} needs an inference engine, which is {self.inference_engine_status}: call "
                "strategy.setup_inference_engine() first"
            )
        return self.inference_engine

    def update_engine_weights(self, actor: torch.nn.Module, verify: bool = False) -> None:
        """Send the weights of ``actor`` to the engine. *Collective*.

        Adapters are merged, and names are those of a checkpoint. Of an engine that sleeps the weights are woken, and
        the caches, which take memory and are of no use before it generates, sleep on: ``gather_and_generate`` and
        ``wakeup_inference_engine`` wake them.

        Args:
            actor: prepared; any, and not always the same.
            verify: compare what the engine holds afterwards with what was sent, for engines that can tell.

        Raises:
            ConfigError: ``verify`` is asked of an engine that cannot tell.
            EngineStateError: there is no engine.
            WeightSyncError: what the engine holds afterwards is not what was sent; or, with ``verify``, optimizer steps
                since the last verified update of ``actor`` have changed nothing of it.
        """
        with Ranks().together("the weights of the engine were not woken", EngineStateError):
            engine = self._engine("update_engine_weights")
            self.drop_partial_accumulation(actor)
            engines.wake_weights(engine)
        self._in_engine = None  # which weights it holds after an update that fails nobody knows
        sent = self._send(actor, verify=verify)
        self._in_engine = weakref.ref(actor)
        self.engine_updates += 1
        if sent.digests is not None:
            with Ranks().together("the weights of the actor do not change", WeightSyncError):
                self._check_trained(actor, sent.digests)

    def _check_trained(self, actor: torch.nn.Module, digests: Mapping[str, str]) -> None:
        """Something has changed by the optimizer steps since the last verified update of ``actor``."""
        prepared = self.prepared.find(actor)
        if prepared is None:
            return
        prefix, _ = savable(prepared.module)
        trained = [
            name
            for name, parameter in prepared.module.named_parameters()
            if name in prepared.trained and name.startswith(prefix) and parameter.requires_grad
        ]
        if prepared.verified is not None:
            weight_sync.check_trained(prepared.verified, digests, trained)
        prepared.verified, prepared.trained = digests, set()

    def _send(self, actor: torch.nn.Module, verify: bool = False) -> weight_sync.Sent:
        """Send weights to the engine, whose weights are awake. *Collective*."""
        engine = self.inference_engine
        bucket_bytes = self.config.engine_update_bucket_mb << 20
        with Ranks().together("weights were not sent", WeightSyncError):
            module = self.unwrap_model(actor)
            weights = in_checkpoint_form(module, self.full_parameters(actor), buffers=self._engine_names(module))
            return weight_sync.send(
                engine, weights, bucket_bytes=bucket_bytes, dtype=engine.weights_dtype, verify=verify
            )

    def _engine_names(self, module: torch.nn.Module) -> Collection[str]:
        """Names of the checkpoint of the engine, if ``module`` has something besides parameters that it may hold."""
        if self._engine_model is None or not persistent_buffers(module):
            return ()
        return ModelFiles.of(self._engine_model).shapes or ()

    def _send_what_was_dropped(self) -> None:
        """Send the weights again of the actor that the engine has had, if a sleep at level 2 has dropped them.

        *Collective*, over all ranks and not only those of the engine, where the settings have this level.
        """
        if self.config.engine_sleep_level != 2:
            return
        actor = None if self._in_engine is None else self._in_engine()
        told = Ranks().gather((self.inference_engine.is_stale, actor is not None))
        if any(is_stale for is_stale, _ in told) and all(is_known for _, is_known in told):
            assert actor is not None
            with Ranks().together("the weights of the engine were not woken", EngineStateError):
                engines.wake_weights(self.inference_engine)
            self._send(actor)

    def gather_and_generate(
        self,
        sampling_params: Any,
        all_prompt_token_ids: Sequence[Sequence[int]] | None = None,
        all_prompts: Sequence[str] | None = None,
        all_images: Sequence[Any] | None = None,
        sleep_engine: bool = True,
        images_num: Sequence[int] | None = None,
        all_videos: Sequence[Any] | None = None,
        videos_num: Sequence[int] | None = None,
    ) -> list[Any]:
        """Generate for the prompts of this rank, together with the ranks of its engine group. *Collective*.

        With ``engine_sleep_level=2`` all ranks of the world call it: if the engine has dropped its weights, it gets the
        present ones of the actor that ``update_engine_weights`` was given last, as a new version. With ``plot_every``
        all ranks of the world call it, as often as each other: lengths are plotted together.

        Args:
            sampling_params: the same on all ranks of the group.
            all_prompt_token_ids: prompts of this rank as token ids; any number, none included.
            all_prompts: or as text.
            all_images: images of the prompts, in order.
            sleep_engine: put the engine to sleep afterwards.
            images_num: how many images each prompt has.
            all_videos: videos of the prompts, in order.
            videos_num: how many videos each prompt has.

        Returns:
            The completions of this rank's prompts, in their order.

        Raises:
            LightRFTError: generation failed on some rank; the same error on every rank of the group.
            StaleWeightsError: the weights were dropped by a deep sleep, and no actor was sent before, or it is gone.
        """
        engine = self._engine("gather_and_generate")

        def mine() -> list[requests.Request]:
            self.wakeup_inference_engine()  # here, so that a rank on which it fails keeps no other one waiting
            return requests.requests_of(
                all_prompt_token_ids, all_prompts, all_images, images_num, all_videos, videos_num
            )

        try:
            self._send_what_was_dropped()
            completions = rollout.gather_and_generate(
                engine,
                mine,
                sampling_params,
                group=self.engine_mp_group,
                device=self.device,
            )
        except LostRanksError:
            raise  # the others do not answer
        except LightRFTError:
            self._note_lengths(())  # other engines go on, and plot together with this one
            raise
        finally:
            if sleep_engine:
                self.maybe_sleep_inference_engine()
        self._note_lengths(completions)
        return completions

    def _note_lengths(self, completions: Sequence[Any]) -> None:
        """Collect lengths of a step, and plot those of all ranks every ``plot_every`` steps. *Collective*."""
        if not self.config.plot_every:
            return
        if self._lengths is None:
            self._lengths = GenerationLengths(self.config.plot_every, self.config.log_dir)
        self._lengths.add(len(one.output_token_ids) for one in completions)
        if self._lengths.is_due:
            ranks = Ranks()
            with ranks.together("generation lengths were not plotted", ConfigError) as outcome:
                outcome.mine = self._lengths.taken()
            with ranks.together("generation lengths were not plotted", ConfigError):
                if ranks.rank == 0:
                    self._lengths.plot([length for each in outcome.all for length in each])

    def engine_generate_local(
        self, sampling_params: Any, prompt_token_ids: Any = None, multi_modal_inputs: Any = None
    ) -> list[Any]:
        """Generate with the engine of this rank's group, without gathering: all its ranks pass the same prompts.

        With ``engine_sleep_level=2`` all ranks of the world call it, see ``gather_and_generate``.

        Args:
            sampling_params: the same on all ranks of the group.
            prompt_token_ids: one list of token ids for each prompt.
            multi_modal_inputs: or one mapping for each prompt, as vLLM takes it: ``prompt_token_ids`` or ``prompt``,
                and ``multi_modal_data`` with ``image`` and ``video``.

        Raises:
            ConfigError: both or none of them are given.
        """
        engine = self._engine("engine_generate_local")
        if (prompt_token_ids is None) == (multi_modal_inputs is None):
            raise ConfigError("engine_generate_local: pass prompt_token_ids or multi_modal_inputs, and not both")
        self._send_what_was_dropped()

        def mine() -> list[requests.Request]:
            self.wakeup_inference_engine()
            if multi_modal_inputs is None:
                return requests.requests_of(prompt_token_ids)
            return [requests.request_of(one) for one in multi_modal_inputs]

        return rollout.generate_alike(engine, mine, sampling_params, group=self.engine_mp_group)

    def wakeup_inference_engine(self) -> None:
        """Wake the engine; nothing if it is awake, or if there is none."""
        self.engines_wake_up([self.inference_engine])

    def maybe_sleep_inference_engine(self) -> None:
        """Put the engine to sleep if ``enable_engine_sleep``; nothing if it sleeps, or if there is none.

        At ``engine_sleep_level``: at level 2 its weights are dropped, and sent again before it generates.
        """
        if self.config.enable_engine_sleep:
            for engine in engines.each_engine(self.inference_engine):
                engines.put_to_sleep(engine, self.config.engine_sleep_level)

    def engines_sleep(self, engines_to_sleep: Any) -> None:
        """Put each of several engines to sleep; ``None`` among them is passed over.

        They keep their weights (level 1), which may be those of no model here.
        """
        for engine in engines.each_engine(engines_to_sleep):
            engines.put_to_sleep(engine)

    def engines_wake_up(self, engines_to_wake: Any) -> None:
        """Wake each of several engines; ``None`` among them is passed over."""
        for engine in engines.each_engine(engines_to_wake):
            engines.wake(engine)
