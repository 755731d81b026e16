"""The record of vLLM's surface, against which the fake is held, is that of the installed package."""

import json

import pytest
from engines.surfaces import faces_surface, vllm_surface

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_record_is_that_of_the_installed_package():
    recorded = json.loads(vllm_surface.RECORD.read_text(encoding="utf-8"))
    installed = json.loads(json.dumps(vllm_surface.surface()))
    for part in ("version", "arguments", "errors"):
        assert installed[part] == recorded[part]
    for part in ("calls", "fields"):
        assert installed[part].keys() == recorded[part].keys()
        for name, entries in installed[part].items():
            assert entries == recorded[part][name], f"{name} has changed: write the record anew"


def test_the_record_of_all_public_names_is_that_of_the_installed_package():
    recorded = json.loads(faces_surface.RECORDS["vllm"].read_text(encoding="utf-8"))
    installed = json.loads(json.dumps(faces_surface.surface("vllm")))
    assert installed.keys() == recorded.keys()
    for where, entry in installed.items():
        assert entry == recorded[where], f"{where} has changed: write the record anew"


def test_the_record_has_what_the_adapter_uses():
    recorded = json.loads(vllm_surface.RECORD.read_text(encoding="utf-8"))
    assert "weights_iterator" in [name for name, *_ in recorded["calls"]["worker.reload_weights"]]
    assert ["n", "1"] in recorded["fields"]["vllm.SamplingParams"]
    assert {"logprobs_mode", "kv_cache_memory_bytes"} <= set(recorded["arguments"])
