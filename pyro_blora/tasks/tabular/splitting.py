"""Validation rows out of the training rows, where a user has given none: stratified, without a text on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence, Sized
from typing import Any

import numpy as np

from ..likelihoods import Likelihood

SHARE = 0.2  # of the texts
_FEWEST = 4  # different texts, with which a split has two on each side or nearly so
_QUANTILES = 10  # of numbers, in which they are stratified


def split(texts: Sequence[Hashable], labels: Sequence[Any], kind: Likelihood, seed: int) -> tuple[list[int], list[int]]:
    """(training rows, validation rows), as indices in their order.

    texts: of each row; equal ones stay together. A stratum is a class; of several labels the rarest of a row; of a
    number its decile. A stratum of one text, and every label that training rows would lack, goes to training.
    Errors: ValueError for too few texts.
    """
    from sklearn.model_selection import train_test_split

    first: dict[Hashable, int] = {}
    for row, text in enumerate(texts):
        first.setdefault(text, row)
    if len(first) < _FEWEST:
        raise _too_few(first)
    strata = _strata([labels[row] for row in first.values()], kind)
    counts = Counter(strata)
    rows = [row for row, stratum in zip(first.values(), strata, strict=True) if counts[stratum] > 1]
    of = [stratum for stratum in strata if counts[stratum] > 1]
    size = max(round(SHARE * len(first)), len(set(of)))  # one of each stratum
    if len(set(of)) < 2:  # nothing to stratify by
        rows, of, size = [*first.values()], [], max(1, round(SHARE * len(first)))
    held = train_test_split(rows, test_size=min(size, len(rows) // 2), random_state=seed, stratify=of or None)[1]
    chosen = {texts[row] for row in held}
    train = [row for row, text in enumerate(texts) if text not in chosen]
    lacking = _outcomes(labels, kind, range(len(labels))) - _outcomes(labels, kind, train)
    if lacking:
        chosen -= {texts[row] for row in held if _outcomes(labels, kind, [row]) & lacking}
        train = [row for row, text in enumerate(texts) if text not in chosen]
    if not chosen:
        raise _too_few(first)
    return train, [row for row, text in enumerate(texts) if text in chosen]


def _too_few(texts: Sized) -> ValueError:
    return ValueError(f"{len(texts)} different texts are too few to split: give --validation_data, or more rows")


def _strata(labels: Sequence[Any], kind: Likelihood) -> list[int]:
    if kind.classes:
        return [int(label) for label in labels]
    if not kind.names:
        edges = np.quantile(np.asarray(labels, float), np.linspace(0, 1, _QUANTILES + 1)[1:-1])
        return [int(x) for x in np.searchsorted(edges, np.asarray(labels, float))]
    table = np.asarray(labels)
    frequency = np.where(table > 0, table.sum(0), len(table) + 1)
    return [int(x) for x in np.where(table.any(1), frequency.argmin(1), -1)]


def _outcomes(labels: Sequence[Any], kind: Likelihood, rows: Sequence[int] | range) -> set[int]:
    """The classes, or the labels, that some of the rows have; of numbers none."""
    if kind.classes:
        return {int(labels[row]) for row in rows}
    return {n for row in rows for n, x in enumerate(labels[row]) if x} if kind.names else set()
