"""Tables of answers, written as they come: CSV and JSON lines with lists as JSON, Parquet with types."""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

Rows = dict[str, list[Any]]  # cells by column
Types = dict[str, "pa.DataType"]  # by column
FORMATS = (".csv", ".jsonl", ".parquet")
_LARGEST = 1 << 53  # whole numbers up to which a float has each


@contextlib.contextmanager
def open_answers(target: Path | IO[str], suffix: str, types: Types | None = None) -> Iterator[Callable[[Rows], None]]:
    """What writes one table after another, all of the same columns, to a path or to an open stream of text.

    types: for Parquet, of columns whose first cells do not tell them; of the others they do.
    """
    if suffix == ".parquet":
        assert isinstance(target, Path)
        with contextlib.ExitStack() as open_files:
            yield _parquet(target, types or {}, open_files)
        return
    writer = _csv if suffix == ".csv" else _jsonl
    if isinstance(target, Path):
        with target.open("w", encoding="utf-8", newline="") as file:
            yield writer(file)
    else:
        yield writer(target)


def _csv(file: IO[str]) -> Callable[[Rows], None]:
    lines, begun = csv.writer(file, lineterminator="\n"), False
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)  # a lone \r ends a line for readers

    def write(rows: Rows) -> None:
        nonlocal begun
        if not begun:
            lines.writerow(rows)
            begun = True
        for cells in zip(*rows.values(), strict=True):
            written = [_as_json(x) if isinstance(x, list | dict) else x for x in cells]
            (quoted if any(isinstance(x, str) and "\r" in x for x in written) else lines).writerow(written)
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


def _parquet(path: Path, types: Types, open_files: contextlib.ExitStack) -> Callable[[Rows], None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None

    def write(rows: Rows) -> None:
        nonlocal writer
        if writer is None:
            own = types_of([{name: cells for name, cells in rows.items() if name not in types}])
            schema = pa.schema([(name, types.get(name, own.get(name))) for name in rows])
            writer = open_files.enter_context(pq.ParquetWriter(path, schema))
        columns = [
            pa.array([x if x is None or isinstance(x, str) else _as_json(x) for x in cells], pa.string())
            if writer.schema.field(name).type == pa.string() else pa.array(cells, writer.schema.field(name).type)
            for name, cells in rows.items()
        ]  # fmt: skip
        writer.write_table(pa.table(columns, schema=writer.schema))

    return write


def types_of(tables: Iterable[Rows]) -> Types:
    """For Parquet, the type of each column that has every cell as it is; text, of other cells JSON, where none has."""
    import pyarrow as pa

    found: Types = {}
    large: set[str] = set()  # columns with whole numbers that no float has
    for rows in tables:
        for name, cells in rows.items():
            large |= {name} if any(type(x) is int and abs(x) > _LARGEST for x in cells) else set()
            found[name] = _wider(found.get(name, pa.null()), _type(cells), name in large)
    return {name: pa.string() if pa.types.is_null(type) else type for name, type in found.items()}


def _type(cells: list[Any]) -> pa.DataType:
    import pyarrow as pa

    try:
        array = pa.array(cells)
    except (pa.ArrowException, OverflowError):
        return pa.string()
    if pa.types.is_list(array.type) and pa.types.is_null(array.type.value_type):
        return pa.list_(pa.string())
    same = all(x == y or (x != x and y != y) for x, y in zip(array.to_pylist(), cells, strict=True))
    return array.type if same else pa.string()


def _wider(one: pa.DataType, other: pa.DataType, large: bool) -> pa.DataType:
    """What has the cells of both types."""
    import pyarrow as pa

    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    return pa.float64() if {one, other} == {pa.int64(), pa.float64()} and not large else pa.string()
