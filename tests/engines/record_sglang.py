"""The part of SGLang that the adapter uses, as data; run as a script, it writes the record anew."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import tempfile
from pathlib import Path

RECORD = Path(__file__).parent / "surfaces" / "sglang-0.5.23.json"

METHODS = (
    "begin_weight_update",
    "end_weight_update",
    "flush_cache",
    "generate",
    "release_memory_occupation",
    "resume_memory_occupation",
    "shutdown",
    "update_weights_from_tensor",
)
SERVER_ARGS = (
    "attention_backend",
    "base_gpu_id",
    "context_length",
    "custom_sigquit_handler",
    "device",
    "disable_cuda_graph",
    "dtype",
    "enable_deterministic_inference",
    "enable_memory_saver",
    "enable_weights_cpu_backup",
    "log_level",
    "max_total_tokens",
    "mem_fraction_static",
    "mm_attention_backend",
    "model_path",
    "random_seed",
    "rl_on_policy_target",
    "sampling_backend",
    "skip_tokenizer_init",
    "tp_size",
)


SAMPLED = {"n": 2, "max_new_tokens": 2, "ignore_eos": True}
REFUSED = {
    "no prompts": {"input_ids": []},
    "too long": {"input_ids": [[10] * 1000]},
    "too many tokens": {"input_ids": [[10]], "sampling_params": {"max_new_tokens": 1000}},
    "different n": {"input_ids": [[10], [10]], "sampling_params": [{"n": 1}, {"n": 2}]},
    "unknown parameter": {"input_ids": [[10]], "sampling_params": {"max_tokens": 3}},
    "top_p": {"input_ids": [[10]], "sampling_params": {"top_p": 2.0}},
}
"""What ``Engine.generate`` of an engine for fewer than 1000 tokens refuses."""


def declared():
    """Signatures, fields and defaults, by where they are."""
    import sglang

    engine = importlib.import_module("sglang.srt.entrypoints.engine").Engine
    arguments = importlib.import_module("sglang.srt.server_args").ServerArgs
    params = importlib.import_module("sglang.srt.sampling.sampling_params").SamplingParams
    bucket = importlib.import_module("sglang.srt.weight_sync.tensor_bucket").FlattenedTensorBucket
    serializer = importlib.import_module("sglang.srt.utils").MultiprocessingSerializer
    request = importlib.import_module("sglang.srt.managers.io_struct").GenerateReqInput
    return {
        "version": sglang.__version__,
        "engine_module_has": [
            name for name in ("kill_process_tree",) if name in sys.modules[engine.__module__].__dict__
        ],
        "Engine": {name: signature(getattr(engine, name)) for name in METHODS},
        "ServerArgs": sorted([name, default] for name, default in signature(arguments) if name in SERVER_ARGS),
        "SamplingParams": signature(params),
        "GenerateReqInput": [entry for entry in signature(request) if entry[0] == "return_prompt_token_ids"],
        "FlattenedTensorBucket": signature(bucket),
        "FlattenedTensorBucket.get_flattened_tensor": signature(bucket.get_flattened_tensor),
        "FlattenedTensorBucket.get_metadata": signature(bucket.get_metadata),
        "MultiprocessingSerializer.serialize": signature(serializer.serialize),
    }


def signature(callable_):
    """Names of parameters in order and how their defaults are written; ``<required>`` for those without."""
    return [
        [name, "<required>" if each.default is inspect.Parameter.empty else repr(each.default)]
        for name, each in inspect.signature(callable_).parameters.items()
    ]


def returned(engine):
    """What calls of an engine return, as types; ``engine`` is SGLang's, with a tokenizer, and awake."""
    ask = {"input_ids": [[10, 11], [12]], "sampling_params": SAMPLED, "return_logprob": True}
    batch = engine.generate(**ask)
    stopped = engine.generate(input_ids=[[10]], sampling_params={"stop_token_ids": list(range(128))})
    calls = {
        "generate": shape(batch[:1]),
        "generate.count": len(batch),
        "generate.finish_reason.length": batch[0]["meta_info"]["finish_reason"],
        "generate.finish_reason.stop": shape(stopped[0]["meta_info"]["finish_reason"]),
        "generate.output_token_logprobs": shape(batch[0]["meta_info"]["output_token_logprobs"]),
        "update_weights_from_tensor outside": shape(engine.update_weights_from_tensor([b""], "flattened_bucket")),
        "begin_weight_update": list(engine.begin_weight_update()),
        "begin_weight_update twice": list(engine.begin_weight_update()),
        "end_weight_update": list(engine.end_weight_update()),
        "end_weight_update twice": list(engine.end_weight_update()),
        "flush_cache.success": engine.flush_cache().success,
        "release_memory_occupation": engine.release_memory_occupation(["kv_cache", "weights"]),
        "resume_memory_occupation": engine.resume_memory_occupation(["kv_cache", "weights"]),
    }
    for name, arguments in REFUSED.items():
        try:
            engine.generate(**arguments)
        except (TypeError, ValueError) as error:
            calls[f"generate: {name}"] = type(error).__name__
    return calls


def shape(value):
    """Types in place of values; of a list its first entry, of a mapping all."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *[shape(each) for each in (value[:1] if isinstance(value, list) else value)]]
    return type(value).__name__


def main():
    import on_cpu

    from lightrft.models import tiny
    from lightrft.strategy.sglang_utils import start

    with tempfile.TemporaryDirectory() as folder:
        on_cpu.save(tiny.text_model(), folder, tiny.tokenizer())
        engine = start(on_cpu.settings(folder))
        record = {**declared(), "returned": returned(engine._launched.engine)}
        engine.shutdown()
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
