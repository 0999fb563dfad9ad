"""A task: which columns are text, what the labels mean, how likely a label is, and which number scores a prediction.

Everything that depends on the task and not on the method is here, as plain data and four small functions. A new task
is one `Task` given to `register_task`; nothing is subclassed.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyro.distributions as dist
import torch

if TYPE_CHECKING:
    import datasets
    import evaluate

SPLITS = ("train", "eval")  # what every `load` returns; further splits (MNLI's "eval_mismatched") are allowed


@dataclass(frozen=True, kw_only=True)
class Task:
    """A text classification or regression task."""

    name: str
    """The name on the command line, as on the hub: "sst2"."""
    text_columns: tuple[str, ...]
    """One column for single sentences, two for sentence pairs."""
    labels: tuple[str, ...]
    """Class names in the order of their integers; empty for regression."""
    metric_name: str
    """The headline number among those the metric returns: "matthews_correlation"."""
    load: Callable[..., dict[str, datasets.Dataset]]
    """`load(*, glue_dir=None, seed=0, n_train=None)` -> {"train": ..., "eval": ...}, with the text columns and "label";
    `n_train` limits the training rows (drawn with `seed`), None means the task's usual number."""
    label_range: tuple[float, float] | None = None
    """Lowest and highest label of a regression task, in the label's own units; None for classification."""
    make_metric: Callable[[], evaluate.Metric] | None = None
    """Builds the metric; None takes the `GlueScore` of the task's name, so a task of another name needs one."""

    def __post_init__(self) -> None:
        if isinstance(self.text_columns, str) or len(self.text_columns) not in (1, 2):
            raise ValueError(f"task {self.name!r} has text columns {self.text_columns!r}: name one, or two for pairs")
        if bool(self.labels) == (self.label_range is not None):
            raise ValueError(f"task {self.name!r}: give labels (classes) or label_range (regression), and only one")
        if len(self.labels) == 1:
            raise ValueError(
                f"task {self.name!r} has the single label {self.labels[0]!r}: classification needs two or more"
            )

        if isinstance(self.labels, str) or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"task {self.name!r} has labels {self.labels!r}: give a tuple of different class names")
        if self.label_range is not None and not -math.inf < self.label_range[0] < self.label_range[1] < math.inf:
            raise ValueError(f"task {self.name!r} has label_range {self.label_range}: give (lowest, highest), finite")

    def require_usable(self) -> None:
        """Try what a training would use at its end: `load`'s arguments, and the metric on perfect predictions.

        Errors: ValueError naming what is missing or fails, and the remedy.
        """
        from pyro_blora.tasks.metric import SCORES  # now, as evaluate takes seconds to import

        where = f"task {self.name!r}"
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"{where}: a name must be a word, as it is given to --task")
        try:
            inspect.signature(self.load).bind(glue_dir=None, seed=0, n_train=None)
        except TypeError as error:
            raise ValueError(f"{where}: load({error}): define load(*, glue_dir=None, seed=0, n_train=None)") from None
        if self.make_metric is None and self.name not in SCORES:
            raise ValueError(
                f"{where} has no make_metric: give a function that returns an evaluate.Metric, such as "
                f"make_metric=lambda: GlueScore({'stsb' if self.is_regression else 'sst2'!r}) with GlueScore of "
                "pyro_blora.tasks.metric"
            )
        if self.is_regression:
            low, high = self.label_range
            perfect = [low, (low + high) / 2, high]
        else:
            perfect = [*range(self.num_labels)] * 2
        try:
            scores = self.metric().compute(predictions=perfect, references=perfect)
        except Exception as error:  # a user's function, which may raise anything
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{where}: its metric fails on perfect predictions of its own labels: {said}") from error
        value = scores.get(self.metric_name) if isinstance(scores, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            known = ", ".join(map(repr, scores)) if isinstance(scores, Mapping) else repr(scores)
            raise ValueError(f"{where}: its metric gives no number {self.metric_name!r}, but {known}: set metric_name")

    @property
    def is_regression(self) -> bool:
        return self.label_range is not None

    @property
    def num_labels(self) -> int:
        """Outputs of the task head: one per class, one for regression."""
        return len(self.labels) or 1

    def likelihood(self, logits: torch.Tensor, *, scale: torch.Tensor | None = None) -> dist.Distribution:
        """The law of the labels given the head's outputs, in float32 whatever the autocast.

        Regression centres the Normal on `middle + half_range * logit`. An untrained head puts out values near 0, so
        it predicts the middle of the range (2.5 for STS-B) and logits of order 1 span the labels, as they do in
        classification. On the raw scale the first steps would only teach the bias where the labels lie, with
        gradients several times those of the adapters.

        Shapes: logits (..., num_labels); scale () > 0, in label units, regression only. Batch shape (...), so (B,)
        for a batch.
        """
        if logits.shape[-1] != self.num_labels:
            raise ValueError(
                f"task {self.name!r} needs logits of shape (..., {self.num_labels}), not {tuple(logits.shape)}: "
                f"build the head with num_labels={self.num_labels}"
            )
        if not self.is_regression:
            return dist.Categorical(logits=logits.float())
        if scale is None:
            raise ValueError(f"task {self.name!r} needs scale: pass the standard deviation of a label as a 0-d tensor")
        low, high = self.label_range
        return dist.Normal((high + low) / 2 + (high - low) / 2 * logits.squeeze(-1).float(), scale.float())

    def metric(self) -> evaluate.Metric:
        """A fresh metric; predictions are class indices, or labels in their own units for regression."""
        from pyro_blora.tasks.metric import GlueScore

        return self.make_metric() if self.make_metric else GlueScore(self.name)

    def validate(
        self, splits: Mapping[str, datasets.Dataset], *, source: str = "the data"
    ) -> dict[str, datasets.Dataset]:
        """The splits, unchanged, once every column is there and every label is one of the task's.

        Errors: ValueError naming the source, the split, the row (from 0), the label and what is allowed.
        """
        for split in SPLITS:
            if split not in splits:
                raise ValueError(
                    f"task {self.name!r}: {source} has no split {split!r}, only {sorted(splits)}: return both from load"
                )
        for split, rows in splits.items():
            where = f"task {self.name!r}: {source}, split {split!r}"
            missing = [column for column in (*self.text_columns, "label") if column not in rows.column_names]
            if missing:
                raise ValueError(f"{where} lacks the columns {missing}; it has {rows.column_names}: rename in load")
            labels = rows.select_columns(["label"]).with_format("numpy")[:]["label"]
            wrong = np.flatnonzero(~self._allowed(np.asarray(labels, dtype=np.float64)))
            if wrong.size:
                row = int(wrong[0])
                raise ValueError(
                    f"{where}, row {row} has label {labels[row]}; {self.allowed_labels}: correct it or drop it"
                )
        return dict(splits)

    @property
    def allowed_labels(self) -> str:
        """The labels in words, for messages."""
        if self.is_regression:
            return f"allowed are numbers from {self.label_range[0]:g} to {self.label_range[1]:g}"
        return "allowed are " + ", ".join(f"{index} ({label})" for index, label in enumerate(self.labels))

    def _allowed(self, labels: np.ndarray) -> np.ndarray:  # (N,) -> (N,) bool; NaN is never allowed
        if self.is_regression:
            low, high = self.label_range
            return (labels >= low) & (labels <= high)
        return np.isin(labels, np.arange(self.num_labels))
