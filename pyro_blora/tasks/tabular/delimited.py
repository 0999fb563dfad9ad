"""CSV and TSV by Python's csv module in strict mode: where they are delimited, and whether their quotes are text."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .encodings import LONGEST, broken_byte

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
Refuse = Callable[[int, str], None]  # a line's number and what is wrong with it: raises, or leaves the line out


def delimiter_of(header: str) -> str:
    """A comma, or where the header line has none what stands there most often instead."""
    if "," in header:
        return ","
    return max(_DELIMITERS, key=header.count)


def in_words(delimiter: str) -> str:
    return _DELIMITERS[delimiter]


def has_plain_quotes(read: Callable[[], Iterable[str]], delimiter: str) -> bool:
    """Whether quotes are part of the texts, as in GLUE's files: no row goes on in the next line, and quoting fails.

    A TSV may be quoted as a CSV is, or not at all; only the whole file tells which.
    """
    widths: set[int] = set()
    lines = 0
    for line in read():
        if line.strip():
            widths.add(line.count(delimiter))
            lines += 1
        if len(widths) > 1:
            return False
    try:
        rows = sum(bool(row) for row in _reader(read(), delimiter, quoted=True))
    except csv.Error:
        return True
    return rows != lines


def header_of(line: str, lines: Iterator[str], delimiter: str, *, quoted: bool, where: str) -> tuple[list[str], int]:
    """(names of the columns, number of lines of the header).  line: its first; lines: those below.

    Errors: ValueError for a name that is there twice.
    """
    reader = _reader(itertools.chain([line], lines), delimiter, quoted)
    try:
        names = [name.strip() for name in next(reader)]
    except csv.Error as error:
        raise ValueError(f"{where}, line 1: {error}: correct the header line") from None
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: the header line names {twice[:40]!r} twice: rename or drop one")
    return names, reader.line_num


def rows_of(
    lines: Iterable[str], names: list[str], delimiter: str, first: int, *, quoted: bool, refuse: Refuse
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its first line, cells by column) of every row.  lines: below the header. first: the number of theirs.

    Columns without a name are left out.
    """
    reader = _reader(lines, delimiter, quoted)
    while True:
        number = first + reader.line_num
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            refuse(number, fault_of(error))
            continue
        if not row:
            continue
        if len(row) != len(names):
            remedy = f"put texts that have {in_words(delimiter)} in them into double quotes"
            refuse(number, f"{len(row)} field{'' if len(row) == 1 else 's'}, but the header has {len(names)}: {remedy}")
        elif said := broken_byte(row):
            refuse(number, said)
        else:
            yield number, {name: cell for name, cell in zip(names, row, strict=True) if name}


def read_long_fields() -> None:
    """Let csv read fields as long as a line may be, for the whole process; its own limit is 131,072 characters."""
    csv.field_size_limit(max(LONGEST, csv.field_size_limit()))


def _reader(lines: Iterable[str], delimiter: str, quoted: bool) -> Any:
    read_long_fields()
    if quoted:
        return csv.reader(lines, delimiter=delimiter, strict=True)
    return csv.reader(lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE)


def fault_of(error: csv.Error) -> str:
    """In words, with the remedy."""
    if "field limit" in str(error):
        return f"a field has more than {csv.field_size_limit():,} characters: is a quote left open?"
    if "expected after" in str(error):
        return 'a quote inside a quoted text: write it twice, "", or close the quoted text before'
    if "unexpected end" in str(error):
        return "a quote is left open until the end of the file: close it"
    return f"{error}: correct it"
