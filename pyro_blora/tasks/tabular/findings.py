"""What is found in a user's rows before a training: how they were read, classes, duplicates, doubtful labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..likelihoods import Likelihood

_SHOWN = 5  # texts with different labels that are listed
_LONGEST = 80  # characters of a text that is
_FEW = 5  # training rows, below which a class is rare
_MOST_ROWS = 100  # of the table of classes


class Rows(NamedTuple):
    """Of one split.  texts: a tuple a row. labels: as the likelihood takes them. numbers: lines of the source.

    unit: what numbers count, "line" or "row". where: a number in words, for messages.
    """

    texts: list[tuple[str, ...]]
    labels: list[Any]
    numbers: list[int]
    unit: str
    where: Callable[[int], str]


def findings(train: Rows, held_out: Rows, kind: Likelihood, read: Sequence[str]) -> dict[str, Any]:
    """For the summary, the page and the block before a training: `sentences`, `warnings`, `tables` by caption.

    read: sentences on how the rows were read, which come first.
    """
    sentences = [*read, f"{len(train.texts):,} rows to train on, {len(held_out.texts):,} to validate on"]
    warnings: list[str] = []
    tables: dict[str, list[dict[str, Any]]] = {}
    balance = _balance(train, held_out, kind)
    sentences += balance.sentences
    warnings += balance.warnings
    if balance.table:
        shown = balance.table[:_MOST_ROWS]
        more = f", the first {_MOST_ROWS} of {len(balance.table):,}" if len(shown) < len(balance.table) else ""
        tables[f"Rows by label{more}"] = shown
    counts = Counter((text, _key(label)) for text, label in zip(train.texts, train.labels, strict=True))
    if copies := sum(count - 1 for count in counts.values()):
        repeat = f"{counted(copies, 'training row')} repeat{'s' if copies == 1 else ''} an earlier one"
        sentences.append(f"{repeat}, text and label: kept, as they may be meant to weigh more")
    known = set(train.texts)
    if common := [n for text, n in zip(held_out.texts, held_out.numbers, strict=True) if text in known]:
        warnings.append(
            f"texts of {len(common):,} of {len(held_out.texts):,} validation rows, the first in "
            f"{held_out.where(common[0])}, are trained on: scores are too good by them"
        )
    suspects = _suspects(train, kind)
    if suspects:
        warnings.append(
            f"{counted(len(suspects), 'text')} with different labels in different training rows: "
            + "; ".join(f"{row['text']!r} is {row['labels']}" for row in suspects[:2])
            + ("; ..." if len(suspects) > 2 else "")
        )
        more = f", the first {_SHOWN} of {len(suspects):,}" if len(suspects) > _SHOWN else ""
        tables[f"Texts with different labels{more}"] = suspects[:_SHOWN]
    return {"sentences": sentences, "warnings": warnings, "tables": tables}


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class _Balance(NamedTuple):
    sentences: list[str]
    warnings: list[str]
    table: list[dict[str, Any]]


def _balance(train: Rows, held_out: Rows, kind: Likelihood) -> _Balance:
    if not kind.names:
        values = np.asarray(train.labels, float)
        return _Balance(
            [f"labels have a mean of {values.mean():.4g} and a standard deviation of {values.std():.4g}"], [], []
        )
    names, total = kind.names, len(train.labels)
    each = [_counts(rows.labels, kind) for rows in (train, held_out)]
    order = sorted(range(len(names)), key=lambda c: (-each[0][c], c))
    table: list[dict[str, Any]] = [
        {"label": names[c], "training rows": int(each[0][c]), "share": float(each[0][c] / total),
         "validation rows": int(each[1][c])} for c in order
    ]  # fmt: skip
    large, small = table[0], table[-1]
    what = "classes" if kind.classes else "labels"
    sentences = [
        f"{len(names):,} {what}: {large['label']!r} in {large['share']:.1%} of the training rows, "
        f"{small['label']!r} in {small['share']:.1%}"
    ]
    if not kind.classes:
        none = sum(not any(label) for label in train.labels)
        mean = float(np.asarray(train.labels).sum(1).mean())
        sentences.append(f"{mean:.2f} labels a training row, none in {none:,}")
    rare = [row["label"] for row in table if row["training rows"] < _FEW]
    warnings = []
    if rare:
        shown = ", ".join(map(repr, rare[:_SHOWN])) + (", ..." if len(rare) > _SHOWN else "")
        warnings.append(f"fewer than {_FEW} training rows each: {shown}")
    return _Balance(sentences, warnings, table)


def _counts(labels: Sequence[Any], kind: Likelihood) -> np.ndarray:
    if kind.classes:
        return np.bincount(np.asarray(labels, int), minlength=len(kind.names))
    return np.asarray(np.asarray(labels, int).reshape(-1, len(kind.names)).sum(0))


def _suspects(rows: Rows, kind: Likelihood) -> list[dict[str, Any]]:
    """Texts that have more than one label, in their order, with their rows."""
    found: Mapping[tuple[str, ...], dict[Any, int]] = defaultdict(dict)
    for text, label, number in zip(rows.texts, rows.labels, rows.numbers, strict=True):
        found[text].setdefault(_key(label), number)
    return [
        {
            "text": _cut(" / ".join(text)),
            "labels": ", ".join(f"{_named(label, kind)} ({rows.unit} {number})" for label, number in labels.items()),
        }
        for text, labels in found.items() if len(labels) > 1
    ]  # fmt: skip


def _key(label: Any) -> Any:
    return tuple(label) if isinstance(label, list) else label


def _named(label: Any, kind: Likelihood) -> str:
    if kind.classes:
        return kind.names[int(label)]
    if not kind.names:
        return f"{label:g}"
    return " + ".join(name for name, x in zip(kind.names, label, strict=True) if x) or "no label"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
