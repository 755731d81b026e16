"""The part of vLLM that the adapter and trainers touch: signatures, fields and defaults of the installed package.

Run as a script, it writes the record beside this file, against which the fake is held.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

RECORD = Path(__file__).with_name("vllm-0.32.json")

CALLS = {
    "vllm.LLM": "vllm:LLM",
    "vllm.LLM.generate": "vllm:LLM.generate",
    "vllm.LLM.chat": "vllm:LLM.chat",
    "vllm.LLM.sleep": "vllm:LLM.sleep",
    "vllm.LLM.wake_up": "vllm:LLM.wake_up",
    "vllm.LLM.reset_prefix_cache": "vllm:LLM.reset_prefix_cache",
    "vllm.LLM.reset_mm_cache": "vllm:LLM.reset_mm_cache",
    "vllm.LLM.collective_rpc": "vllm:LLM.collective_rpc",
    "vllm.LLM.apply_model": "vllm:LLM.apply_model",
    "vllm.LLM.get_tokenizer": "vllm:LLM.get_tokenizer",
    "vllm.LLM.get_default_sampling_params": "vllm:LLM.get_default_sampling_params",
    "llm.llm_engine.abort_request": "vllm:LLMEngine.abort_request",
    "llm.llm_engine.has_unfinished_requests": "vllm:LLMEngine.has_unfinished_requests",
    "llm.llm_engine.is_sleeping": "vllm:LLMEngine.is_sleeping",
    "llm.llm_engine.reset_encoder_cache": "vllm:LLMEngine.reset_encoder_cache",
    "llm.llm_engine.engine_core.shutdown": "vllm.v1.engine.core_client:InprocClient.shutdown",
    "llm.model_config.get_vocab_size": "vllm.config:ModelConfig.get_vocab_size",
    "worker.reload_weights": "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights",
    "vllm.RequestOutput": "vllm:RequestOutput",
    "vllm.SamplingParams.clone": "vllm:SamplingParams.clone",
}
"""What is called, and where its signature is found."""

FIELDS = {
    "vllm.SamplingParams": "vllm:SamplingParams",
    "vllm.CompletionOutput": "vllm:CompletionOutput",
    "vllm.Logprob": "vllm.logprobs:Logprob",
}
"""What has fields, and where."""


ARGUMENTS = "vllm:EngineArgs"
"""What ``vllm.LLM`` takes by keyword, all of it."""


def surface():
    """Parameters by call (name, kind, default) and fields by class (name, default), defaults as text."""
    import vllm

    return {
        "version": vllm.__version__.partition("+")[0],
        "calls": {name: parameters(found(where)) for name, where in CALLS.items()},
        "fields": {name: fields(found(where)) for name, where in FIELDS.items()},
        "arguments": [each.name for each in dataclasses.fields(found(ARGUMENTS))],
        "errors": [each.__name__ for each in found("vllm.exceptions:VLLMValidationError").__mro__],
    }


def found(where):
    """The object at ``module:dotted.name``."""
    module, _, names = where.partition(":")
    here = importlib.import_module(module)
    for name in names.split("."):
        here = getattr(here, name)
    return here


def parameters(call):
    """Of a function, or of the constructor of a class."""
    return [
        [each.name, each.kind.name, None if each.default is each.empty else text(each.default)]
        for each in inspect.signature(call).parameters.values()
        if each.name != "self"
    ]


def fields(cls):
    """Of a dataclass or a struct of msgspec; the default of a field without one is ``None``, not ``"None"``."""
    if dataclasses.is_dataclass(cls):
        return [[each.name, default(each)] for each in dataclasses.fields(cls)]
    import msgspec

    absent = msgspec.NODEFAULT
    return [
        [each.name, factory(each.default_factory) if each.default is absent else text(each.default)]
        for each in msgspec.structs.fields(cls)
    ]


def default(field):
    """Of a field of a dataclass."""
    if field.default is not dataclasses.MISSING:
        return text(field.default)
    return None if field.default_factory is dataclasses.MISSING else factory(field.default_factory)


def factory(make):
    """What fills a field anew for each object: its value if it is plain data, else that there is one."""
    if make in (list, dict, set, tuple):
        return text(make())
    return None if "NODEFAULT" in repr(make) else "<made>"


def text(value):
    """The same in every process."""
    plain = repr(value)
    return f"<{type(value).__name__}>" if " at 0x" in plain else plain


def written(record):
    """JSON with one line for each parameter and field."""
    return one_line_each(json.dumps(record, indent=1))


def one_line_each(plain):
    """With one line for each list of plain values."""
    return re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda inner: f"[{' '.join(inner[1].split())}]", plain) + "\n"


if __name__ == "__main__":
    RECORD.write_text(written(surface()), encoding="utf-8")
