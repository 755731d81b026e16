"""Which state of library modules the ranks of a run write to: looked at whenever a rank hands over the baton.

Looked at are the names of modules and classes, the attributes of objects that modules name, and the contents of dicts,
lists, sets and deques there and among default arguments. A place is written as ``package.module.Class.name``, with
``[]`` behind it for contents, and with ``()[]`` for contents of default arguments.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict, defaultdict, deque
from copy import copy
from operator import is_
from types import FunctionType, ModuleType

from lightrft.sim import SimWorld, zero_init
from lightrft.sim.libraries import LIBRARIES

CONTAINERS = (dict, defaultdict, OrderedDict, list, set, deque)


class Names:
    """The names of a module or class, or the attributes of an object."""

    def __init__(self, label, namespace):
        self.labels = [label]
        self.namespace = namespace
        self.last = dict(namespace)

    def written(self):
        """What has been written to since the last call, places without the label."""
        namespace, last = self.namespace, self.last
        try:
            if namespace == last:
                return []
        except Exception:  # noqa: BLE001 - objects that cannot be compared: look at each
            pass
        keys = [key for key in {**namespace, **last} if namespace.get(key, Names) is not last.get(key, Names)]
        self.last = dict(namespace)
        return [f".{key}" for key in keys if not isinstance(namespace.get(key), ModuleType)]


class Items:
    """The contents of a container."""

    def __init__(self, label, container):
        self.labels = [label]
        self.container = container
        self.last = copy(container)

    def written(self):
        container, last = self.container, self.last
        try:
            if container == last:
                return []
        except Exception:  # noqa: BLE001 - objects that cannot be compared
            if len(container) == len(last) and all(map(is_, items_of(container), items_of(last))):
                return []
        self.last = copy(container)
        return ["[]"]


def items_of(container):
    return container.values() if isinstance(container, dict) else container


class Writes:
    """The writes of ranks to the modules of some packages, from now on.

    Attributes:
        writers: the ranks that have written to a place, by all its names, of which the first is where it was found.
    """

    def __init__(self, packages):
        self.packages = set(packages)
        self.writers = defaultdict(set)
        self.places = {}
        self.modules = set()
        self.find()

    def note(self, rank):
        """``rank`` hands over: what has been written to since the last call was written by it."""
        for place in self.places.values():
            for what in place.written():
                self.writers[tuple(label + what for label in place.labels)].add(rank)
        if len(sys.modules) != len(self.modules):
            self.find()

    def of_two_ranks(self):
        """Every place that two ranks have written to, by all its names."""
        return [names for names, ranks in self.writers.items() if len(ranks) > 1]

    def find(self):
        """Look at what has been imported meanwhile, too."""
        found = sys.modules.copy()
        new = found.keys() - self.modules
        self.modules = found.keys()
        for name, module in found.items():
            if name in new and isinstance(module, ModuleType) and self.is_ours(name):
                self.add(Names, name, vars(module), vars(module))
                for key, value in vars(module).copy().items():
                    if not key.startswith("__"):
                        self.add_value(f"{name}.{key}", value, name)

    def is_ours(self, module):
        return isinstance(module, str) and module.partition(".")[0] in self.packages

    def add(self, kind, label, what, owner):
        """Look at ``what``; returns whether nobody did before."""
        known = self.places.get(id(owner))
        if known is None:
            self.places[id(owner)] = kind(label, what)
        elif label not in known.labels:
            known.labels.append(label)
        return known is None

    def add_value(self, label, value, module):
        kind = type(value)
        if kind in CONTAINERS:
            self.add(Items, label, value, value)
        elif isinstance(value, type):
            if value.__module__ == module and self.add(Names, label, vars(value), value):
                for key, part in vars(value).copy().items():
                    self.add_value(f"{label}.{key}", part, module)
        elif kind in (FunctionType, staticmethod, classmethod):
            for default in getattr(value, "__defaults__", None) or ():
                self.add_value(f"{label}()", default, None)
        elif module is not None and self.is_ours(kind.__module__) and kind is not ModuleType:
            self.add_object(label, value)

    def add_object(self, label, value):
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return
        if type(attributes) is dict and self.add(Names, label, attributes, attributes):
            for key, part in attributes.copy().items():
                self.add_value(f"{label}.{key}", part, None)


class WatchedWorld(SimWorld):
    """A world that keeps an account of what its ranks write to the modules of ``packages``.

    It tells nothing of a name that the simulator switches: that changes whenever a rank begins.
    """

    def __init__(self, size, packages, **options):
        super().__init__(size, **options)
        self._packages = packages

    def _switch(self, leaving, entering):
        if leaving is not None:
            self.writes.note(leaving.index)
        super()._switch(leaving, entering)
        if leaving is None:  # the simulator has put its own functions in place by now
            self.writes = Writes(self._packages)


LIBRARY_NAMES = tuple(library.name for library in LIBRARIES)

EXCUSED = {
    "lightrft.sim.places._places[]": "a cache of where code comes from, the same for all",
    "deepspeed.accelerator.real_accelerator.ds_accelerator.max_mem": "memory of the process, which the ranks share",
    "deepspeed.runtime.engine._ENGINE_BACKWARD_GRAPH_TRACKER._active_states[]": "by object, asked about one's own",
    "deepspeed.runtime.engine._ENGINE_BACKWARD_GRAPH_TRACKER._graph_task_refcounts[]": "by number of a backward pass",
    "deepspeed.utils.debug.module_names._finalizers[]": "by object",
    "deepspeed.utils.debug.module_names._names[]": "by object",
    "deepspeed.utils.debug.param_names._finalizers[]": "by object",
    "deepspeed.utils.debug.param_names._names[]": "by object",
    "torch._library.simple_registry.singleton._data[]": "a registry of operators, the same for all",
    "torch._subclasses.fake_tensor.FakeTensorMode.cache[]": "a cache of what operators make of shapes and dtypes",
    "torch._subclasses.fake_tensor.FakeTensorMode.cache_bypasses[]": "counts",
    "torch._subclasses.fake_tensor.FakeTensorMode.cache_hits": "counts",
    "torch._subclasses.fake_tensor.FakeTensorMode.cache_misses": "counts",
    "torch._subclasses.meta_utils.DESCRIBER_NEXT_ID": "numbers that only have to differ",
    "torch.distributed.distributed_c10d._world": "switched by rank_state",
    "torch.distributed.tensor._redistribute._planner_cache[]": "by mesh, which no two ranks have in common",
    "torch.fx.operator_schemas._SCHEMA_TO_SIGNATURE_CACHE[]": "a cache of what operators take",
    "torch.jit._builtins._builtin_table[]": "a registry of operators, the same for all",
    "torch.mtia._lazy_seed_tracker.call_order": "calls for a device that is not there",
    "torch.mtia._lazy_seed_tracker.manual_seed_all_cb": "calls for a device that is not there",
    "torch.ops.fsdp._dir[]": "names of operators that were used",
    "torch.utils._stats.simple_call_counter[]": "counts",
    "torch.utils.hooks.RemovableHandle.next_id": "numbers that only have to differ",
    "torch.xpu._lazy_seed_tracker.call_order": "calls for a device that is not there",
    "torch.xpu._lazy_seed_tracker.manual_seed_all_cb": "calls for a device that is not there",
}
"""Places that two ranks write to and may share, and why."""


def written(program, *args, packages=LIBRARY_NAMES):
    """Every place to which two ranks wrote, by all its names."""
    world = WatchedWorld(2, packages, stall_limit=60)
    world.run(program, *args)
    return world.writes.of_two_ranks()


def unlisted(places, libraries=LIBRARIES):
    """The places that are neither listed in ``libraries`` nor excused, each by its first name."""
    return sorted(
        names[0]
        for names in places
        if not any(is_listed(n, libraries) or n in EXCUSED or is_of_zero_init(n) for n in names)
    )


def is_listed(place, libraries):
    """Whether a place is among those of which every rank has its own."""
    return any(place.startswith(f"{library.name}.") and is_listed_of(place, library) for library in libraries)


def is_listed_of(place, library):
    for name, paths in library.state.items():
        module = f"{library.name}.{name}" if name else library.name
        for path in paths:
            full = f"{module}.{path}"
            if path == "*" and re.fullmatch(re.escape(module) + r"\.\w+(\[\])?", place):
                return True
            if path.endswith(".*") and place.startswith(full.removesuffix("*")):
                return True
            if place in (full, f"{full}[]"):
                return True
    return False


def is_of_zero_init(place):
    """Whether ``zero.Init`` of DeepSpeed writes there and :mod:`lightrft.sim.zero_init` knows."""
    patched = {f"{owner.__module__}.{owner.__qualname__}" for owner, _ in zero_init._PATCHED if isinstance(owner, type)}
    wrapped = {f"{cls.__module__}.{cls.__qualname__}" for cls in zero_init._wrapped_classes()}
    owner, _, name = place.rpartition(".")
    names = {name for _, name in zero_init._PATCHED}
    return (owner in {*patched, "torch"} and name in names) or (owner in wrapped and name in ("__init__", "_old_init"))
