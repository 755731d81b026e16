"""Records of JSON lines, of Parquet, or of a folder that the package ``datasets`` has written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightrft.errors import ConfigError
from lightrft.strategy.extras import naming_extras

__all__ = ["read"]

Placed = tuple[str, Mapping[str, Any]]
"""Where a record is, for messages, and the record."""


def read(path: str | Path, *, split: str = "train") -> Iterator[Placed]:
    """The records at ``path``, in their order.

    Args:
        path: a file whose name ends in ``.jsonl``, ``.ndjson``, ``.json`` (a record a line) or ``.parquet``, or a
            folder that ``save_to_disk`` of the package ``datasets`` has written.
        split: the part of the folder that is read, if it has parts.

    Raises:
        ConfigError: there is no such file, its form is unknown, a package for it is missing, or a record is none; the
            message says where.
    """
    source = Path(path)
    if source.is_dir():
        return _folder(source, split)
    if not source.is_file():
        raise ConfigError(f"no prompts at {source}: there is no such file or folder")
    if source.suffix in {".jsonl", ".ndjson", ".json"}:
        return _lines(source)
    if source.suffix == ".parquet":
        return _parquet(source)
    raise ConfigError(
        f"{source} ends in {source.suffix!r}: expected .jsonl, .ndjson or .json (a record a line), .parquet, or a "
        "folder of the package datasets"
    )


def _lines(file: Path) -> Iterator[Placed]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # which errors of JSON and of UTF-8 are
                raise ConfigError(f"{where}: no JSON: {error}") from error
            if not isinstance(record, dict):
                raise ConfigError(f"{where}: got {type(record).__name__}, expected an object with fields, one a line")
            yield where, record


def _parquet(file: Path) -> Iterator[Placed]:
    with naming_extras(f"reading {file}"):
        from pyarrow import ArrowException, parquet
    try:
        with parquet.ParquetFile(file) as opened:
            rows = (row for batch in opened.iter_batches() for row in batch.to_pylist())
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows))
    except ArrowException as error:
        raise ConfigError(f"{file}: no Parquet: {error}") from error


def _folder(folder: Path, split: str) -> Iterator[Placed]:
    with naming_extras(f"reading {folder}"):
        import datasets
    try:
        found: Any = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(
            f"{folder} is no folder that the package datasets has written with save_to_disk: give the file in it"
        ) from error
    if isinstance(found, Mapping):
        if split not in found:
            raise ConfigError(f"{folder} has no split {split!r}: expected one of {', '.join(found)}")
        found = found[split]
    yield from ((f"{folder}, row {number}", row) for number, row in enumerate(found))
