"""Tables of a user's: CSV, TSV, JSONL, Parquet, a folder of `datasets.save_to_disk`, a data set of the hub, a stream.

    table = Table("train.csv")
    for line, cells in table.rows():
        print(line, cells["text"])

Rows are read one after the other, in constant memory. What is wrong with a row ends in a sentence with file and line.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ...user_files import require_plain
from ...user_values import is_encodable, nearest
from .delimited import delimiter_of, has_plain_quotes, header_of, in_words, rows_of
from .encodings import broken_byte, encoding_of, lines_of
from .sources import FORMATS, dataset_of

if TYPE_CHECKING:
    import datasets
    import pandas as pd

_TEXT = ("csv", "tsv", "jsonl")
_KNOWN = "CSV, TSV, JSONL, Parquet, a folder of datasets.save_to_disk, or the name of a data set on the hub"
_LOOKED_AT = 100  # first objects of a JSONL file, whose keys are its columns
_BATCH = 1024  # rows of Parquet and of datasets that are in memory at once
Row = tuple[int, dict[str, Any]]


class Table:
    """columns: their names. features: their types, of Parquet and datasets; else None.

    unit: what rows are numbered by, "line" or "row", from 1.
    remarks: sentences on how it was read, for the user: an encoding that was guessed, a separator.
    """

    features: datasets.Features | None = None
    _rows: Callable[[Sequence[str] | None], Iterator[Row]]

    def __init__(
        self, source: str | Path | IO[str], *, skipped: Callable[[str], None] | None = None,
        format: str | None = None, split: str | None = None,
    ) -> None:  # fmt: skip
        """source: a path, a name on the hub (`owner/name`, `owner/name/configuration`), or an open stream of text.
        A split of a folder or of the hub may be named behind a colon: `owner/name:train`.

        skipped: called with a sentence for each malformed row, which is then left out; None: the first one is an error.
        format: csv, tsv, jsonl or parquet; needed for a stream. split: of a source that has several.
        Errors: ValueError for what is no table, with the remedy.
        """
        self._skipped = skipped
        self.remarks: list[str] = []
        self.unit = "row"
        if not isinstance(source, str | Path):
            self.name = str(getattr(source, "name", "<stdin>"))
            if format not in _TEXT:
                raise ValueError(f"{self.name}: a stream of format {format!r}: name one of {', '.join(_TEXT)}")
            self._of_stream(source, format)
            return
        self.name, path = str(source), Path(source).expanduser()
        if (found := dataset_of(self.name, split)) is not None:
            self._of_dataset(found)
        elif (format := format or _format_of(path)) == "parquet":
            self._of_parquet(path)
        else:
            self._of_file(path, format)

    @classmethod
    def of_frame(cls, frame: pd.DataFrame, name: str) -> Table:
        """Of a pandas frame, whose missing values are None; rows are numbered from 1."""
        table = cls.__new__(cls)
        table.name, table.unit, table.remarks = name, "row", []
        table.columns = tuple(map(str, frame.columns))
        if len(set(table.columns)) < len(table.columns):
            raise ValueError(f"{name}: the frame has a column twice: rename or drop one")

        def rows(columns: Sequence[str] | None) -> Iterator[Row]:
            taken = [n for n, column in enumerate(table.columns) if columns is None or column in columns]
            names = [table.columns[n] for n in taken]
            values = (frame.iloc[:, n].astype(object) for n in taken)
            each = ([_plain(x) for x in column] for column in values)
            for number, cells in enumerate(zip(*each, strict=True), start=1):
                yield number, dict(zip(names, cells, strict=True))

        table._rows = rows
        return table

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """(number, cells by column), of the given columns or of all; of a stream only once.

        Errors: ValueError "file, line N: what is wrong; remedy" for a malformed row, unless there is `skipped`.
        """
        for number, cells in self._rows(columns):
            yield number, (cells if columns is None else {name: cells.get(name) for name in columns})

    def where(self, number: int) -> str:
        """A row in words, for messages: `train.csv, line 3`."""
        return f"{self.name}, {self.unit} {number}"

    def _refuse(self, number: int, what: str) -> None:
        sentence = f"{self.where(number)}: {what}"
        if self._skipped is None:
            raise ValueError(sentence)
        self._skipped(sentence)

    # --- text ---------------------------------------------------------------------------------------------------------

    def _of_file(self, path: Path, format: str) -> None:
        encoding, remark = encoding_of(path)
        self.remarks += [remark] if remark else []
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"

        def read() -> Iterator[str]:
            with path.open(encoding=encoding, newline="", errors=errors) as file:
                yield from lines_of(file, self.name)

        self._of_lines(read, format, again=True)

    def _of_stream(self, stream: IO[str], format: str) -> None:
        lines = lines_of(stream, self.name)
        self._of_lines(lambda: lines, format, again=False)

    def _of_lines(self, read: Callable[[], Iterator[str]], format: str, *, again: bool) -> None:
        """read: gives the lines; again: from the first one each time, where it is no stream."""
        self.unit = "line"
        lines, blank, first = read(), 0, ""
        for first in lines:
            if first.strip():
                break
            blank += 1
        if not first.strip():
            raise ValueError(f"{self.name} is empty: it needs rows")
        if format == "jsonl":
            self._of_objects(read, [first, *itertools.islice(lines, _LOOKED_AT)], blank, lines, again=again)
            return
        delimiter = "\t" if format == "tsv" else delimiter_of(first)
        if format == "csv" and delimiter != ",":
            self.remarks.append(f"{self.name} has columns separated by {in_words(delimiter)}")
        quoted = not (again and delimiter == "\t" and has_plain_quotes(read, delimiter))
        if not quoted:
            self.remarks.append(f'{self.name} has quotes (") as part of its texts, its columns are separated by tabs')
        names, count = header_of(first, lines, delimiter, quoted=quoted, where=self.name)
        self.columns, start = tuple(name for name in names if name), blank + count

        def rows(columns: Sequence[str] | None) -> Iterator[Row]:
            below = itertools.islice(read(), start, None) if again else lines
            return rows_of(below, names, delimiter, start + 1, quoted=quoted, refuse=self._refuse)

        self._rows = rows

    def _of_objects(
        self, read: Callable[[], Iterator[str]], seen: list[str], blank: int, lines: Iterator[str], *, again: bool
    ) -> None:
        if seen[0].lstrip().startswith("["):
            raise ValueError(f"{self.name} is one JSON list, not an object a line: jq -c '.[]' FILE > NEW.jsonl")
        names: dict[str, None] = {}
        for line in seen:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
                names |= dict.fromkeys(value) if isinstance(value, dict) else {}
        self.columns = tuple(names)

        def rows(columns: Sequence[str] | None) -> Iterator[Row]:
            every = enumerate(read(), start=1) if again else enumerate(itertools.chain(seen, lines), start=blank + 1)
            for number, line in every:
                if not line.strip():
                    continue
                try:
                    cells = json.loads(line)
                except (ValueError, RecursionError) as error:
                    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    self._refuse(number, f"not JSON ({what}): write one object a line")
                    continue
                if not isinstance(cells, dict):
                    self._refuse(number, f"{type(cells).__name__} instead of an object: write {{...}} in each line")
                elif said := broken_byte([line]):
                    self._refuse(number, said)
                elif "\\u" in line and not is_encodable(json.dumps(cells, ensure_ascii=False)):
                    self._refuse(number, "half of a surrogate pair (\\ud800 to \\udfff) is no character: correct it")
                else:
                    yield number, {**dict.fromkeys(self.columns), **cells}

        self._rows = rows

    # --- types --------------------------------------------------------------------------------------------------------

    def _of_parquet(self, path: Path) -> None:
        import datasets
        import pyarrow
        import pyarrow.parquet

        require_plain(path)
        try:
            schema = pyarrow.parquet.read_schema(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no Parquet file: {' '.join(str(error).split())}") from None
        self.features = datasets.Features.from_arrow_schema(schema)
        self.columns = tuple(self.features)

        def rows(columns: Sequence[str] | None) -> Iterator[Row]:
            number = 0
            with pyarrow.parquet.ParquetFile(path) as file:
                try:
                    for batch in file.iter_batches(_BATCH, columns=None if columns is None else list(columns)):
                        for cells in batch.to_pylist():
                            number += 1
                            yield number, cells
                except (pyarrow.ArrowException, OSError) as error:
                    what = " ".join(str(error).split())
                    raise ValueError(f"{path}, after row {number}: {what}: write the file anew") from None

        self._rows = rows

    def _of_dataset(self, found: datasets.Dataset) -> None:
        self.features, self.columns = found.features, tuple(found.column_names)

        def rows(columns: Sequence[str] | None) -> Iterator[Row]:
            needed = found if columns is None else found.select_columns([x for x in columns if x in self.columns])
            for start in range(0, len(needed), _BATCH):
                batch = needed[start : start + _BATCH]
                for row in range(min(_BATCH, len(needed) - start)):
                    yield start + row + 1, {name: cells[row] for name, cells in batch.items()}

        self._rows = rows


def _format_of(path: Path) -> str:
    if not path.is_file():
        beside = [x.name for x in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"there is no file {path}: {nearest(path.name, beside) or 'see the path'}")
    require_plain(path)
    suffix = path.suffix.lower()
    if suffix == ".json":  # often lines of objects; a list is refused with its remedy
        return "jsonl"
    if suffix not in FORMATS:
        raise ValueError(
            f"{path}: the ending {suffix!r} is none of {', '.join(FORMATS)}: rename or convert it ({_KNOWN})"
        )
    return FORMATS[suffix]


def _plain(cell: Any) -> Any:
    """A cell of a frame as Python's own: of NumPy's types, and None for what is missing."""
    cell = cell.tolist() if hasattr(cell, "tolist") else cell
    if isinstance(cell, list | dict | str):
        return cell
    return None if repr(cell) in ("<NA>", "NaT", "nan") else cell
