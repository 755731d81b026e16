"""Torch's own trainers, DeepSpeed, accelerate and transformers end alike on simulated ranks and on real processes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest
import torch

from lightrft.sim import ProcessWorld, SimWorld

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]

SIZES = (2, 4, 8)


@dataclass(frozen=True)
class Case:
    """Programs of one module, run one after the other with one folder; each result is compared.

    Args:
        loss: largest difference of a loss.
        weight: largest difference of a weight; None where the optimizer amplifies rounding.
    """

    module: str
    programs: tuple[str, ...]
    loss: float = 2e-6
    weight: float | None = 1e-6

    def __str__(self):
        return "-".join((self.module, *self.programs))

    def run(self, world, folder):
        module = importlib.import_module(f"programs.{self.module}")
        functions = [getattr(module, name) for name in self.programs]
        folder.mkdir()
        takes_folder = [function.__code__.co_varnames[: function.__code__.co_argcount] for function in functions]
        return [
            world.run(function, *([str(folder)] if "folder" in names else []))
            for function, names in zip(functions, takes_folder, strict=True)
        ]


def cases(module, *programs, **options):
    return [Case(module, (program,) if isinstance(program, str) else program, **options) for program in programs]


CASES = [
    *cases("torch_native", "ddp", "ddp_unused", "ddp_accumulates"),
    *cases("torch_native", "fsdp2", "fsdp2_clips", "fsdp2_offloads", "fsdp2_accumulates", "fsdp2_recomputes"),
    *cases("torch_native", "fsdp2_prefetches", "fsdp2_on_meta", "hsdp"),
    *cases("torch_native", ("dcp_saves", "dcp_loads"), "dcp_saves_in_background"),
    *cases("torch_native", "fsdp2_bfloat16", loss=5e-3, weight=None),
    *cases("torch_native", "tensor_parallel", "tensor_parallel_loss", "two_dimensional", "loads_data"),
    *cases("zero", "zero0", "zero1", "zero2", "zero3"),
    *cases("zero", "zero1_accumulates", "zero2_accumulates", "zero3_accumulates", "zero2_clips", "zero3_clips"),
    *cases("zero", "zero2_offloads", "zero3_offloads", "zero3_persists_small_parameters"),
    *cases("zero", "zero2_bfloat16", "zero3_bfloat16", loss=5e-3, weight=None),
    *cases("zero", "zero1_float16", "zero2_float16", "zero3_float16", loss=1e-3, weight=None),
    *cases("zero", "zero3_built_in_context", "zero3_built_with_apply", "zero3_writes_gathered_weights"),
    *cases("zero", ("zero1_saves", "zero1_loads"), ("zero2_saves", "zero2_loads"), ("zero3_saves", "zero3_loads")),
    *cases("zero", ("zero2_saves_for_all", "zero2_converts", "zero2_loads_universal"), loss=1e-5, weight=None),
    *cases("zero", "zero3_saves_16bit_model", "zero2_actor_critic_reference", "zero3_actor_critic_reference"),
    *cases("hugging_face", "qwen2_zero3_from_pretrained", "ulysses"),
    *cases("hugging_face", "accelerate_ddp", "accelerate_fsdp2", "accelerate_zero2", "accelerate_zero3"),
    *cases("hugging_face", "trainer_ddp", "trainer_fsdp2", "trainer_zero2", "trainer_zero3"),
]


def largest(first, second):
    return max((abs(a - b) for a, b in zip(first, second, strict=True)), default=0.0)


def compare(case, simulated, real):
    for rank, (ours, theirs) in enumerate(zip(simulated, real, strict=True)):
        assert ours.keys() == theirs.keys()
        assert largest(ours["losses"], theirs["losses"]) <= case.loss, rank
        norm = max(map(abs, theirs["norms"]), default=0.0)
        assert largest(ours["norms"], theirs["norms"]) <= (1e-6 if case.weight else case.loss) * (1 + norm), rank
        assert ours["weights"].keys() == theirs["weights"].keys()
        if case.weight is not None:
            for name, weight in ours["weights"].items():
                torch.testing.assert_close(weight, theirs["weights"][name], atol=case.weight, rtol=0, msg=name)
        for name in ours.keys() - {"losses", "norms", "weights", "saved"}:
            assert ours[name] == theirs[name], (rank, name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_simulated_ranks_end_as_real_processes_do(case, size, tmp_path):
    simulated = case.run(SimWorld(size), tmp_path / "simulated")
    real = case.run(ProcessWorld(size), tmp_path / "real")
    for ours, theirs in zip(simulated, real, strict=True):
        compare(case, ours, theirs)


def test_the_comparison_sees_what_is_off():
    [case] = cases("torch_native", "ddp")
    right = [{"losses": [3.0], "norms": [1.0], "weights": {"w": torch.ones(2)}, "seen": [1]}]
    compare(case, right, right)
    for wrong in (
        {"losses": [3.00001]},
        {"norms": [1.00001]},
        {"weights": {"w": torch.tensor([1.0, 1.00001])}},
        {"weights": {}},
        {"seen": [2]},
    ):
        with pytest.raises(AssertionError):
            compare(case, [right[0] | wrong], right)


@pytest.mark.parametrize(
    ("save", "load"),
    [
        (("torch_native", "dcp_saves"), ("torch_native", "dcp_loads")),
        (("zero", "zero2_saves_for_all", "zero2_converts"), ("zero", "zero2_loads_universal")),
    ],
    ids=["dcp", "universal"],
)
@pytest.mark.parametrize(("writer", "reader"), [(SimWorld, ProcessWorld), (ProcessWorld, SimWorld)])
def test_a_checkpoint_crosses_worlds_and_numbers_of_ranks(save, load, writer, reader, tmp_path):
    (module, *programs) = save
    saved = Case(module, tuple(programs)).run(writer(4), tmp_path / "x")[0]
    module, program = load
    loaded = reader(2).run(getattr(importlib.import_module(f"programs.{module}"), program), str(tmp_path / "x"))
    for name, weight in saved[0]["saved"].items():
        torch.testing.assert_close(loaded[0]["saved"][name], weight, atol=0, rtol=0, msg=name)
