"""StrategyBase: what a trainer calls, whatever trains and generates below.

One process (or simulated rank) has one strategy. Methods marked *collective* are called by all ranks, in the same
order. A loss is the mean over the tokens or sequences of the micro-batch of this rank.
"""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightrft.strategy import consistency
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.engine_calls import EngineCalls
from lightrft.strategy.groups import ParallelGroups
from lightrft.strategy.prepared import Registry
from lightrft.strategy.utils import collectives, data, environment, leaves, memory, printing, schedulers, seeds

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

__all__ = ["StrategyBase"]


class StrategyBase(EngineCalls):
    """One interface over training backends and inference engines.

    Args:
        seed: of weights, data order and dropout; see ``set_seed``.
        max_norm: gradients are clipped to this global norm; 0 means never.
        micro_train_batch_size: sequences that a rank trains on at a time.
        train_batch_size: sequences of one optimizer step, over all ranks.
        args: all other settings: a namespace, a mapping, an object with attributes or a ``StrategyConfig``. A
            value above that differs from its default wins over the one in here.

    Attributes:
        args: what was given.
        config: the settings, checked.
        world_size: ranks that train together.
        device: where the tensors of this rank live.
        accumulated_gradient: micro-batches of one optimizer step.
        engine_mp_group: ranks that share one inference engine, ``engine_tp_size`` consecutive ones.
        engine_dp_group: ranks with the same place in their engine.
        sp_data_processor: slices sequences over the ranks of one sequence-parallel group, and gathers what they give.
        inference_engine: the engine, or ``None``.
        inference_engine_status: its state, an ``EngineStatus``.
        inference_engine_type: ``"vllm"`` or ``"sglang"``, or ``None``.
        engine_updates: how often ``update_engine_weights`` has gone well. The version of the engine's weights counts
            also how often what a deep sleep had dropped was sent again.
        gradient_norms: of the last optimizer step of each model, by the name that ``optimizer_step`` was given.

    Raises:
        ConfigError: settings contradict each other or do not fit the number of ranks.
    """

    def __init__(
        self,
        seed: int = 42,
        max_norm: float = 1.0,
        micro_train_batch_size: int = 1,
        train_batch_size: int = 128,
        args: Any = None,
    ) -> None:
        self.args = args
        given = {
            "seed": (seed, 42),
            "max_norm": (max_norm, 1.0),
            "micro_train_batch_size": (micro_train_batch_size, 1),
            "train_batch_size": (train_batch_size, 128),
        }
        said = {name: value for name, (value, default) in given.items() if value != default}
        self.config = StrategyConfig.from_args(args, **said)
        self.prepared = Registry()
        self.gradient_norms: dict[str, float] = {}
        self.inference_engine: Any = None
        self.inference_engine_type: str | None = None
        self.engine_updates = 0
        self._is_set_up = False
        self.setup_distributed()
        self._know_the_world()
        for sentence in consistency.without_effect(self.config) if self.is_rank_0() else ():
            warnings.warn(sentence, UserWarning, stacklevel=2)

    # -- Ranks --------------------------------------------------------------------------------------------------------

    def setup_distributed(self, timeout: timedelta | None = None, num_gpu_per_node: int | None = None) -> None:
        """Join the process group. *Collective*.

        The constructor calls it; again, it does nothing. A process group that exists is used as it is. Otherwise the
        rank, the number of ranks and the address of the first one come from the variables that ``torchrun`` or Slurm
        sets; without any, the process is alone.

        Args:
            timeout: how long a rank may keep the others waiting; PyTorch's default if ``None``.
            num_gpu_per_node: ranks of one machine, where neither the variables nor ``local_rank`` say which GPU a rank
                has. The constructor takes it from ``args``.
        """
        if self._is_set_up:
            if timeout is not None or num_gpu_per_node is not None:
                warnings.warn(
                    "setup_distributed: the process group was made with the strategy, so timeout and num_gpu_per_node "
                    "change nothing now; give num_gpu_per_node in args",
                    UserWarning,
                    stacklevel=2,
                )
            return
        where = self._place(num_gpu_per_node)
        device = _own_device(where)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        environment.initialise(where, backend, timeout, device)
        self._is_set_up = True

    def _place(self, per_node: int | None = None) -> environment.RankEnvironment:
        """Where this process stands among the others."""
        per_node = per_node or self.config.get_extra_arg("num_gpu_per_node")
        local_rank = None if self.config.local_rank == -1 else self.config.local_rank
        return environment.RankEnvironment.read(os.environ, gpus_per_node=per_node, local_rank=local_rank)

    def _know_the_world(self) -> None:
        self.world_size = leaves.members(None)
        self.device = _own_device(self._place())
        self.config.check_world(self.world_size)
        self.accumulated_gradient = self.config.accumulated_gradient(self.world_size)
        self.groups = ParallelGroups.make(
            self.world_size, self.get_rank(), sp_size=self.config.sp_size, engine_tp_size=self.config.engine_tp_size
        )
        self.engine_mp_group: ProcessGroup | None = self.groups.engine_mp
        self.engine_dp_group: ProcessGroup | None = self.groups.engine_dp
        self.sp_data_processor = self._sequence_processor()
        self.set_seed(self.config.seed)

    def _sequence_processor(self) -> Any:
        from lightrft.strategy.utils.sequence_parallel import SequenceParallelProcessor

        return SequenceParallelProcessor(self.groups.sp)

    def get_rank(self) -> int:
        """The rank of this process, 0 if it is alone."""
        import torch.distributed as dist

        return dist.get_rank() if dist.is_initialized() else 0

    def is_rank_0(self) -> bool:
        """Whether this is rank 0, which prints and writes what is written once."""
        return self.get_rank() == 0

    def print(self, *message: object) -> None:
        """Print on rank 0, at once; nothing on the others."""
        printing.print_from_first(self.get_rank(), *message)

    def set_seed(self, seed: int) -> None:
        """Seed the generators of Python, NumPy and torch: the same on every rank."""
        seeds.set_seed(seed)

    # -- Models -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def init_model_context(self, meta_init: bool = False) -> AbstractContextManager[Any]:
        """In this context models are built as the backend wants them: whole, partitioned, or without storage.

        Args:
            meta_init: build without storage where the backend can; preparing the model gives it its weights. What
                ``from_pretrained`` loads is loaded exactly either way.
        """

    @abstractmethod
    def create_optimizer(self, model: torch.nn.Module, **kwargs: Any) -> Optimizer:
        """An AdamW that trains ``model``, before or after it is prepared.

        Biases and normalisation weights (one-dimensional parameters) do not decay.

        Args:
            model: with one trainable parameter at least.
            kwargs: ``lr``, ``betas``, ``eps``, ``weight_decay``; what is not given comes from the config.
        """

    @abstractmethod
    def prepare_model(
        self,
        model: torch.nn.Module,
        is_training: bool = False,
        shard_size: int = -1,
        reshard_after_forward: bool = True,
    ) -> torch.nn.Module:
        """Spread ``model`` over the ranks. *Collective*.

        Args:
            model: the same weights on every rank.
            is_training: whether it will be trained.
            shard_size: how many consecutive ranks share one copy of the weights; -1 for all of them.
            reshard_after_forward: free the gathered weights after each forward pass, and gather again for backward.

        Returns:
            What to call instead of ``model``.

        Raises:
            ConfigError: ``shard_size`` does not divide the world, or the backend cannot do that.
        """

    @abstractmethod
    def prepare(self, *models_or_pairs: Any, is_rlhf: bool = False) -> Any:
        """Spread models over the ranks. *Collective*.

        Args:
            models_or_pairs: models, or tuples of a model, its optimizer and (if there is one) its scheduler. A model
                with trainable parameters can be trained afterwards, with an optimizer from ``create_optimizer``;
                one without is only evaluated. ``None``, alone or in a tuple, stays ``None``.
            is_rlhf: that several models of one RL iteration are prepared; kept for callers, changes nothing.

        Returns:
            What was given, prepared, in the same form: bare if it was one, else a list.
        """

    @abstractmethod
    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module inside ``model``, whatever the backend put around it."""

    @abstractmethod
    def full_parameters(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole parameters of ``model``, one after the other, gathered when they are asked for. *Collective*.

        Yields:
            The name, and the tensor, whole on every rank, in the dtype that the model computes in. It may be the
            parameter itself: to be read only, and before the next step. A parameter that is tied to another one comes
            once.
        """

    def prepare_reward_model(self, reward_model: Any, shard_size: int = -1) -> Any:
        """Freeze one reward model, or each of a list, and spread it over the ranks. *Collective*.

        Args:
            reward_model: a model, a list of them, or a callable that is no model (a remote service): left as it is.
            shard_size: as in ``prepare_model``.
        """
        import torch

        if isinstance(reward_model, (list, tuple)):
            return [self.prepare_reward_model(one, shard_size) for one in reward_model]
        if not isinstance(reward_model, torch.nn.Module):
            return reward_model
        return self.prepare_model(reward_model.requires_grad_(False).eval(), shard_size=shard_size)

    def prepare_models_and_optimizers(
        self, actor: Any, critic: Any, reward_models: Any, initial_model: Any, args: Any, max_steps: int
    ) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any], Any, Any]:
        """Make optimizers and schedulers, and prepare all models of an RL run. *Collective*.

        Args:
            actor: trained.
            critic: trained; ``None`` where there is none.
            reward_models: one, a list, or ``None``; frozen.
            initial_model: the frozen reference, or ``None``.
            args: settings of this call alone: learning rates, ``lr_warmup_ratio``, ``lr_scheduler``; ``None`` for those
                of the strategy.
            max_steps: optimizer steps of the whole run; the schedules end there.

        Returns:
            ``(actor, optimizer, scheduler), (critic, optimizer, scheduler), reward_models, initial_model``.
        """
        config = self.config if args is None else StrategyConfig.from_args(args)
        trained = [
            self._with_optimizer(model, rate, config, max_steps)
            for model, rate in ((actor, config.actor_learning_rate), (critic, config.critic_learning_rate))
        ]
        actor_part, critic_part = self.prepare(*trained, is_rlhf=True)
        rewards = None if reward_models is None else self.prepare_reward_model(reward_models)
        initial = None if initial_model is None else self.prepare_reward_model(initial_model)
        return actor_part, critic_part, rewards, initial

    def _with_optimizer(self, model: Any, rate: float, config: StrategyConfig, max_steps: int) -> tuple[Any, Any, Any]:
        if model is None:
            return None, None, None
        optimizer = self.create_optimizer(model, lr=rate)
        return model, optimizer, schedulers.make(optimizer, config, max_steps)

    # -- Training -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def backward(self, loss: torch.Tensor, model: torch.nn.Module, optimizer: Optimizer, **kwargs: Any) -> None:
        """Add the gradient of a micro-batch. *Collective*.

        Args:
            loss: mean over the micro-batch of this rank; a number. It is averaged over micro-batches and ranks here.
            model: as ``prepare`` returned it.
            optimizer: that of the model.
            kwargs: for the backend, such as ``retain_graph``.
        """

    @abstractmethod
    def optimizer_step(
        self, optimizer: Optimizer, model: torch.nn.Module, scheduler: Any = None, name: str = "model", **kwargs: Any
    ) -> float | None:
        """Called after each micro-batch; every ``accumulated_gradient``-th time the optimizer steps. *Collective*.

        Then gradients are clipped to the global norm ``max_norm`` over all ranks and parameters, the optimizer steps,
        the scheduler steps unless the step was skipped (overflow in fp16, a norm that is not finite), and gradients
        are cleared.

        Returns:
            The global gradient norm before clipping if the optimizer's turn came, else ``None``. The last norm is also
            in ``strategy.gradient_norms[name]``.
        """

    @abstractmethod
    def drop_partial_accumulation(self, model: torch.nn.Module) -> int:
        """Forget the gradients of micro-batches that have not led to an optimizer step, with a warning.

        Whatever ends an iteration does so: saving, offloading, sending weights to an engine.

        Returns:
            How many micro-batches were forgotten.
        """

    @abstractmethod
    def moving_average(
        self, model: torch.nn.Module, ema: torch.nn.Module, beta: float = 0.992, device: str = "cpu"
    ) -> None:
        """Move the weights of ``ema`` towards those of ``model``: ``beta * ema + (1 - beta) * model``. *Collective*.

        Of weights in 16 bits, which cannot show such small steps, the average is kept in fp32 beside them.

        Args:
            model: as ``prepare`` returned it.
            ema: prepared too, or a plain copy on each rank.
            beta: between 0 (copy) and 1 (stay).
            device: where the average of weights is computed, and kept in fp32, that each rank has whole and does not
                train.
        """

    def setup_dataloader(
        self,
        replay_buffer: Any,
        batch_size: int,
        pin_memory: bool = False,
        shuffle: bool = True,
        collate_fn: Any = None,
        drop_last: bool = True,
        sampler: Any = None,
        consumed_samples: int = 0,
    ) -> Any:
        """A loader that gives each data-parallel rank its share; ranks of one sequence-parallel group get the same.

        Args:
            replay_buffer: a map-style dataset.
            batch_size: examples of one batch of one rank.
            pin_memory: as in ``torch.utils.data.DataLoader``.
            shuffle: in an order that depends on the seed and the epoch.
            collate_fn: makes a batch of a list of examples.
            drop_last: leave the last, smaller batch out.
            sampler: in place of ours.
            consumed_samples: examples that all ranks together have had already: it begins after them.
        """
        return data.setup_dataloader(
            replay_buffer,
            batch_size,
            pin_memory=pin_memory,
            shuffle=shuffle,
            collate_fn=collate_fn,
            drop_last=drop_last,
            sampler=sampler,
            consumed_samples=consumed_samples,
            dp_rank=self.groups.dp_rank,
            dp_size=self.groups.dp_size,
            seed=self.config.seed,
        )

    # -- Communication ------------------------------------------------------------------------------------------------

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        """Combine a tensor, a number or a dict of them over all ranks. *Collective*.

        Args:
            data: not modified. Dicts have the same keys on every rank.
            op: ``"mean"``, ``"max"``, ``"min"`` or ``"sum"``.

        Returns:
            The same form: numbers stay numbers, tensors keep shape and device; one collective for each dtype.
        """
        return collectives.all_reduce(data, op, device=self.device)

    def all_gather(self, data: Any) -> Any:
        """Tensors of all ranks, one after the other along the first dimension; numbers become a tensor. *Collective*.

        Dicts are gathered entry by entry. First dimensions may differ between ranks.
        """
        return collectives.all_gather(data, device=self.device)

    # -- Checkpoints --------------------------------------------------------------------------------------------------

    @abstractmethod
    def save_ckpt(
        self,
        model: torch.nn.Module,
        save_dir: str,
        tag: str | None = None,
        max_num: int = 3,
        max_mem: float = 1000,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        *,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
    ) -> str:
        """Write what training needs to go on: model, optimizer, scheduler, random state, client state. *Collective*.

        Args:
            model: as ``prepare`` returned it.
            save_dir: holds one folder for each checkpoint, and ``latest``.
            tag: name of the folder; ``global_step<N>`` after N optimizer steps if ``None``.
            max_num: how many checkpoints are kept, this one included; older ones are deleted once it is complete.
            max_mem: how many GB they may have together.
            client_state: of the caller, returned by ``load_ckpt``; that of rank 0 counts.
            save_latest: whether ``load_ckpt`` without a tag finds this one.
            optimizer: if the strategy does not know it.
            scheduler: if the strategy does not know it.

        Returns:
            The folder.

        Raises:
            CheckpointError: it could not be written; what was there before is as it was.
        """

    @abstractmethod
    def load_ckpt(
        self,
        model: torch.nn.Module,
        load_dir: str,
        tag: str | None = None,
        *,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Take up what ``save_ckpt`` wrote, at any number of ranks. *Collective*.

        Args:
            model: as ``prepare`` returned it.
            load_dir: what was ``save_dir``.
            tag: of the checkpoint; the latest if ``None``.
            optimizer: if the strategy does not know it.
            scheduler: if the strategy does not know it.
            load_module_strict: refuse a checkpoint whose parameters are not those of the model.
            load_optimizer_states: the optimizer's too.
            load_lr_scheduler_states: the scheduler's too.
            load_module_only: nothing but the weights.

        Returns:
            The folder, and the client state.

        Raises:
            CheckpointError: there is none, it is incomplete, or it does not fit.
        """

    @abstractmethod
    def save_model(self, model: torch.nn.Module, tokenizer: Any, output_dir: str, **kwargs: Any) -> None:
        """Write the weights for ``from_pretrained``, with configuration and tokenizer. *Collective*.

        Of a model with adapters (PEFT) only the adapters are written.
        """

    # -- Memory -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def offload_model(self, model: torch.nn.Module) -> None:
        """Move the weights of ``model`` to the CPU. *Collective*.

        Raises:
            OffloadStateError: they are there already.
        """

    @abstractmethod
    def reload_model(self, model: torch.nn.Module) -> None:
        """Move the weights back to the device. *Collective*.

        Raises:
            OffloadStateError: they were not offloaded.
        """

    @abstractmethod
    def maybe_offload_optimizer(self, optimizer: Optimizer) -> None:
        """Move the states of ``optimizer`` to the CPU, where the backend keeps them on the device. *Collective*.

        Raises:
            OffloadStateError: they are there already.
        """

    @abstractmethod
    def maybe_load_optimizer(self, optimizer: Optimizer) -> None:
        """Move the states of ``optimizer`` back to the device. *Collective*.

        Before the first offload it does nothing, so that an iteration may begin with it.

        Raises:
            OffloadStateError: they were offloaded once, and are on the device again.
        """

    def report_memory(self, prefix: str = "") -> None:
        """Print what memory rank 0 uses."""
        self.print(memory.memory_report(prefix, self.device))

    def sync_and_clear_cache(self) -> None:
        """Wait for the device, and give back memory that the allocator keeps unused."""
        memory.sync_and_clear_cache(self.device)


def _own_device(where: environment.RankEnvironment) -> torch.device:
    """The GPU of this process, or the CPU on a machine without any."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", where.device_index(torch.cuda.device_count()))
