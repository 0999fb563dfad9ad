"""From the cells of a label column to a kind of outcome, and to the labels that it takes.

A rule a kind, of which the user is told: words, true and false are classes; whole numbers are classes where they are
few, or codes that begin with zeros, else a number; other numbers are a number; lists are several labels. The setting
`kind` overrides it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..categorical import Categorical
from ..normal import Normal
from .cells import Cell, Labels, few, name_of, number_of, order_of, shown
from .label_lists import parsed, several

if TYPE_CHECKING:
    import datasets

Kind = Literal["categorical", "normal", "multi_label"]
MOST_CODES = 30  # different whole numbers that are classes; more are a number
_MOSTLY = 0.9  # of the labels that are numbers: a word among them is a mistake
_MANY = 50  # classes, from which each must have two rows on average: else the column is text
_WIDEST = 3.0  # times the training labels' range, beyond which a validation label is a mistake
_COMMA = re.compile(r"[-+]?\d+,\d+")  # a number as written in much of Europe
_CODE = re.compile(r"\s*0\d+\s*")  # a whole number that begins with a zero
_LARGEST = 1e30  # of a number; squares of larger ones overflow


def is_empty(value: Any, kind: Kind | None, feature: Any = None) -> bool:
    """Whether a cell has no label: nothing, white space, nan, -1 of a type with names. For several labels: nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if value == -1 and not isinstance(value, str) and _names_of(feature) is not None:
        return True
    return isinstance(value, str) and not value.strip() and kind != "multi_label"


def named(value: Any, feature: Any) -> Any:
    """The names of a type in place of its numbers, so that sources of other types have the same labels."""
    names = _names_of(feature)
    if names is None:
        return value
    if isinstance(value, list):
        return [named(each, feature) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def infer(cells: Sequence[Cell], kind: Kind | None, feature: datasets.Features | None, column: str) -> Labels:
    """The kind of the training labels.  feature: the column's type, where the source has types; its names are in cells.

    Errors: ValueError for one class only, for labels of two sorts, and for a kind that they are not.
    """
    names = _names_of(feature)
    if kind == "multi_label" or (kind is None and all(parsed(cell.value) is not None for cell in cells)):
        return several(cells, names, column, given=kind is not None)
    if names is not None and kind != "normal":
        return _classes(cells, names, f"names in the type of {column!r} are classes")
    numbers = [number_of(cell.value) for cell in cells]
    if kind == "normal":
        return _a_number(cells, numbers, f"numbers, as kind normal says, in {column!r}", column)
    are_numbers = sum(x is not None for x in numbers)
    if kind is None and are_numbers >= _MOSTLY * len(cells):
        if are_numbers < len(cells):
            wrong = next(cell for cell, x in zip(cells, numbers, strict=True) if x is None)
            raise ValueError(
                f"{wrong.where}: the label {shown(wrong.value)} is no number, and {are_numbers:,} of {len(cells):,} "
                "are: correct it, leave it empty, or give --task.kind categorical"
            )
        values = {float(x) for x in numbers if x is not None}
        if any(not x.is_integer() for x in values):
            return _a_number(cells, numbers, f"numbers with decimals in {column!r} are a number to predict", column)
        are_codes = any(isinstance(cell.value, str) and _CODE.fullmatch(cell.value) for cell in cells)
        if len(values) > MOST_CODES and not are_codes:
            rule = (
                f"{len(values):,} different whole numbers in {column!r} are a number to predict (up to {MOST_CODES} "
                "are classes; --task.kind categorical takes any number of them as classes)"
            )
            return _a_number(cells, numbers, rule, column)
        codes, what = len({name_of(cell) for cell in cells}), "codes" if are_codes else "whole numbers"
        rule = f"{codes:,} different {what} in {column!r} are classes; --task.kind normal: a number"
    else:
        if kind is None:
            _require_points(cells)
        rule = (
            f"words in {column!r} are classes" if kind is None else f"classes, as kind categorical says, in {column!r}"
        )
    found = sorted({name_of(cell) for cell in cells}, key=order_of)
    if len(found) > _MANY and len(found) > len(cells) / 2 and kind is None:
        raise ValueError(
            f"the column {column!r} has {len(found):,} different labels in {len(cells):,} rows: name the column "
            "that has classes, --label NAME"
        )
    return _classes(cells, found, rule)


def _require_points(cells: Sequence[Cell]) -> None:
    """Refuse numbers with decimal commas, which would be words."""
    found = [cell for cell in cells if _COMMA.fullmatch(str(cell.value).strip())]
    others = sum(number_of(cell.value) is not None for cell in cells)
    if found and len(found) + others >= _MOSTLY * len(cells):
        raise ValueError(
            f"{found[0].where}: the label {shown(found[0].value)} has a decimal comma: write numbers with a point, or "
            "give --task.kind categorical"
        )


def widened(labels: Labels, cells: Sequence[Cell]) -> tuple[Labels, str]:
    """The same with a range that has the validation labels, and a sentence where it grew; other kinds as they are.

    The range only scales the head's output; a normal distribution has none.
    Errors: ValueError for a label that is so far out that it is a mistake.
    """
    kind = labels.likelihood
    if not isinstance(kind, Normal):
        return labels, ""
    values = [(float(labels.encode(cell)), cell) for cell in cells]
    beyond = [(x, cell) for x, cell in values if not kind.low <= x <= kind.high]
    if not beyond:
        return labels, ""
    low, high = min(kind.low, *(x for x, _ in beyond)), max(kind.high, *(x for x, _ in beyond))
    if high - low > _WIDEST * (kind.high - kind.low):
        _, cell = max(beyond, key=lambda pair: abs(pair[0] - (kind.low + kind.high) / 2))
        raise ValueError(
            f"{cell.where}: the label {shown(cell.value)} is far outside of those in training, {kind.low:g} to "
            f"{kind.high:g}: correct it or drop the row"
        )
    sentence = (
        f"{len(beyond):,} validation labels, the first in {beyond[0][1].where}, are outside of those in training, "
        f"{kind.low:g} to {kind.high:g}: the range was widened to {low:g} to {high:g}"
    )
    return labels._replace(likelihood=Normal(low, high)), sentence


# --- classes --------------------------------------------------------------------------------------------------------


def _classes(cells: Sequence[Cell], names: Sequence[str], rule: str) -> Labels:
    if len({name_of(cell) for cell in cells}) < 2:
        raise ValueError(
            f"{cells[0].where} and all other rows have the label {shown(cells[0].value)}: two classes or more are "
            "needed to learn from"
        )
    index = {name_of(cells[0]._replace(value=name)): number for number, name in enumerate(names)}

    def encode(cell: Cell) -> int:
        name = name_of(cell)
        if name not in index:
            raise ValueError(
                f"{cell.where}: the label {shown(cell.value)} is not among those in training: {few(names)}: add rows "
                "of it to train on, or drop this one"
            )
        return index[name]

    return Labels(Categorical(tuple(names)), rule, encode)


# --- a number -------------------------------------------------------------------------------------------------------


def _a_number(cells: Sequence[Cell], numbers: Sequence[float | None], rule: str, column: str) -> Labels:
    found = [_encode_number(cell) for cell in cells]
    low, high = min(found), max(found)
    if low == high:
        raise ValueError(f"every label in column {column!r} is {low:g}: there is nothing to learn from one value")
    return Labels(Normal(low, high), f"{rule}, from {low:g} to {high:g}", _encode_number)


def _encode_number(cell: Cell) -> float:
    """As float32, in which labels are kept, so that no rounding puts one beyond the range."""
    number = number_of(cell.value)
    if number is None or abs(number) > _LARGEST:
        raise ValueError(
            f"{cell.where}: the label {shown(cell.value)} is no finite number: correct it or leave it empty"
        )
    return float(np.float32(number))


def _names_of(feature: Any) -> list[str] | None:
    """Of a ClassLabel, or of a list of them."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return list(names) if names else None
