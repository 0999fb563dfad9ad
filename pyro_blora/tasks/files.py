"""Tables that a user gives: headers without twins, rows that are broken, and how many rows are taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

MOST_LEFT_OUT = 0.5  # of the rows, above which a file is not read, whatever its release's known faults


def require_header(path: Path, header: Sequence[str], needed: Sequence[str], remedy: str) -> None:
    """Refuse a header that lacks a column, or names a needed one twice: which of them is meant?

    Errors: ValueError naming the file, the columns and the remedy.
    """
    missing = [column for column in needed if column not in header]
    if missing:
        raise ValueError(f"{path}: the header line lacks the columns {missing}, it has {_shown(header)}; {remedy}")
    twice = [column for column, count in Counter(header).items() if count > 1 and column in needed]
    if twice:
        raise ValueError(f"{path}: the header line names {', '.join(map(repr, twice))} twice: rename or drop one")


def require_whole_row(where: str, row: Mapping[str | None, Any], header: Sequence[str]) -> None:
    """Refuse a row of `csv.DictReader` with more or fewer fields than the header: its texts would be in wrong columns.

    where: file and line, for the message.   Errors: ValueError with both numbers and the remedy.
    """
    fields = len(header) + len(row.get(None) or ()) - sum(field is None for field in row.values())
    if fields != len(header):
        raise ValueError(
            f"{where}: {fields} field{'' if fields == 1 else 's'}, but the header has {len(header)}: put texts that "
            "have commas in them into double quotes"
        )


def require_mostly_whole(path: Path, left_out: Sequence[int], kept: int, remedy: str) -> None:
    """Refuse a file of which most rows are broken, or have no label.

    left_out: the lines of those rows. Errors: ValueError naming the file, how many, the first line and the remedy.
    """
    rows = len(left_out) + kept
    if len(left_out) > MOST_LEFT_OUT * rows:
        raise ValueError(
            f"{path}: {len(left_out):,} of {rows:,} rows are broken or have no label, the first of them in line "
            f"{left_out[0]}; {remedy}"
        )


def require_rows(n_train: int | None, usual: str = "all") -> None:
    """Refuse a limit of less than one training row."""
    if n_train is not None and n_train < 1:
        raise ValueError(f"n_train is {n_train}: ask for at least one training row, or None for {usual}")


def limited(rows: datasets.Dataset, n_train: int | None, seed: int) -> datasets.Dataset:
    """As many rows, drawn with the seed; all of them where there are no more, or for None."""
    if n_train is None or n_train >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(n_train))


def _shown(header: Sequence[str]) -> list[str]:
    """The first columns: a file without a header has a sentence there."""
    return [name[:40] for name in header[:20]]
