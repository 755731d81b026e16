"""What libraries keep in globals because they assume one rank per process.

One entry per library: where its state is, and the versions in which it was looked up. Every rank gets its own value of
each place. Registries that an import fills with the same things for everybody, caches of pure functions and "was this
said already" flags are left out: sharing them changes nothing but how often a message is shown.

A place is written under the module that holds it (the part after the library's name):

- ``"name"`` or ``"Class.name"``: what the name is bound to and, if that is a container, what is in it;
- ``"function()"``: what is in the mutable default arguments of a function or method;
- ``"object.*"``: the attributes of an object;
- ``"*"``: every name of the module that is bound to plain data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from lightrft.sim import deepspeed_ops, zero_init

__all__ = ["LIBRARIES", "Library"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """The state of one library.

    Args:
        name: the name to import.
        oldest: the oldest version, as ``(major, minor)``, that was looked through.
        newest: the newest one.
        state: for each module, without the library's name (so ``""`` is the library itself), its places.
        special: for a module, what makes places that no path can name.
        prepare: called once a rank may use the library, to put in place what the simulator answers itself. It may
            write to listed places only, which are restored after the run.
    """

    name: str
    oldest: tuple[int, int]
    newest: tuple[int, int]
    state: Mapping[str, tuple[str, ...]]
    special: Mapping[str, Callable[[ModuleType], Any]] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None

    def notice(self, installed: str) -> str:
        """What to tell about the version ``installed``; empty if it was looked through."""
        version = _minor(installed)
        if self.oldest <= version <= self.newest:
            return ""
        checked = f"{_show(self.oldest)} to {_show(self.newest)}"
        return (
            f"{self.name} {installed} is none of the versions whose globals were looked through for simulated ranks "
            f"({checked}): state that moved or is new in it may be shared by all ranks. If ranks disturb each other, "
            f"name the module: SimWorld(rank_local=[...]) or --rank-local"
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def _show(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


_INITIALISERS = (
    "uniform_",
    "normal_",
    "constant_",
    "ones_",
    "zeros_",
    "eye_",
    "dirac_",
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "trunc_normal_",
    "orthogonal_",
    "sparse_",
)
"""The functions of ``torch.nn.init`` that transformers replaces for the time of ``from_pretrained``."""

TORCH = Library(
    name="torch",
    oldest=(2, 11),
    newest=(2, 13),
    state={
        "cpu": ("_current_stream",),
        "distributed.checkpoint._async_process_executor": ("_CHECKPOINT_PROCESS",),
        "distributed.checkpoint.state_dict": ("_patched_state_dict",),
        "distributed.tensor._api": ("DTensor._op_dispatcher._custom_op_handlers",),
        "distributed.tensor._random": ("_rng_tracker",),
        "distributed.tensor.experimental._context_parallel._attention": (
            "_cp_options.*",
            "_dispatch_mode",
            "_replaced_functions",
        ),
        "": ("linspace",),
        "nn.init": _INITIALISERS,
        "nn.modules.activation": ("constant_", "xavier_uniform_", "xavier_normal_"),
        "nn.modules.transformer": ("xavier_uniform_",),
        "nn.functional": ("scaled_dot_product_attention", "linear", "embedding"),
        "nn.modules.module": (
            "Module.register_buffer",
            "Module.register_parameter",
            "_global_buffer_registration_hooks",
            "_global_module_registration_hooks",
            "_global_parameter_registration_hooks",
            "_global_backward_pre_hooks",
            "_global_backward_hooks",
            "_global_is_full_backward_hook",
            "_global_forward_pre_hooks",
            "_global_forward_hooks",
            "_global_forward_hooks_always_called",
            "_global_forward_hooks_with_kwargs",
        ),
        "nn.parallel.distributed": ("DistributedDataParallel._active_ddp_module",),
        "nn.utils.parametrize": ("_cache", "_cache_enabled"),
        "optim.optimizer": ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"),
        "utils.checkpoint": ("_checkpoint_debug_enabled",),
    },
)

DEEPSPEED = Library(
    name="deepspeed",
    oldest=(0, 19),
    newest=(0, 19),
    state={
        "accelerator.cpu_accelerator": ("CPU_Accelerator.is_fp16_supported",),
        "accelerator.real_accelerator": ("ds_accelerator",),
        "comm.comm": ("cdb", "ccl_backend", "timers.timers", "comms_logger.*"),
        "comm.torch": (
            "DS_COMM_ALL_GATHER_OFF",
            "DS_COMM_ALL_REDUCE_OFF",
            "DS_COMM_BROADCAST_OFF",
            "DS_COMM_REDUCE_OFF",
            "DS_COMM_REDUCE_SCATTER_OFF",
        ),
        "moe.sharded_moe": ("exp_selection_uniform_map", "gumbel_map", "uniform_map"),
        "ops": ("__compatible_ops__",),
        "ops.adam.cpu_adam": ("DeepSpeedCPUAdam.optimizer_id",),
        "ops.adagrad.cpu_adagrad": ("DeepSpeedCPUAdagrad.optimizer_id",),
        "ops.lion.cpu_lion": ("DeepSpeedCPULion.optimizer_id",),
        "ops.op_builder.builder": ("OpBuilder._loaded_ops", "OpBuilder.jit_load"),
        "runtime.activation_checkpointing.checkpointing": ("*", "_CUDA_RNG_STATE_TRACKER.*"),
        "runtime.domino.async_linear": ("TP_group",),
        "runtime.pipe.p2p": ("*",),
        "runtime.sequence_parallel.parallel_state_sp": ("*",),
        "runtime.tensor_parallel.init_utils": ("_TP_MODEL_INIT_ARGS",),
        "runtime.torch_autocast": ("*",),
        "runtime.utils": ("mem_alloced", "mem_cached"),
        "runtime.zero.parameter_offload": (
            "FWD_MODULE_STACK",
            "DeepSpeedZeRoOffload._register_deepspeed_module()",
        ),
        "runtime.zero.partition_parameters": (
            "zero_wrapper_for_fp_tensor_constructor",
            "partitioned_param_data_shape",
            "zero_init_context",
            "top_level_context",
            "temp_contiguous_tensor",
            "empty_buffers",
            "AllGatherCoalescedHandle.data_buffer",
            "Init.param_id",
            "Init.apply_param_persistence",
            "Init.model_persistence_threshold",
            "Init.num_persisted_elements",
            "Init.num_persisted_parameters",
            "Init.override_module_apply",
            "Init.param_persistence_threshold",
            "InsertPostInitMethodToModuleSubClasses.linear_bk",
            "InsertPostInitMethodToModuleSubClasses.num_module_elements",
            "InsertPostInitMethodToModuleSubClasses.num_module_parameters",
        ),
        "sequence.layer": ("_all_to_all_groups",),
        "utils.debug": ("module_names", "param_names", "fh"),
        "utils.groups": ("*",),
    },
    special={"runtime.zero.partition_parameters": zero_init.PatchedModules},
    prepare=deepspeed_ops.install,
)

ACCELERATE = Library(
    name="accelerate",
    oldest=(1, 10),
    newest=(1, 15),
    state={
        "state": ("PartialState._shared_state", "AcceleratorState._shared_state", "GradientState._shared_state"),
        "tracking": ("LOGGER_TYPE_TO_CLASS",),
    },
)

TRANSFORMERS = Library(
    name="transformers",
    oldest=(5, 17),
    newest=(5, 23),
    state={
        "conversion_mapping": ("_checkpoint_conversion_mapping_cache",),
        "integrations.deepspeed": ("_hf_deepspeed_config_weak_ref",),
        "integrations.flex_attention": ("WrappedFlexAttention._instance",),
        "masking_utils": ("ALL_MASK_ATTENTION_FUNCTIONS.*", "AttentionMaskInterface._global_mapping"),
        "modeling_flash_attention_utils": (
            "_flash_with_kvcache_fn",
            "_loaded_implementation",
            "_process_flash_kwargs_fn",
            "_process_with_kvcache_kwargs_fn",
        ),
        "modeling_utils": (
            "_is_ds_init_called",
            "_is_quantized",
            "PreTrainedModel.from_pretrained",
            "PreTrainedModel.init_weights",
            "PreTrainedModel.tie_weights",
            "ALL_ATTENTION_FUNCTIONS.*",
            "AttentionInterface._global_mapping",
        ),
        "utils.logging": ("_tqdm_active", "_tqdm_hook"),
    },
)

LIGHTRFT = Library(
    name="lightrft",
    oldest=(0, 1),
    newest=(0, 1),
    state={"strategy.strategy": ("_registered",)},
)

LIBRARIES = (TORCH, DEEPSPEED, ACCELERATE, TRANSFORMERS, LIGHTRFT)
"""Every library whose state is switched."""
