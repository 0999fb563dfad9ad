"""Cells of tables: of a label column, how they are named and shown, and of a text column."""

from __future__ import annotations

import contextlib
import decimal
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..likelihoods import Likelihood

_WHOLE = re.compile(r"(?:-?(0)|(-?[1-9][0-9]*))(?:\.0+)?")  # a whole number as a table of numbers writes it


class Cell(NamedTuple):
    """Of the label column, never empty: its row's number, and the table's words for a number."""

    value: Any
    number: int
    words: Callable[[int], str]

    @property
    def where(self) -> str:
        """The row in words, for messages."""
        return self.words(self.number)


class Labels(NamedTuple):
    """rule: in words, why they are of this kind. encode: a cell -> what `likelihood` takes; ValueError for another."""

    likelihood: Likelihood
    rule: str
    encode: Callable[[Cell], Any]


def name_of(cell: Cell) -> str:
    """Of a class; 1, 1.0, "1" and "1.0" are one, and codes are as they are written: "010", "1E5"."""
    if isinstance(cell.value, str):
        written = cell.value.strip()
        whole = _WHOLE.fullmatch(written)
        return whole[1] or whole[2] if whole else written
    number = number_of(cell.value)
    if number is not None and number.is_integer():
        return str(int(cell.value))
    if isinstance(cell.value, list | dict):
        raise ValueError(f"{cell.where}: the label {shown(cell.value)} is a list, and others are not: correct it")
    return str(cell.value).lower() if isinstance(cell.value, bool) else str(cell.value).strip()


def order_of(name: str) -> tuple[float, str]:
    """Numbers in their order, before words in theirs."""
    number = number_of(name)
    return (math.inf if number is None else number, name)


def number_of(value: Any) -> float | None:
    """None for what is no finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | decimal.Decimal):
        return None
    if isinstance(value, str) and "_" in value:  # Python reads 1_000 as a number
        return None
    with contextlib.suppress(ValueError, OverflowError):
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def as_text(cell: Any) -> Any:
    """A number of a text column as text, as a file without types would have it; anything else as it is."""
    return str(cell) if isinstance(cell, int | float) and not math.isnan(cell) else cell


def few(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
