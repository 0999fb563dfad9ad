"""Several labels a row: lists, also written as text; and lists of zeros and ones."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from ..multi_label import MultiLabel
from .cells import Cell, Labels, few, name_of, order_of, shown

_SEPARATORS = "|;"  # of several labels in one cell of text


def several(cells: Sequence[Cell], names: list[str] | None, column: str, *, given: bool) -> Labels:
    lists = [(cell, _labels_in(cell)) for cell in cells]
    if size := _multi_hot(lists):
        hot = MultiLabel(tuple(f"label_{number}" for number in range(size)))
        rule = f"lists of {size} zeros and ones in {column!r} are several labels"
        return Labels(hot, rule, lambda cell: _switches(cell, size))
    if names is None:
        if given and not any(len(labels) > 1 for _, labels in lists):
            raise ValueError(
                f"no row has several labels in column {column!r}: separate them by {' or '.join(_SEPARATORS)}, write "
                "JSON lists, or give --task.kind categorical"
            )
        names = sorted({name_of(cell._replace(value=x)) for cell, labels in lists for x in labels}, key=order_of)
    coded = {name_of(cells[0]._replace(value=name)): number for number, name in enumerate(names)}
    if len(names) < 2:
        raise ValueError(f"the lists in column {column!r} have {len(names)} different labels: two or more are needed")

    def encode(cell: Cell) -> list[int]:
        found = [0] * len(coded)
        for label in _labels_in(cell):
            name = name_of(cell._replace(value=label))
            if name not in coded:
                raise ValueError(
                    f"{cell.where}: the label {shown(label)} is not among those in training: {few(names)}: add rows "
                    "of it to train on, or drop it"
                )
            found[coded[name]] = 1
        return found

    return Labels(MultiLabel(tuple(names)), f"lists in {column!r} are several labels a row", encode)


def _multi_hot(lists: Sequence[tuple[Cell, list[Any]]]) -> int:
    """The length of lists of 0 and 1, one a label; 0 for lists of labels."""
    sizes = {len(labels) for _, labels in lists}
    is_hot = len(sizes) == 1 and all(_is_switch(x) for _, labels in lists for x in labels)
    return sizes.pop() if is_hot and min(sizes) > 1 else 0  # of one, [0] and [1] are the labels 0 and 1


def _is_switch(label: Any) -> bool:
    return not isinstance(label, str) and label in (0, 1)


def _switches(cell: Cell, size: int) -> list[int]:
    found = _labels_in(cell)
    if len(found) != size or not all(map(_is_switch, found)):
        raise ValueError(
            f"{cell.where}: the label {shown(cell.value)} is not {size} zeros and ones, as those in training are: "
            "correct it or drop the row"
        )
    return [int(x) for x in found]


def _labels_in(cell: Cell) -> list[Any]:
    found = parsed(cell.value)
    if found is not None:
        return [label for label in found if not (isinstance(label, str) and not label.strip())]
    if not isinstance(cell.value, str):
        raise ValueError(f"{cell.where}: {shown(cell.value)} is no list of labels: write one, as others have")
    if not cell.value.strip():
        return []
    separator = next((x for x in _SEPARATORS if x in cell.value), _SEPARATORS[0])
    return [label.strip() for label in cell.value.split(separator) if label.strip()]


def parsed(value: Any) -> list[Any] | None:
    """A list, also one written as JSON or as Python writes it; None for anything else."""
    if isinstance(value, list):
        return value
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = read(value.strip())
                return found if isinstance(found, list) else None
    return None
