"""One conversion, from the folder that is read to the folder that is there at the end."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.utils.checkpoint_info import CheckpointInfo
from lightrft.strategy.utils.checkpoint_store import CheckpointStore
from lightrft.strategy.utils.checkpoints import CLIENT_STATE, SCHEDULER
from lightrft.strategy.utils.ckpt_scripts import hf_writer
from lightrft.strategy.utils.ckpt_scripts.check import Comparison, compare
from lightrft.strategy.utils.ckpt_scripts.contents import Contents, View
from lightrft.strategy.utils.ckpt_scripts.hf_names import names_for
from lightrft.strategy.utils.ckpt_scripts.progress import Progress
from lightrft.strategy.utils.ckpt_scripts.source import KINDS, Source, contents_of, open_source
from lightrft.strategy.utils.ckpt_scripts.target import check_target, replacing
from lightrft.strategy.utils.random_state import RANDOM_STATES
from lightrft.strategy.utils.saving import OUTSIDE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["DTYPES", "Conversion", "Done", "convert"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What is to be done.

    Attributes:
        source: a checkpoint, a ``save_dir`` with checkpoints, or a Hugging Face model.
        target: the Hugging Face model, or the ``save_dir`` with one checkpoint, that is to be there.
        to: one of ``KINDS``.
        kind: that the source has to be of; ``None`` for any.
        tag: which checkpoint of a ``save_dir``; ``None`` for the one that ``latest`` names.
        model: a Hugging Face model whose configuration, tokenizer and names the new one gets.
        dtype: of floating-point weights, a key of ``DTYPES``; ``None`` for that in which the source keeps them.
        zero_stage: in the layout of which a checkpoint of DeepSpeed is written; all stages read it.
        check: whether to read the result back and compare it with the source.
        overwrite: whether an older target may be replaced.
    """

    source: Path
    target: Path
    to: str
    kind: str | None = None
    tag: str | None = None
    model: Path | None = None
    dtype: str | None = None
    zero_stage: int | None = None
    check: bool = True
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What was done.

    Attributes:
        source: what was read.
        expected: what was to be written.
        comparison: of what was written with it; ``None`` without a check.
    """

    source: Source
    expected: Contents
    comparison: Comparison | None


def convert(wanted: Conversion) -> Done:
    """Convert, in this process alone.

    Raises:
        ConfigError: it cannot be done as it is asked for.
        CheckpointError: the source is damaged, or what was written is not what it holds. The target is as it was then.
    """
    _check_wanted(wanted)
    source = open_source(wanted.source, wanted.tag)
    _check_source(wanted, source)
    known_as, outside = _names(wanted, source.contents)
    expected = _expected(wanted, source, known_as)
    comparison = None
    with replacing(wanted.target) as folder:
        written = _write(wanted, source, expected, folder, outside)
        if wanted.check:
            progress = Progress("checked", _bytes(expected))
            comparison = compare(expected, contents_of(wanted.to, written), progress)
            progress.end()
    return Done(source=source, expected=expected, comparison=comparison)


def _check_wanted(wanted: Conversion) -> None:
    if wanted.to not in KINDS:
        raise ConfigError(f"to={wanted.to!r}: expected one of {', '.join(KINDS)}")
    if wanted.model is not None and wanted.to != "hf":
        raise ConfigError(f"--model is for --to hf, and this is --to {wanted.to}: leave it out")
    if wanted.model is not None and not (wanted.model / hf_writer.CONFIG).is_file():
        raise ConfigError(f"--model {wanted.model} has no {hf_writer.CONFIG}: expected a Hugging Face model")
    if wanted.zero_stage is not None and wanted.to != "deepspeed":
        raise ConfigError(f"--zero_stage is for --to deepspeed, and this is --to {wanted.to}: leave it out")
    if wanted.zero_stage not in (None, 1, 2, 3):
        raise ConfigError(f"--zero_stage {wanted.zero_stage}: expected 1, 2 or 3")
    if wanted.dtype is not None and wanted.dtype not in DTYPES:
        raise ConfigError(f"--dtype {wanted.dtype}: expected one of {', '.join(DTYPES)}")
    read = [wanted.source] if wanted.model is None else [wanted.source, wanted.model]
    check_target(wanted.target, overwrite=wanted.overwrite, read=read)


def _check_source(wanted: Conversion, source: Source) -> None:
    if wanted.kind not in (None, source.kind):
        raise ConfigError(
            f"{source.folder} is of kind {source.kind}, expected {wanted.kind}: use lightrft ckpt convert"
        )
    if wanted.dtype is not None and wanted.to != "hf" and source.contents.groups is not None:
        raise ConfigError(
            "--dtype is for weights alone, and the source holds an optimizer, whose fp32 weights training goes on "
            "with: leave it out"
        )
    if source.kind == "hf" and wanted.to != "hf" and (source.folder / OUTSIDE).is_file():
        raise ConfigError(
            f"{source.folder} has {OUTSIDE}, weights around the model, and does not say how they belong together: "
            "convert a checkpoint of the run instead"
        )


def _names(wanted: Conversion, contents: Contents) -> tuple[dict[str, str], list[str]]:
    weights = [place.name for place in contents.specs if not place.key]
    names = names_for(weights, wanted.model)
    return names.known_as, names.outside


def _expected(wanted: Conversion, source: Source, known_as: Mapping[str, str]) -> Contents:
    """What the target is to hold."""
    dtype = DTYPES[wanted.dtype] if wanted.dtype is not None else None
    if wanted.to == "hf":
        return View(source.contents, names=known_as, dtype=dtype)
    if wanted.to == "deepspeed":
        from lightrft.strategy.utils.ckpt_scripts.deepspeed_writer import Flattened

        return Flattened(source.contents)
    return source.contents if dtype is None else View(source.contents, dtype=dtype)


def _bytes(contents: Contents) -> int:
    return sum(spec.bytes for spec in contents.specs.values())


def _write(wanted: Conversion, source: Source, expected: Contents, folder: Path, outside: list[str]) -> Path:
    """Write into ``folder``; where it can be read from."""
    progress = Progress("written", _bytes(expected))
    if wanted.to == "hf":
        hf_writer.write(expected, folder, progress, model=wanted.model, outside=outside)
        progress.end()
        return folder
    store = CheckpointStore(folder)
    info = _info(source, wanted.to)
    hidden = store.begin(info.tag)
    if wanted.to == "fsdp":
        from lightrft.strategy.utils.ckpt_scripts import fsdp_writer

        fsdp_writer.write(expected, hidden, progress)
    else:
        _write_deepspeed(wanted, source, expected, hidden, progress)
    _carry(source, hidden)
    store.commit(hidden, info)
    progress.end()
    return folder / info.tag


def _write_deepspeed(wanted: Conversion, source: Source, expected: Contents, folder: Path, progress: Progress) -> None:
    from lightrft.strategy.utils.ckpt_scripts import deepspeed_writer

    assert isinstance(expected, deepspeed_writer.Flattened)
    steps = source.info.steps if source.info is not None else 0
    deepspeed_writer.write(expected, folder, progress, stage=wanted.zero_stage or 2, steps=steps)


def _info(source: Source, backend: str) -> CheckpointInfo:
    """What the new checkpoint says of itself. Its world size stays that of the run: random states belong to it."""
    if source.info is not None:
        return replace(source.info, backend=backend, save_latest=True)
    return CheckpointInfo(
        tag="global_step0",
        backend=backend,
        world_size=1,
        steps=0,
        sequence=0,
        saved_at=0.0,
        save_latest=True,
        files={},
        pickled=(),
        same_random_state=(),
    )


def _carry(source: Source, folder: Path) -> None:
    """Copy what is the same whatever the backend: client state, scheduler, random states."""
    for name in source.info.files if source.info is not None else ():
        if name in (CLIENT_STATE, SCHEDULER) or name.startswith(f"{RANDOM_STATES}/"):
            (folder / name).parent.mkdir(exist_ok=True)
            try:
                shutil.copyfile(source.folder / name, folder / name)
            except OSError as error:
                raise CheckpointError(f"{source.folder / name} was not copied: {error}") from error
