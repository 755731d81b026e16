"""Parts of torch that look at the device, on simulated ones."""

import io

import pytest
import torch
from ranks_with_devices import in_rank, local_rank, on_two_ranks, start_group
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

X = torch.arange(6.0).reshape(2, 3)


def test_autocast_casts_on_the_cpu_with_the_types_of_cuda():
    def ask():
        x = torch.ones(2, 2, device="cuda")
        with torch.autocast("cuda"):
            assert torch.is_autocast_enabled()
            assert (x @ x).dtype is torch.float16
            with torch.autocast("cuda", dtype=torch.bfloat16):
                assert (x @ x).dtype is torch.bfloat16
            with torch.autocast(device_type="cuda", enabled=False):
                assert (x @ x).dtype is torch.float32
            assert (x @ x).dtype is torch.float16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.autocast("cuda"):
                pass
            assert (x @ x).dtype is torch.bfloat16
        with pytest.warns(FutureWarning), torch.cuda.amp.autocast():
            assert (x @ x).dtype is torch.float16
        assert (x @ x).dtype is torch.float32
        assert not torch.is_autocast_enabled()

    in_rank(ask)


def test_a_custom_function_casts_its_inputs():
    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx, grad):
            return grad * 2

    def ask():
        with torch.autocast("cuda"):
            return Product.apply(torch.ones(2, dtype=torch.float16)).dtype

    assert in_rank(ask) is torch.float32


def test_a_grad_scaler_scales_and_skips_a_step_that_overflowed():
    def ask():
        weight = nn.Parameter(torch.ones(2, device="cuda"))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
        assert scaler.is_enabled()
        for factor in (1.0, float("inf")):
            optimizer.zero_grad()
            scaler.scale((weight * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert weight.tolist() == [0.0, 0.0]
        assert scaler.get_scale() == 4.0
        with pytest.warns(FutureWarning):
            assert torch.cuda.amp.GradScaler().is_enabled()

    in_rank(ask)


def test_saved_tensors_are_loaded_to_any_device(monkeypatch):
    saved, tagged = io.BytesIO(), io.BytesIO()
    torch.save({"x": X}, saved)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:1")
        torch.save({"x": X}, tagged)

    def ask():
        locations = ["cuda", "cuda:1", torch.device("cuda", 1), {"cpu": "cuda:1"}, lambda storage, _: storage.cuda(1)]
        for where in locations:
            saved.seek(0)
            assert torch.equal(torch.load(saved, map_location=where)["x"], X)
        tagged.seek(0)
        assert torch.equal(torch.load(tagged)["x"], X)
        tagged.seek(0)
        with pytest.raises(RuntimeError, match=r"device_count\(\) is 2"):
            torch.load(tagged, map_location="cuda:2")

    in_rank(ask)
    tagged.seek(0)
    with pytest.raises(RuntimeError):
        torch.load(tagged)


def test_a_data_loader_pins():
    def ask():
        loader = DataLoader(TensorDataset(torch.arange(4)), batch_size=2, pin_memory=True)
        batches = [batch for (batch,) in loader]
        assert loader.pin_memory
        return [batch.is_pinned() for batch in batches]

    assert in_rank(ask) == [True, True]


def test_ddp_takes_the_device_of_its_rank():
    def ask():
        start_group()
        torch.manual_seed(0)
        model = nn.Linear(2, 1).cuda()
        model = nn.parallel.DistributedDataParallel(model, device_ids=[local_rank()], output_device=local_rank())
        model(torch.full((1, 2), float(local_rank()), device="cuda")).sum().backward()
        gradient = model.module.weight.grad.tolist()
        with pytest.raises(torch.AcceleratorError, match="invalid device ordinal"):
            nn.parallel.DistributedDataParallel(nn.Linear(1, 1), device_ids=[2])
        torch.distributed.destroy_process_group()
        return gradient

    assert on_two_ranks(ask) == [[[0.5, 0.5]]] * 2


def test_a_mesh_of_cuda_devices_selects_the_device_of_the_rank():
    def ask():
        torch.distributed.init_process_group("nccl")
        mesh = torch.distributed.init_device_mesh("cuda", (2,))
        torch.distributed.destroy_process_group()
        return mesh.device_type, torch.cuda.current_device()

    assert on_two_ranks(ask) == [("cuda", 0), ("cuda", 1)]


@pytest.mark.parametrize("given", [True, False])
def test_fsdp2_shards_over_a_mesh_of_cuda_devices(given):
    def train():
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        start_group()
        torch.manual_seed(0)
        mesh = torch.distributed.init_device_mesh("cuda", (2,)) if given else None
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        model.to_empty(device="cuda")
        for layer in model:
            layer.reset_parameters()
        first = model[0].weight.full_tensor().tolist()
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 4, device="cuda")).float().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert model[0].weight.full_tensor().tolist() != first
        assert model[0].weight.device_mesh.device_type == "cuda"
        offloaded = nn.Linear(4, 4)
        fully_shard(offloaded, mesh=mesh, offload_policy=CPUOffloadPolicy())
        offloaded(torch.ones(2, 4)).sum().backward()
        assert offloaded.weight.to_local().is_pinned()
        torch.distributed.destroy_process_group()
        return first

    first, second = on_two_ranks(train)
    assert first == second
    assert first[0] != first[2], "the two shards were drawn differently"


def test_dtensors_draw_the_same_on_replicas_and_not_on_shards():
    def ask():
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor, randn

        start_group()
        mesh = torch.distributed.init_device_mesh("cuda", (2,))
        torch.manual_seed(3)
        replica = randn(8, device_mesh=mesh, placements=[Replicate()]).to_local()
        shard = randn(8, device_mesh=mesh, placements=[Shard(0)]).to_local()
        again = randn(8, device_mesh=mesh, placements=[Shard(0)]).to_local()
        dropped = nn.functional.dropout(distribute_tensor(torch.ones(64), mesh, [Shard(0)]), 0.5).to_local()
        generator = torch.Generator("cuda").manual_seed(5)
        seeded = distribute_tensor(torch.zeros(8), mesh, [Shard(0)]).normal_(generator=generator).to_local()
        assert not torch.equal(shard, again)
        torch.distributed.destroy_process_group()
        return [x.tolist() for x in (replica, shard, dropped, seeded)]

    first, second = on_two_ranks(ask)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, False, False]
    assert on_two_ranks(ask) == [first, second]
