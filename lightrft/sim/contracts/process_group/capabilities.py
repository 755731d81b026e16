"""The contract of process groups, what an implementation of it may lack, and what each backend does lack."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch.distributed as dist

from lightrft.sim.contracts.contract import Contract

__all__ = ["LACKS", "contract"]

contract = Contract(
    "process group",
    prefix="PG",
    capabilities={
        "float8": "tensors of float8_e4m3fn and float8_e5m2 travel",
        "float8_reductions": "tensors of float8_e4m3fn and float8_e5m2 are reduced",
        "complex_reduce_scatter": "complex tensors are reduced and scattered",
        "odd_dtype_messages": "int16, uint16, uint32 and uint64 travel in messages",
        "bitwise": "BAND, BOR and BXOR",
        "integer_average": "AVG of integers, which truncates",
        "premul_sum": "PREMUL_SUM",
        "reduce_keeps_inputs": "reduce leaves the tensors of all but the root as they were",
        "any_shape": "tensors of the same number of elements may differ in shape from rank to rank",
        "stacked": "all_gather_into_tensor and reduce_scatter_tensor take the parts stacked, or flat",
        "uneven_all_gather": "all_gather of tensors of different sizes",
        "uneven_all_to_all": "all_to_all of lists of tensors of different sizes",
        "lists_of_ranks": "all_gather_coalesced",
        "strided_lists": "all_gather and all_to_all into tensors that are not contiguous",
        "refuses_strided": "other collectives refuse a tensor that is not contiguous",
        "refuses_indivisible": "all_to_all_single refuses a tensor that it cannot split evenly",
        "refuses_leaf_outputs": "an output that requires grad is refused while autograd records",
        "refuses_destroyed": "a group that is destroyed refuses all calls",
        "refuses_missing_peers": "send and recv refuse a rank that does not exist",
        "any_source": "recv from whoever sends first",
        "tags": "tags choose among the messages of a sender",
        "self_send": "isend and irecv to oneself",
        "device_coalescing": "the coalescing manager with a device",
        "more_futures": "get_future of a reduce_scatter",
        "monitored_barrier": "monitored_barrier",
        "split_group": "split_group",
        "rank_order": "new_group keeps the order of its ranks (sort_ranks=False)",
        "hides_results": "outputs hold nothing useful before wait, and misuse of what is under way is an error",
        "names_mismatches": "what ranks disagree about is an error that names them",
    },
)

_OLDER_TORCH: Mapping[str, str] = (
    {} if "sort_ranks" in inspect.signature(dist.new_group).parameters else {"rank_order": "torch 2.13 brought it"}
)

_NOT_GLOOS = {
    "float8": "gloo has no 8-bit floating point",
    "float8_reductions": "gloo has no 8-bit floating point",
    "integer_average": "gloo averages floating point only",
    "premul_sum": "nccl alone has it",
    "stacked": "gloo takes the parts end to end along dimension 0 and in no other way",
    "uneven_all_gather": "gloo gathers equal sizes only",
    "uneven_all_to_all": "gloo exchanges lists of equal sizes only",
    "self_send": "gloo connects no rank with itself",
    "device_coalescing": "gloo does not implement it",
    "more_futures": "gloo gives no future of a reduce_scatter",
    "split_group": "torch splits groups that are bound to an accelerator, which gloo has not",
}
_NOT_NCCLS = {
    "bitwise": "nccl has no bitwise reductions",
    "complex_reduce_scatter": "not documented of nccl",
    "odd_dtype_messages": "nccl has no 16-bit integers and no unsigned ones of more than 8 bits",
    "lists_of_ranks": "gloo alone has it",
    "strided_lists": "nccl refuses every tensor that is not contiguous",
    "refuses_leaf_outputs": "nccl writes below autograd",
    "any_source": "nccl receives from a rank that is named",
    "tags": "nccl ignores tags",
    "monitored_barrier": "torch offers it for gloo alone",
}
_STRICT = {
    "integer_average": "gloo refuses it: use SUM and divide",
    "reduce_keeps_inputs": "gloo works in the tensors of all ranks: they are poisoned",
    "any_shape": "ranks that disagree about a shape are wrong more often than not",
    "stacked": "gloo refuses it",
    "strided_lists": "nccl refuses it",
    "tags": "nccl ignores tags, so they must agree in order",
}
_GLOO_KEEPS = {"reduce_keeps_inputs": "gloo works in the tensors of all ranks"}
_REAL = {
    "hides_results": "real memory shows whatever it holds, at any time",
    "names_mismatches": "real ranks hang, crash, or reinterpret the bytes",
}

LACKS: Mapping[str, Mapping[str, str]] = {
    "gloo": {
        **_NOT_GLOOS,
        **_GLOO_KEEPS,
        **_REAL,
        **_OLDER_TORCH,
        "refuses_strided": "gloo takes it and gives wrong values",
        "refuses_indivisible": "gloo reads beyond the end of the tensor",
        "refuses_destroyed": "gloo goes on as if nothing had happened",
        "refuses_missing_peers": "gloo crashes",
    },
    "nccl": {
        **_NOT_NCCLS,
        **_REAL,
        **_OLDER_TORCH,
        "refuses_missing_peers": "not documented of nccl",
    },
    "simulated gloo": {**_NOT_GLOOS, **_GLOO_KEEPS, **_OLDER_TORCH},
    "simulated nccl": {**_NOT_NCCLS, **_OLDER_TORCH},
    "strict, on gloo": {**_NOT_GLOOS, **_STRICT, **_OLDER_TORCH},
    "strict, on nccl": {
        **{name: why for name, why in _NOT_NCCLS.items() if name != "refuses_leaf_outputs"},
        **_STRICT,
        **_OLDER_TORCH,
    },
    "strict, on any backend": {
        **_STRICT,
        **_OLDER_TORCH,
        "monitored_barrier": "torch offers it for groups of gloo alone",
    },
}
"""By implementation, the capabilities that it lacks and why. ``gloo`` was measured on torch 2.13; ``nccl`` follows the
documentation, as ``docs/process-group.md`` explains."""
