"""transformers and accelerate, with DeepSpeed or FSDP2 below, and Ulysses sequence parallelism."""

from __future__ import annotations

import gc

import deepspeed
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from programs import tiny, zero

HEADS = 8
LENGTH = 16


def config(**more):
    return Qwen2Config(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **more,
    )


def qwen2(seed=0, **more):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config(**more))


class Tokens(Dataset):
    """Example ``i`` is the same in every world."""

    def __init__(self, examples=16, length=LENGTH):
        self._shape = examples, length

    def __len__(self):
        return self._shape[0]

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(tiny.VOCABULARY, (self._shape[1],), generator=generator)
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(self._shape[1])}


def ids_of(step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(tiny.VOCABULARY, (2, LENGTH), generator=generator)


# -- DeepSpeed --------------------------------------------------------------------------------------------------------


def qwen2_zero3_from_pretrained(folder):
    """``from_pretrained`` finds DeepSpeed's configuration, builds every module partitioned and fills it from disk."""
    from transformers.integrations import HfDeepSpeedConfig

    zero.start()
    if dist.get_rank() == 0:
        qwen2().save_pretrained(folder)
    dist.barrier()
    settings = zero.config(3)
    keeps_it_known = HfDeepSpeedConfig(settings)
    model = Qwen2ForCausalLM.from_pretrained(folder)
    partitioned = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    engine = zero.engine_of(model, settings)
    losses, norms = _train(engine)
    result = tiny.told(losses, zero.weights(engine), norms, partitioned=partitioned)
    del keeps_it_known
    zero.end(engine)
    return result


def _train(engine, steps=2):
    losses, norms = [], []
    for step in range(steps):
        ids = ids_of(step, dist.get_rank())
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        norms.append(engine.get_global_grad_norm())
    return losses, norms


def ulysses():
    """Every sequence is split over two ranks, which exchange heads for tokens in each attention."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter

    zero.start()
    sequence = 2
    model = qwen2(attn_implementation="sdpa")
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=sequence,
        micro_batch_size=1,
        seq_length_is_variable=True,
    )
    settings = zero.config(2)
    settings["sequence_parallel_size"] = sequence
    settings["train_micro_batch_size_per_gpu"] = 1
    engine, *_ = deepspeed.initialize(model=model, optimizer=tiny.sgd(model.parameters()), config=settings, mpu=mpu)
    group = mpu.get_sequence_parallel_group()
    examples = torch.utils.data.Subset(Tokens(), range(dist.get_rank(), 16, dist.get_world_size()))
    loader = UlyssesSPDataLoaderAdapter(
        DataLoader(examples, batch_size=1),
        sp_rank=mpu.get_sequence_parallel_rank(),
        sp_group=group,
        sp_world_size=sequence,
        device=engine.device,
    )
    losses, norms = [], []
    for _, batch in zip(range(2), loader, strict=False):
        labels = batch.pop("shift_labels")
        logits = engine(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        counts = torch.tensor([float((labels != -100).sum())])
        dist.all_reduce(counts, group=group)
        loss = loss * sequence / counts[0]
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        norms.append(engine.get_global_grad_norm())
    result = tiny.told(losses, zero.weights(engine), norms)
    zero.end(engine)
    return result


# -- accelerate -------------------------------------------------------------------------------------------------------


def _accelerate(accelerator, steps=2):
    model = qwen2()
    optimizer = tiny.sgd(model.parameters())
    loader = DataLoader(Tokens(), batch_size=1, shuffle=False)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, norms = [], []
    for _, batch in zip(range(steps), loader, strict=False):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
            if norm is not None:
                norms.append(norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    gathered = accelerator.gather(torch.tensor([float(accelerator.process_index)])).tolist()
    state = accelerator.get_state_dict(model) or {}  # ZeRO-3 gives it to rank 0 alone
    state = {name: tiny.whole(value) for name, value in state.items()}
    result = tiny.told(losses, state, norms, gathered=gathered, index=accelerator.process_index)
    accelerator.free_memory()
    del model, optimizer, loader  # a DDP wrapper that outlives its group may hang a gloo process for ever
    gc.collect()
    accelerator.end_training()
    return result


def accelerate_ddp():
    return _accelerate(Accelerator(cpu=True))


def accelerate_fsdp2():
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    return _accelerate(Accelerator(cpu=True, fsdp_plugin=plugin))


def _accelerate_zero(stage):
    zero.as_on_a_gpu()
    settings = zero.config(stage, zero={"stage3_gather_16bit_weights_on_model_save": True})
    settings["train_micro_batch_size_per_gpu"] = 1
    return _accelerate(Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings)))


def accelerate_zero2():
    return _accelerate_zero(2)


def accelerate_zero3():
    return _accelerate_zero(3)


# -- the Trainer ------------------------------------------------------------------------------------------------------


def _trainer(folder, **more):
    transformers.logging.set_verbosity_error()
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=3,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1e9,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        **more,
    )
    trainer = Trainer(model=qwen2(), args=arguments, train_dataset=Tokens(64))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # ZeRO-3 gives it to rank 0 alone
    state = {name: tiny.whole(value) for name, value in state.items()}
    result = tiny.told(losses, state, norms)
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    return result


def trainer_ddp(folder):
    return _trainer(folder)


def trainer_zero2(folder):
    zero.as_on_a_gpu()
    return _trainer(folder, deepspeed={**zero.config("auto"), **_auto(2)})


def trainer_zero3(folder):
    zero.as_on_a_gpu()
    return _trainer(folder, deepspeed={**zero.config("auto"), **_auto(3)})


def _auto(stage):
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }


def trainer_fsdp2(folder):
    return _trainer(
        folder,
        fsdp=True,
        fsdp_config={
            "fsdp_version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"],
            "state_dict_type": "FULL_STATE_DICT",
        },
    )
