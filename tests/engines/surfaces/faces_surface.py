"""Every public name of the modules that the faces have, as the installed packages have it.

Run as a script with ``vllm`` or ``sglang``, it writes the record beside this file, against which the face is held.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import sys
from pathlib import Path

from engines.surfaces import vllm_surface

from lightrft.sim.engine.faces import EXPORTS

RECORDS = {
    "vllm": Path(__file__).with_name("vllm-0.32-faces.json"),
    "sglang": Path(__file__).with_name("sglang-0.5.23-faces.json"),
}

REACHED = {
    "vllm": {
        "vllm_face.llm:LLMEngine": "vllm.v1.engine.llm_engine:LLMEngine",
        "vllm_face.llm:ModelConfig": "vllm.config:ModelConfig",
        "vllm_face.llm:EngineCore": "vllm.v1.engine.core_client:InprocClient",
        "vllm_face.llm:Worker": "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    },
    "sglang": {"sglang_face.engine:FlushCacheOutput": "sglang.srt.managers.io_struct:FlushCacheReqOutput"},
}
"""Classes of ours that no module of a face has, but whose objects one meets; and what they stand for."""

_BASES = ("builtins", "collections.abc")


def surface(library):
    """Descriptions by ``module:name``; one that a module takes over from another is described there."""
    places = {}
    for module in sorted((each for each in EXPORTS if each.split(".")[0] == library), reverse=True):
        for name in exported(module):
            places.setdefault(name, []).append(f"{module}:{name}")
    return {
        **{where: described(vllm_surface.found(where)) for where, *_ in places.values()},
        **{where: described(vllm_surface.found(where)) for where in REACHED[library].values()},
        "taken over": sorted(where for _, *others in places.values() for where in others if there(where)),
    }


def exported(module):
    """What the face of a module has."""
    return [each.partition(":")[2] for each in EXPORTS[module].split()]


def there(where):
    """Whether it is there at all."""
    module, _, name = where.partition(":")
    return hasattr(importlib.import_module(module), name)


def described(made):
    """A class by its constructor, fields, methods and what it is; anything else by its value."""
    if not isinstance(made, type):
        return repr(made)
    if issubclass(made, enum.Enum):
        return {"members": [[each.name, repr(each.value)] for each in made]}
    if hasattr(made, "__required_keys__"):
        return {"required": sorted(made.__required_keys__), "optional": sorted(made.__optional_keys__)}
    bases = [each.__name__ for each in made.__mro__ if each.__module__ in _BASES and each is not object]
    own = {name for cls in made.__mro__ if cls.__module__ not in _BASES for name in vars(cls)}
    return {
        "bases": bases,
        "constructor": vllm_surface.parameters(made) if own & {"__init__", "__struct_fields__"} else None,
        "fields": vllm_surface.fields(made) if own & {"__dataclass_fields__", "__struct_fields__"} else None,
        "methods": {name: vllm_surface.parameters(getattr(made, name)) for name in sorted(methods(made))},
    }


def methods(made):
    """Names of public methods, special ones for ``with`` included, but for those of Python's own bases."""
    own = [cls for cls in made.__mro__ if cls.__module__ not in _BASES and cls.__module__.split(".")[0] != "msgspec"]
    special = {"__enter__", "__exit__"}
    return {
        name
        for cls in own
        for name in vars(cls)
        if (name in special or not name.startswith("_"))
        and callable(getattr(made, name))
        and not inspect.isclass(getattr(made, name))
    }


if __name__ == "__main__":
    for each in sys.argv[1:]:
        record = json.dumps(surface(each), indent=1, sort_keys=True)
        RECORDS[each].write_text(vllm_surface.one_line_each(record), encoding="utf-8")
