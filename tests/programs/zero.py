"""DeepSpeed ZeRO, as its engine offers it."""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from programs import tiny


def as_on_a_gpu():
    """Two things that real processes on a CPU need, and simulated ranks do not.

    Without the first DeepSpeed compiles for minutes; what else could be compiled, nobody wants to know here. Without
    the second it says that some CPUs cannot compute in fp16 (they can, slowly), and then builds in bf16 what shall be
    fp32.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    type(get_accelerator()).is_fp16_supported = lambda _: True


def config(stage, *, micro=1, **more):
    return {
        "train_micro_batch_size_per_gpu": tiny.BATCH,
        "gradient_accumulation_steps": micro,
        "zero_optimization": {"stage": stage, **more.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 if nothing is said
        **more,
    }


def start():
    as_on_a_gpu()
    deepspeed.init_distributed("gloo", verbose=False)


def end(*engines):
    for engine in engines:
        engine.destroy()
    dist.barrier()
    dist.destroy_process_group()


def engine_of(model, settings, optimizer=None):
    optimizer = tiny.sgd(model.parameters()) if optimizer is None else optimizer
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def weights(engine):
    """The full weights, gathered where they are partitioned."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = tiny.whole(parameter)
    return found


def train(engine, steps=3, first=0):
    """Losses of each micro-batch, and the gradient norm of each step."""
    losses, norms = [], []
    for step in range(first, first + steps):
        ids = tiny.batch(step)
        loss = tiny.loss_of(engine(ids), ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        norm = engine.get_global_grad_norm()
        if norm is not None:
            norms.append(norm)
    return losses, norms


def _run(stage, steps=3, **settings):
    start()
    engine = engine_of(tiny.transformer(), config(stage, **settings))
    losses, norms = train(engine, steps)
    result = tiny.told(losses, weights(engine), norms)
    end(engine)
    return result


def zero0():
    return _run(0)


def zero1():
    return _run(1)


def zero2():
    return _run(2)


def zero3():
    return _run(3)


def zero1_accumulates():
    return _run(1, steps=4, micro=2)


def zero2_accumulates():
    return _run(2, steps=4, micro=2)


def zero3_accumulates():
    return _run(3, steps=4, micro=2)


def zero2_clips():
    return _run(2, gradient_clipping=0.5)


def zero3_clips():
    return _run(3, gradient_clipping=0.5)


def zero2_bfloat16():
    return {**_run(2, bf16={"enabled": True}), "weights": {}}


def zero3_bfloat16():
    return {**_run(3, bf16={"enabled": True}), "weights": {}}


def zero2_offloads():
    return _run(2, zero={"offload_optimizer": {"device": "cpu"}})


def zero3_offloads():
    return _run(3, zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}})


def zero3_persists_small_parameters():
    return _run(3, zero={"stage3_param_persistence_threshold": 64, "stage3_prefetch_bucket_size": 256})


def _float16(stage):
    """The loss scale starts too high: the first steps overflow on every rank, and are skipped."""
    start()
    settings = config(stage, fp16={"enabled": True, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 2})
    engine = engine_of(tiny.transformer(), settings)
    losses, _ = train(engine, 6)
    result = tiny.told(losses, skipped=engine.skipped_steps, scale=float(engine.optimizer.loss_scale))
    end(engine)
    return result


def zero1_float16():
    return _float16(1)


def zero2_float16():
    return _float16(2)


def zero3_float16():
    return _float16(3)


def zero3_built_in_context():
    """The model never exists whole on a rank: every module is partitioned when it is built."""
    start()
    settings = config(3)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.float32):
        model = tiny.Transformer()
    partitioned = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    engine = engine_of(model, settings)
    losses, norms = train(engine)
    result = tiny.told(losses, weights(engine), norms, partitioned=partitioned)
    end(engine)
    return result


class _Scaled(nn.Module):
    """Changes the weights of a child in its own constructor, through ``apply``."""

    def __init__(self):
        super().__init__()
        self.body = tiny.Transformer(1)
        self.apply(self._halve)

    def _halve(self, module):
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.mul_(0.5)

    def forward(self, ids):
        return self.body(ids)


def zero3_built_with_apply():
    start()
    settings = config(3)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.float32):
        model = _Scaled()
    engine = engine_of(model, settings)
    losses, norms = train(engine)
    result = tiny.told(losses, weights(engine), norms)
    end(engine)
    return result


def zero3_writes_gathered_weights():
    """Rank 0 writes into gathered parameters before training; the others get what it wrote."""
    start()
    model = tiny.transformer()
    engine = engine_of(model, config(3))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        if dist.get_rank() == 0:
            with torch.no_grad():
                engine.module.head.weight.fill_(0.25)
    written = weights(engine)
    result = tiny.told([], written)
    end(engine)
    return result


def _with_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def _saves(stage, folder, optimizer=_with_momentum):
    start()
    model = tiny.transformer()
    engine = engine_of(model, config(stage), optimizer(model.parameters()))
    train(engine, 2)
    engine.save_checkpoint(folder, tag="step2")
    saved = weights(engine)
    losses, norms = train(engine, 2, first=2)
    result = tiny.told(losses, weights(engine), norms, saved=saved)
    end(engine)
    return result


def _loads(stage, folder, optimizer=_with_momentum, tag="step2", **settings):
    start()
    model = tiny.transformer(seed=1)
    engine = engine_of(model, config(stage, **settings), optimizer(model.parameters()))
    engine.load_checkpoint(folder, tag=tag)
    saved = weights(engine)
    losses, norms = train(engine, 2, first=2)
    result = tiny.told(losses, weights(engine), norms, saved=saved)
    end(engine)
    return result


def zero1_saves(folder):
    return _saves(1, f"{folder}/1")


def zero1_loads(folder):
    return _loads(1, f"{folder}/1")


def zero2_saves(folder):
    return _saves(2, f"{folder}/2")


def zero2_loads(folder):
    return _loads(2, f"{folder}/2")


def zero3_saves(folder):
    return _saves(3, f"{folder}/3")


def zero3_loads(folder):
    return _loads(3, f"{folder}/3")


def zero2_saves_for_all(folder):
    return _saves(2, f"{folder}/all", _adamw)


def zero2_converts(folder):
    """Rank 0 makes a universal checkpoint, which any number of ranks can load, of what the ranks have saved."""
    from types import SimpleNamespace

    from deepspeed.checkpoint import ds_to_universal

    start()
    if dist.get_rank() == 0:
        ds_to_universal.main(
            SimpleNamespace(
                input_folder=f"{folder}/all/step2",
                output_folder=f"{folder}/all/universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    end()
    return tiny.told([])


def zero2_loads_universal(folder):
    return _loads(2, f"{folder}/all", _adamw, tag="universal", checkpoint={"load_universal": True})


def zero3_saves_16bit_model(folder):
    start()
    engine = engine_of(tiny.transformer(), config(3, zero={"stage3_gather_16bit_weights_on_model_save": True}))
    train(engine, 1)
    engine.save_16bit_model(folder, "model.bin")
    dist.barrier()
    saved = torch.load(f"{folder}/model.bin")
    result = tiny.told([], {name: tiny.whole(value) for name, value in saved.items()})
    end(engine)
    return result


def _several(stage):
    """Actor and critic are trained in turn; a frozen reference of the actor only looks on."""
    start()
    actor = engine_of(tiny.transformer(seed=0), config(stage))
    critic = engine_of(tiny.transformer(seed=1), config(stage))
    reference, *_ = deepspeed.initialize(model=tiny.transformer(seed=0), config=config(3 if stage == 3 else 0))
    reference.eval()
    losses = []
    for step in range(3):
        ids = tiny.batch(step)
        with torch.no_grad():
            before = torch.log_softmax(reference(ids), -1)
        now = torch.log_softmax(actor(ids), -1)
        loss = tiny.loss_of(now, ids) + 0.1 * (now.exp() * (now - before)).sum(-1).mean()
        actor.backward(loss)
        actor.step()
        value = critic(ids).mean(-1).square().mean()
        critic.backward(value)
        critic.step()
        losses += [loss.detach(), value.detach()]
    found = {f"actor.{name}": value for name, value in weights(actor).items()}
    found |= {f"critic.{name}": value for name, value in weights(critic).items()}
    result = tiny.told(losses, found)
    end(actor, critic, reference)
    return result


def zero2_actor_critic_reference():
    return _several(2)


def zero3_actor_critic_reference():
    return _several(3)
