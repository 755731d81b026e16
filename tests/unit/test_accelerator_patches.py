"""The torch.cuda of a simulated rank is there in its world and nowhere else."""

import copy
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from ranks_with_devices import WITHOUT_CUDA, in_rank
from torch import nn

from lightrft.sim.accelerator import patches
from lightrft.sim.patching import Patcher


def owners():
    from torch.distributed.fsdp import _fully_shard
    from torch.distributed.tensor import _api, _dispatch, _random
    from torch.utils import checkpoint as checkpoint_module

    modules = [module for name, module in sys.modules.items() if name.startswith(("torch.cuda", "torch.accelerator"))]
    return [
        *modules,
        *{id(patch.owner): patch.owner for patch in patches()}.values(),
        torch,
        torch.Tensor,
        torch.nn.Module,
        checkpoint_module.DefaultDeviceType,
        _fully_shard._fsdp_init,
        _fully_shard._fully_shard,
        _api,
        _dispatch,
        _random,
        _random.OffsetBasedRNGTracker,
        _random._RNGStateTracker,
    ]


def test_every_patch_is_undone():
    found = owners()
    before = [dict(vars(owner)) for owner in found]
    finders = list(sys.meta_path)
    patcher = Patcher()
    patcher.apply(patches())
    during = [dict(vars(owner)) for owner in found]
    patcher.restore()
    assert during != before
    for owner, names in zip(found, before, strict=True):
        now = vars(owner)
        assert now.keys() == names.keys()
        assert all(now[name] is value for name, value in names.items() if name != "_filled"), owner
    assert sys.meta_path == finders


def test_patches_are_built_once_and_installed_fast():
    owners()  # so that late modules are among what is installed
    assert patches() is patches()
    fastest = 1.0
    for _ in range(20):
        started = time.perf_counter()
        patcher = Patcher()
        patcher.apply(patches())
        patcher.restore()
        fastest = min(fastest, time.perf_counter() - started)
    assert fastest < 1e-3


@WITHOUT_CUDA
def test_other_threads_find_torch_as_it_is_while_a_world_runs():
    from_rank, to_rank = os.pipe(), os.pipe()
    found = []

    def outside():
        os.read(from_rank[0], 1)
        found.append((torch.cuda.is_available(), torch.cuda.device_count(), torch.cuda.is_initialized()))
        found.append(len(torch.cuda.default_generators))
        calls = [
            lambda: torch.ones(1, device="cuda"),
            lambda: torch.ones(1).cuda(),
            lambda: torch.ones(1).to("cuda"),
            lambda: torch.randn(1, device=0),
            lambda: torch.ones(1).pin_memory(),
            lambda: nn.Linear(1, 1).to(0),
            lambda: torch.cuda.current_device(),  # noqa: PLW0108
            lambda: torch.cuda.Stream(),  # noqa: PLW0108
            lambda: torch.cuda.Event(),  # noqa: PLW0108
            lambda: torch.cuda.FloatTensor([1.0]),
            lambda: torch.Generator("cuda"),
            lambda: torch.cuda.nvtx.range_push("x"),
            lambda: torch.accelerator.synchronize(),  # noqa: PLW0108
        ]
        for call in calls:
            try:
                found.append(call())
            except (RuntimeError, AssertionError, TypeError):
                found.append("error")
        found.append(type(torch.Generator()))
        os.write(to_rank[1], b".")

    def inside():
        torch.cuda.set_device(1)
        os.write(from_rank[1], b".")
        os.read(to_rank[0], 1)
        return torch.cuda.current_device()

    thread = threading.Thread(target=outside)
    thread.start()
    assert in_rank(inside) == 1
    thread.join()
    for end in (*from_rank, *to_rank):
        os.close(end)
    assert found == [(False, 0, False), 0, *["error"] * 13, torch.Generator]


def test_names_imported_before_the_run_are_answered_too():
    source = "from torch import Generator, zeros\nfrom torch.cuda import Stream, current_device\n"
    module = type(sys)("imported_before")
    module.__file__ = __file__
    exec(source, vars(module))
    sys.modules["imported_before"] = module
    try:

        def ask():
            assert module.zeros(1, device="cuda").device.type == "cpu"
            assert module.Generator("cuda").device.type == "cpu"
            assert module.Stream().device.index == module.current_device() == 0

        in_rank(ask)
    finally:
        del sys.modules["imported_before"]


def test_a_copy_of_a_tensor_from_a_world_can_be_used_outside():
    x = in_rank(lambda: torch.ones(2, device="cuda", pin_memory=False).pin_memory())
    assert torch.equal(copy.deepcopy(x).to("cpu") + 1, torch.full((2,), 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("outside_first", [False, True])
def test_torch_compile_works_in_a_world_and_after_it(outside_first):
    script = f"""
    import torch
    from lightrft.sim import SimWorld

    @torch.compile(backend="eager", fullgraph=True)
    def outside(x):
        return torch.zeros(3) + x.to("cpu") + torch.ones_like(x) + torch.rand(3) * 0

    @torch.compile(backend="eager", fullgraph=True)
    def inside(x):
        y = torch.zeros(3, device="cuda") + torch.ones_like(x, device="cuda:0")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            z = torch.ones(2, 2) @ torch.ones(2, 2)
        return x.to("cuda") + y.cuda(), z

    if {outside_first}:
        outside(torch.ones(3))
    x, z = SimWorld(1).run(lambda: inside(torch.ones(3)))[0]
    assert x.tolist() == [2.0, 2.0, 2.0] and z.dtype is torch.bfloat16
    torch._dynamo.reset()
    assert outside(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_fsdp2_imported_in_a_run_is_itself_after_it():
    script = """
    import sys
    from lightrft.sim import SimWorld

    def ask():
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.fsdp._fully_shard import _fsdp_init
        return hasattr(_fsdp_init._get_device_from_mesh, "__wrapped__")

    assert "torch.distributed.fsdp" not in sys.modules
    assert SimWorld(2).run(ask) == [True, True]
    from torch.distributed.fsdp._fully_shard import _fsdp_init, _fully_shard
    for module in (_fsdp_init, _fully_shard):
        assert not hasattr(module._get_device_from_mesh, "__wrapped__")
    assert SimWorld(2).run(ask) == [True, True]
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], check=True, timeout=120)
