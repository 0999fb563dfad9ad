"""Tables of answers, written as they come: CSV and JSON lines with lists as JSON, Parquet with types."""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

Rows = dict[str, list[Any]]  # cells by column
FORMATS = (".csv", ".jsonl", ".parquet")


@contextlib.contextmanager
def open_answers(target: Path | IO[str], suffix: str) -> Iterator[Callable[[Rows], None]]:
    """What writes one table after another, all of the same columns, to a path or to an open stream of text."""
    if suffix == ".parquet":
        assert isinstance(target, Path)
        with contextlib.ExitStack() as open_files:
            yield _parquet(target, open_files)
        return
    writer = _csv if suffix == ".csv" else _jsonl
    if isinstance(target, Path):
        with target.open("w", encoding="utf-8", newline="") as file:
            yield writer(file)
    else:
        yield writer(target)


def _csv(file: IO[str]) -> Callable[[Rows], None]:
    lines, begun = csv.writer(file, lineterminator="\n"), False

    def write(rows: Rows) -> None:
        nonlocal begun
        if not begun:
            lines.writerow(rows)
            begun = True
        for cells in zip(*rows.values(), strict=True):
            lines.writerow([_as_json(x) if isinstance(x, list | dict) else x for x in cells])
        file.flush()

    return write


def _jsonl(file: IO[str]) -> Callable[[Rows], None]:
    def write(rows: Rows) -> None:
        for cells in zip(*rows.values(), strict=True):
            file.write(f"{_as_json(dict(zip(rows, map(_number, cells), strict=True)))}\n")
        file.flush()

    return write


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _number(cell: Any) -> Any:
    """nan and infinities, which JSON does not have, as None."""
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _parquet(path: Path, open_files: contextlib.ExitStack) -> Callable[[Rows], None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None

    def write(rows: Rows) -> None:
        nonlocal writer
        if writer is None:
            schema = pa.schema([(name, _type(cells)) for name, cells in rows.items()])
            writer = open_files.enter_context(pq.ParquetWriter(path, schema))
        columns = [
            pa.array([x if x is None or isinstance(x, str) else _as_json(x) for x in cells], pa.string())
            if writer.schema.field(name).type == pa.string() else pa.array(cells, writer.schema.field(name).type)
            for name, cells in rows.items()
        ]  # fmt: skip
        writer.write_table(pa.table(columns, schema=writer.schema))

    def _type(cells: list[Any]) -> pa.DataType:
        """Of the answers, whose cells are alike; text for columns of several kinds, and where nothing is known."""
        try:
            found = pa.array(cells).type
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            return pa.string()
        if pa.types.is_list(found) and pa.types.is_null(found.value_type):
            return pa.list_(pa.string())
        return pa.string() if pa.types.is_null(found) else found

    return write
