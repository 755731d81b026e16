"""Loggers: what a rank sets is its own, and after the run everything is as it was."""

from __future__ import annotations

import importlib
import logging
import logging.config
import sys

import pytest
import torch.distributed as dist

from lightrft.sim import SimWorld
from lightrft.sim.current import current_task

from . import helpers_shared

LOGS = f"{helpers_shared.__name__}.logs"


@pytest.fixture(autouse=True)
def fresh_loggers():
    """No logger of an earlier test is there."""
    yield
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("package", "library"):
            del logging.root.manager.loggerDict[name]
    sys.modules.pop(LOGS, None)


def settings(logger):
    return logger.level, list(logger.handlers), list(logger.filters), logger.propagate, logger.disabled


def interleaved(*steps, ranks=3):
    """Run the steps on every rank, all ranks doing one before any does the next; results of the last one."""

    def run():
        dist.init_process_group("gloo")
        for step in steps:
            result = step(dist.get_rank())
            dist.barrier()
        dist.destroy_process_group()
        return result

    return SimWorld(ranks).run(run)


HANDLER = logging.NullHandler()


def only_errors(record):
    return record.levelno >= logging.ERROR


CHANGES = {
    "setLevel": lambda logger: logger.setLevel(logging.ERROR),
    "level": lambda logger: setattr(logger, "level", logging.ERROR),
    "addHandler": lambda logger: logger.addHandler(HANDLER),
    "handlers": lambda logger: setattr(logger, "handlers", [HANDLER]),
    "addFilter": lambda logger: logger.addFilter(only_errors),
    "propagate": lambda logger: setattr(logger, "propagate", False),
    "disabled": lambda logger: setattr(logger, "disabled", True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["library", None])
def test_what_a_rank_sets_is_its_own_and_gone_after_the_run(name, change):
    logger = logging.getLogger(name)
    before, attributes = settings(logger), vars(logger)
    first, second, third = interleaved(
        lambda rank: CHANGES[change](logger) if rank == 1 else None, lambda _: settings(logger)
    )
    assert first == third == before
    assert second != before
    assert settings(logger) == before
    assert vars(logger) is attributes


def test_a_handler_that_a_rank_removes_stays_with_the_others():
    logger = logging.getLogger("library")
    logger.addHandler(HANDLER)
    seen = interleaved(
        lambda rank: logger.removeHandler(HANDLER) if rank == 0 else None, lambda _: HANDLER in logger.handlers
    )
    assert seen == [False, True, True]
    assert logger.handlers == [HANDLER]


def test_what_is_logged_depends_on_the_levels_of_the_rank_and_of_the_loggers_above():
    child = logging.getLogger("library.part")
    seen = interleaved(
        lambda rank: logging.getLogger("library").setLevel(logging.INFO if rank == 0 else logging.ERROR),
        lambda _: (child.isEnabledFor(logging.INFO), child.isEnabledFor(logging.ERROR)),
        lambda rank: logging.disable(logging.CRITICAL) if rank == 2 else None,
        lambda _: (child.isEnabledFor(logging.INFO), child.isEnabledFor(logging.ERROR)),
    )
    assert seen == [(True, True), (False, True), (False, False)]
    assert not child.isEnabledFor(logging.INFO)
    assert child.isEnabledFor(logging.ERROR)


def test_each_rank_configures_all_of_logging_for_itself():
    def configure(rank):
        level = "INFO" if rank == 0 else "ERROR"
        logging.config.dictConfig(
            {
                "version": 1,
                "disable_existing_loggers": rank == 2,
                "handlers": {"null": {"class": "logging.NullHandler"}},
                "loggers": {"library": {"level": level, "handlers": ["null"]}},
            }
        )

    def read(_):
        return logging.getLogger("library").level, len(logging.getLogger("library").handlers), other.disabled

    other = logging.getLogger("package")
    assert interleaved(configure, read) == [(20, 1, False), (40, 1, False), (40, 1, True)]
    assert not other.disabled


def test_a_module_that_a_rank_imports_sets_up_its_logger_for_all_ranks():
    before = settings(logging.root)

    def load(rank):
        if rank == 1:
            logging.getLogger("package.logs").setLevel(logging.ERROR)  # which the import then overrides
            importlib.import_module(LOGS)

    seen = interleaved(load, lambda _: (settings(logging.getLogger("package.logs")), list(logging.root.handlers)))
    handler = sys.modules[LOGS].handler
    expected = (logging.INFO, [handler], [], False, False)
    assert seen == [(expected, [*before[1], handler])] * 3
    assert settings(logging.getLogger("package.logs")) == expected  # the module is still imported
    assert settings(logging.root) == before


def test_a_logger_made_during_the_run_is_put_below_the_same_one_on_every_rank():
    def make(rank):
        if rank == 0:
            logging.getLogger("library").setLevel(logging.ERROR)

    leaf = logging.getLogger("library.a.b")
    seen = interleaved(
        lambda rank: leaf.setLevel(logging.INFO) if rank == 1 else None,
        lambda rank: logging.getLogger("library.a") if rank == 0 else None,
        lambda _: leaf.parent.name,
    )
    assert seen == ["library.a"] * 3
    assert leaf.parent.name == "library.a"


def test_only_loggers_that_somebody_changed_are_switched():
    logging.getLogger("library")

    def count(_):
        return len(current_task().rank.world.switcher.loggers.originals)

    change = [lambda rank: logging.getLogger("package").setLevel(rank), count]
    assert interleaved(lambda _: logging.getLogger("library").info("x"), count) == [1] * 3
    assert interleaved(*change) == [2] * 3
