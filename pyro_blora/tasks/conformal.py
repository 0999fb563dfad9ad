"""Prediction sets with a stated coverage: split conformal prediction, by MAPIE, around a model's averaged predictions.

Calibrated on held-out rows, a set holds the label of a new row of the same population with at least the stated
probability, whatever the model; the probability is over rows, not given the row. Of classes it has those whose
probability is above a threshold, and may be empty (Sadinle, Lei and Wasserman, Least ambiguous set-valued classifiers,
2019); of numbers it is an interval of one width around the mean (Lei et al., Distribution-free predictive inference for
regression, 2018).
Shapes: E examples, C classes.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Checked(NamedTuple):
    """Of sets on rows that did not calibrate them: the share that holds the label, and the mean size."""

    share: float
    size: float
    rows: int


class Conformal(abc.ABC):
    """Sets for averages (E, *) as the likelihood keeps them."""

    unit = ""  # of their size

    @abc.abstractmethod
    def columns(self, mean: Tensor) -> dict[str, Any]:
        """Of a table of answers."""

    @abc.abstractmethod
    def check(self, mean: Tensor, labels: Tensor) -> Checked: ...


class ClassSets(Conformal):
    """A list of names for each row."""

    unit = "labels in a set"

    def __init__(self, names: Sequence[str], mean: Tensor, labels: Tensor, coverage: float):
        from mapie.classification import SplitConformalClassifier
        from sklearn.base import BaseEstimator, ClassifierMixin

        class AsPredicted(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # without types
            classes_ = np.arange(len(names))

            def fit(self, p: np.ndarray, labels: np.ndarray) -> AsPredicted:
                return self

            def predict_proba(self, p: np.ndarray) -> np.ndarray:
                return p

            def predict(self, p: np.ndarray) -> np.ndarray:
                return np.asarray(p.argmax(1))

        require_enough(len(labels), coverage)
        self.names = np.array(names, dtype=object)
        self._sets = SplitConformalClassifier(AsPredicted(), confidence_level=coverage, prefit=True)
        self._sets.conformalize(_probabilities(mean), labels.numpy())

    def members(self, mean: Tensor) -> np.ndarray:
        """(E, C) whether a class is in a row's set."""
        return np.asarray(self._sets.predict_set(_probabilities(mean))[1][:, :, 0])

    def columns(self, mean: Tensor) -> dict[str, Any]:
        return {"set": [self.names[each].tolist() for each in self.members(mean)]}

    def check(self, mean: Tensor, labels: Tensor) -> Checked:
        members = self.members(mean)
        held = members[np.arange(len(labels)), labels.numpy()]
        return Checked(float(held.mean()), float(members.sum(1).mean()), len(labels))


class Intervals(Conformal):
    """An interval for each row."""

    unit = "wide"

    def __init__(self, mean: Tensor, labels: Tensor, coverage: float):
        from mapie.regression import SplitConformalRegressor
        from sklearn.base import BaseEstimator, RegressorMixin

        class AsPredicted(RegressorMixin, BaseEstimator):  # type: ignore[misc]  # without types
            fitted_ = True

            def fit(self, mean: np.ndarray, labels: np.ndarray) -> AsPredicted:
                return self

            def predict(self, mean: np.ndarray) -> np.ndarray:
                return np.asarray(mean[:, 0])

        require_enough(len(labels), coverage)
        self._intervals = SplitConformalRegressor(AsPredicted(), confidence_level=coverage, prefit=True)
        self._intervals.conformalize(_column(mean), labels.double().numpy())

    def ends(self, mean: Tensor) -> np.ndarray:
        """(E, 2) the lower and the upper end."""
        return np.asarray(self._intervals.predict_interval(_column(mean))[1][:, :, 0])

    def columns(self, mean: Tensor) -> dict[str, Any]:
        return dict(zip(("set_low", "set_high"), self.ends(mean).T, strict=True))

    def check(self, mean: Tensor, labels: Tensor) -> Checked:
        low, high = self.ends(mean).T
        truth = labels.double().numpy()
        return Checked(float(((low <= truth) & (truth <= high)).mean()), float((high - low).mean()), len(truth))


def require_enough(rows: int, coverage: float) -> None:
    """Errors: ValueError where so few rows calibrate no set but that of everything, or that of nothing.

    MAPIE wants 1 / (1 - coverage), one more than suffice, and 1 / coverage, one more where that is a whole number.
    """
    needed = max(math.ceil(1 / (1 - coverage) - 1e-9), math.floor(1 / coverage + 1e-9) + 1)
    if rows >= needed:
        return
    remedy = "give more held-out rows"
    if rows >= 3:
        most, least = math.floor(1000 * (1 - 1 / rows)) / 1000, (math.floor(1000 / rows) + 1) / 1000
        remedy = f"lower it, to at most {most:g}" if coverage > 0.5 else f"raise it, to at least {least:g}"
    raise ValueError(
        f"coverage {coverage:g} needs {needed} rows to calibrate sets and {needed} to check them, there are "
        f"{rows} of each: {remedy}"
    )


def _probabilities(mean: Tensor) -> np.ndarray:
    """Rows that sum to 1 in float64."""
    p = mean.double().numpy()
    return np.asarray(p / p.sum(1, keepdims=True))


def _column(mean: Tensor) -> np.ndarray:
    return np.asarray(mean.double().numpy().reshape(-1, 1))
