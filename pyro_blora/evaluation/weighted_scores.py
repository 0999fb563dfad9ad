"""Scores of predictions in which an example counts as often as its weight says: what a bootstrap asks for.

All are functions of weighted averages, so those of many resamples are a matrix product.
Shapes: E examples, B resamples, C classes.
"""

from collections.abc import Callable

import numpy as np


def weighted_score(
    name: str, weights: np.ndarray, labels: np.ndarray, decision: np.ndarray, classes: int = 0
) -> np.ndarray:
    """The score with every example as often as its weight says; 0 where it is undefined.

    weights: (B, E).   labels, decision: (E), as `as_scored` gives them.   classes: C, or 0 of numbers.   Returns (B,).
    Errors: KeyError for a name that is not among `known_scores(classes)`.
    """
    weights = weights.astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        if classes:
            found = _OF_CLASSES[name](weights, labels, decision, classes)
        else:
            found = _OF_VALUES[name](weights, labels, decision)
    return np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)


def known_scores(classes: int) -> list[str]:
    return list(_OF_CLASSES if classes else _OF_VALUES)


def as_scored(name: str, *values: np.ndarray) -> list[np.ndarray]:
    """What a score is computed of: Spearman's of ranks in the whole sample, in which every row counts.

    In a resample they are close enough for a standard error.
    """
    return [_ranks(x) if name == "spearmanr" else x for x in values]


def _accuracy(w, labels, decision, classes) -> np.ndarray:
    return w @ (labels == decision) / w.sum(1)


def _f1(w, labels, decision, classes) -> np.ndarray:
    return 2 * (w @ ((labels == 1) & (decision == 1))) / (w @ (labels == 1) + w @ (decision == 1))


def _matthews(w, labels, decision, classes) -> np.ndarray:
    total, right = w.sum(1), w @ (labels == decision)
    true, given = (w @ np.eye(classes)[x] for x in (labels, decision))  # (B, C)
    spreads = (total**2 - np.square(true).sum(1)) * (total**2 - np.square(given).sum(1))
    return np.where(spreads > 0, (right * total - (true * given).sum(1)) / np.sqrt(spreads), 0.0)


def _macro_f1(w, labels, decision, classes) -> np.ndarray:
    """Over the classes that are among labels or decisions."""
    true, given = (w @ np.eye(classes)[x] for x in (labels, decision))  # (B, C)
    hits = (w * (labels == decision)) @ np.eye(classes)[labels]
    return np.nanmean(2 * hits / (true + given), axis=1)


def _recall(positive: int) -> Callable:
    def found(w, labels, decision, classes) -> np.ndarray:
        return w @ ((labels == positive) & (decision == positive)) / (w @ (labels == positive))

    return found


def _pearson(w, labels, decision) -> np.ndarray:
    w = w / w.sum(1, keepdims=True)
    x, y = _centred(labels), _centred(decision)
    cross = w @ (x * y) - (w @ x) * (w @ y)
    spreads = [np.clip(w @ (v * v) - (w @ v) ** 2, 0.0, None) for v in (x, y)]
    spread = np.sqrt(spreads[0] * spreads[1])
    return np.where(spread > 1e-12, cross / spread, 0.0)


def _centred(x: np.ndarray) -> np.ndarray:
    """Of a range of 1, whatever the unit; zeros where all are alike."""
    spread = np.ptp(x)
    return (x - x.mean()) / (spread if spread > 0 else np.inf)


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def _rmse(w, labels, decision) -> np.ndarray:
    return np.sqrt(w @ np.square(labels - decision) / w.sum(1))


_OF_CLASSES = {
    "accuracy": _accuracy, "f1": _f1, "macro_f1": _macro_f1, "matthews_correlation": _matthews,
    "sensitivity": _recall(1), "specificity": _recall(0),
}  # fmt: skip
_OF_VALUES = {"pearson": _pearson, "spearmanr": _pearson, "rmse": _rmse}
