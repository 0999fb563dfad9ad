"""The task `files`: texts with labels in files of a user's, whose kind of outcome is found in the data.

    pyro-blora train --data train.csv --validation_data dev.csv --text review --label stars

`from_frame` makes the same of pandas frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...progress import phase
from ...user_values import is_encodable
from ..base import Task
from ..files import limited, require_mostly_whole, require_rows
from ..likelihoods import Likelihood
from ..names import register_task
from .cells import Cell, Labels, as_text
from .columns import Columns, choose, require_columns
from .findings import Rows, counted, findings
from .labels import Kind, infer, is_empty, named, widened
from .reading import Table
from .sources import splits_of
from .splitting import SHARE, split

if TYPE_CHECKING:
    import datasets
    import pandas as pd

_HELD_OUT = ("validation", "valid", "dev", "val", "eval", "test")  # splits to validate on, the first that there is


@register_task(
    "files",
    named_after="data",
    flags={
        "data": "FILE of texts and labels: CSV, TSV, JSONL, Parquet, a folder of datasets.save_to_disk, a hub name",
        "validation_data": "FILE to validate on; none: a fifth of the texts of --data",
        "text": "COLUMN of the texts, or two with a comma between for pairs; none: by its name",
        "label": "COLUMN of the labels; none: by its name",
    },
)
def files(
    *, data: str, validation_data: str | None = None, text: str | None = None, label: str | None = None,
    kind: Kind | None = None, split_seed: int = 0,
) -> Task:  # fmt: skip
    """Texts and labels in files of your own, or on the hub: classes, several labels, or a number."""
    train, held_out = data, validation_data
    with phase(f"reading {data}", still=not Path(data).expanduser().exists()):
        said = []
        if held_out is None and len(splits := splits_of(data)) > 1:
            train = f"{data}:train" if "train" in splits else data  # without it, Table names the splits
            held_out = next((f"{data}:{name}" for name in _HELD_OUT if name in splits), None)
            said = [f"{held_out} to validate on"] if held_out else []
        tables = Table(train), None if held_out is None else Table(held_out)
        return _made("files", *tables, text=text, label=label, kind=kind, split_seed=split_seed, said=said)


def from_frame(
    name: str, train: pd.DataFrame, validation: pd.DataFrame | None = None, *,
    text: str | tuple[str, str] | None = None, label: str | None = None, kind: Kind | None = None, split_seed: int = 0,
) -> Task:  # fmt: skip
    """A task of pandas frames, for `register_task`; its kind of outcome is found in the labels.

    name: of the task. validation: rows to validate on; None: a fifth of the texts of `train`. text: a column, or two
    for pairs; text and label are guessed from usual names where they are None. kind: "categorical", "normal" or
    "multi_label" in place of what the labels look like. split_seed: of that fifth.
    Errors: ValueError for whatever in the frames cannot work.
    """
    tables = Table.of_frame(train, "train"), None if validation is None else Table.of_frame(validation, "validation")
    return _made(name, *tables, text=text, label=label, kind=kind, split_seed=split_seed, said=[])


def _made(
    name: str, table: Table, other: Table | None, *, text: str | tuple[str, ...] | None, label: str | None,
    kind: Kind | None, split_seed: int, said: list[str],
) -> Task:  # fmt: skip
    chosen = choose(table.name, table.columns, text, label)
    feature = None if table.features is None else table.features[chosen.label]
    raw = _read(table, chosen, kind)
    labels = infer(raw.labels, kind, feature, chosen.label)
    read = [*said, *([chosen.guessed] if chosen.guessed else []), labels.rule, *raw.said]
    if other is None:
        rows = _encoded(raw, labels, table)
        parts = split(rows.texts, rows.labels, labels.likelihood, split_seed)
        train, held_out = (_taken(rows, part) for part in parts)
        read.append(
            f"{SHARE:.0%} of the texts were drawn to validate on (stratified, --task.split_seed {split_seed}): there "
            "is no --validation_data"
        )
    else:
        require_columns(other.name, other.columns, chosen, table.name)
        raw_held = _read(other, chosen, kind)
        labels, grown = widened(labels, raw_held.labels)
        read += [*raw_held.said, *([grown] if grown else [])]
        train, held_out = _encoded(raw, labels, table), _encoded(raw_held, labels, other)
    likelihood = labels.likelihood
    found = {
        "source": table.name, "validation": None if other is None else other.name, "text": list(chosen.texts),
        "label": chosen.label, **findings(train, held_out, likelihood, read),
    }  # fmt: skip
    splits = {key: _dataset(rows, chosen, likelihood) for key, rows in (("train", train), ("eval", held_out))}

    def load(
        *, glue_dir: str | Path | None = None, seed: int = 0, n_train: int | None = None
    ) -> dict[str, datasets.Dataset]:
        require_rows(n_train)
        return {**splits, "train": limited(splits["train"], n_train, seed)}

    return Task(
        name=name, text_columns=chosen.texts, kind=likelihood, load=load, findings=found,
        metric_name="accuracy" if likelihood.classes else "micro_f1" if likelihood.names else "pearson",
    )  # fmt: skip


class _Raw(NamedTuple):
    """Rows with a text and a label; said: sentences on how they were read."""

    texts: list[tuple[str, ...]]
    labels: list[Cell]
    said: list[str]


def _read(table: Table, chosen: Columns, kind: Kind | None) -> _Raw:
    """Errors: ValueError for a malformed row, and for a table in which most rows lack a text or a label, or all."""
    feature = None if table.features is None else table.features[chosen.label]
    found, lacking = _Raw([], [], [*table.remarks]), _Lacking([], [])
    for number, cells in table.rows([*chosen.texts, chosen.label]):
        texts = tuple(_text(cells[name], name, table.where(number)) for name in chosen.texts)
        if not all(texts):
            lacking.text.append(number)
        elif is_empty(cells[chosen.label], kind, feature):
            lacking.label.append(number)
        else:
            found.texts.append(texts)
            found.labels.append(Cell(named(cells[chosen.label], feature), number, table.where))
    left_out = sorted([*lacking.text, *lacking.label])
    if not found.texts and not left_out:
        raise ValueError(f"{table.name} has no rows: it needs some under its columns")
    remedy = f"are the texts in {' and '.join(map(repr, chosen.texts))} and the labels in {chosen.label!r}?"
    require_mostly_whole(Path(table.name), left_out, len(found.texts), remedy)
    for numbers, what in zip(lacking, ("text", "label"), strict=True):
        if numbers:
            first = table.where(numbers[0])
            found.said.append(f"{counted(len(numbers), 'row')} without a {what} left out, the first in {first}")
    return found


class _Lacking(NamedTuple):
    text: list[int]
    label: list[int]


def _text(cell: Any, column: str, where: str) -> str:
    """As it is, but "" for white space alone; a number as text."""
    text = as_text(cell)
    if isinstance(text, str):
        if not is_encodable(text):
            raise ValueError(f"{where}: half of a surrogate pair in the text column {column!r}: correct it")
        return text if text.strip() else ""
    if cell is None or cell != cell:  # nan
        return ""
    raise ValueError(f"{where}: {type(cell).__name__} in the text column {column!r}: give texts")


def _encoded(raw: _Raw, labels: Labels, table: Table) -> Rows:
    numbers = [cell.number for cell in raw.labels]
    return Rows(raw.texts, [labels.encode(cell) for cell in raw.labels], numbers, table.unit, table.where)


def _taken(rows: Rows, chosen: Sequence[int]) -> Rows:
    return rows._replace(
        texts=[rows.texts[row] for row in chosen], labels=[rows.labels[row] for row in chosen],
        numbers=[rows.numbers[row] for row in chosen],
    )  # fmt: skip


def _dataset(rows: Rows, chosen: Columns, kind: Likelihood) -> datasets.Dataset:
    """With the text columns' own names, `label`, and `idx`, the number of the row in its source."""
    import datasets  # now, as it takes a second

    texts = {name: [text[place] for text in rows.texts] for place, name in enumerate(chosen.texts)}
    types = {name: datasets.Value("string") for name in texts} | {"label": kind.feature, "idx": datasets.Value("int64")}
    values = {**texts, "label": rows.labels, "idx": rows.numbers}
    return datasets.Dataset.from_dict(values, features=datasets.Features(types))
