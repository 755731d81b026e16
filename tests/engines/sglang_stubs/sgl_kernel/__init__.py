"""Stand-in for the compiled kernels of SGLang, on machines whose CPU they are not built for.

SGLang imports names from this package, and calls none of them with the backends ``torch_native`` and ``pytorch``. So
each name resolves, and raises when it is called.
"""

import torch

# Looked up when modules of models are imported. `convert_weight_packed` must not be among them: it would switch on code
# for AMX.
_LOOKED_UP = (
    "fused_dual_residual_rmsnorm_cpu",
    "fused_gdn_gating_cpu",
    "fused_moe_router_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
    "rmsnorm_cpu",
)
_OPERATORS = torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in _LOOKED_UP:
    _OPERATORS.define(f"{_name}(Tensor x) -> Tensor")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is a stub: this test runs without compiled kernels")

    kernel.__name__ = name
    return kernel
