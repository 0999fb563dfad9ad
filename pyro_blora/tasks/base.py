"""A task: which columns are text, what kind of outcome the labels are, and which number scores a prediction.

Everything that depends on the task and not on the method is here, as plain data and four small functions. A new task
is one `Task` given to `register_task`; nothing is subclassed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .categorical import Categorical
from .likelihoods import Likelihood
from .normal import Normal

if TYPE_CHECKING:
    import datasets
    import evaluate

_AT_ONCE = 1000  # rows that are looked at
SPLITS = ("train", "eval")  # what every `load` returns; further splits (MNLI's "eval_mismatched") are allowed


@dataclass(frozen=True, kw_only=True)
class Task:
    """Texts with labels of one kind (likelihoods.py)."""

    name: str
    """The name on the command line, as on the hub: "sst2"."""
    text_columns: tuple[str, ...]
    """One column for single sentences, two for sentence pairs."""
    labels: tuple[str, ...] = ()
    """Class names in the order of their integers; empty for other kinds of outcome."""
    metric_name: str
    """The headline number among those the metric returns: "matthews_correlation".

    More of it is better; less is where its name is one of `evaluation.baselines.ERRORS`: "rmse", "mae", "wer".
    """
    load: Callable[..., dict[str, datasets.Dataset]]
    """`load(*, glue_dir=None, seed=0, n_train=None)` -> {"train": ..., "eval": ...}, with the text columns and "label";
    `n_train` limits the training rows (drawn with `seed`), None means the task's usual number."""
    label_range: tuple[float, float] | None = None
    """Lowest and highest label of a regression task, in the label's own units; None for classification."""
    kind: Likelihood | None = None
    """Of the outcome, such as `MultiLabel(names)`; None for that of labels (classes) or label_range (a number)."""
    make_metric: Callable[[], evaluate.Metric] | None = None
    """Builds the metric; None takes the `GlueScore` of the task's name, and for other names that of the kind."""
    findings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What was found in the rows, shown before a training, in the summary and on the page: `sentences`, `warnings`, and
    `tables` (lists of rows by caption); {} for nothing."""

    def __post_init__(self) -> None:
        if isinstance(self.text_columns, str) or len(self.text_columns) not in (1, 2):
            raise ValueError(f"task {self.name!r} has text columns {self.text_columns!r}: name one, or two for pairs")
        if (bool(self.labels), self.label_range is not None, self.kind is not None).count(True) != 1:
            raise ValueError(
                f"task {self.name!r}: give labels (classes) or label_range (regression) or a kind, and only one"
            )
        try:
            self.likelihood  # noqa: B018 (it refuses labels that are none)
        except ValueError as error:
            raise ValueError(f"task {self.name!r} has {error}") from None

    @functools.cached_property
    def likelihood(self) -> Likelihood:
        """The distribution of a label given the head's outputs, and all that follows from it."""
        if self.kind is not None:
            return self.kind
        return Normal(*self.label_range) if self.label_range is not None else Categorical(self.labels)

    def require_usable(self) -> None:
        """Try what a training would use at its end: `load`'s arguments, and the metric on perfect predictions.

        Errors: ValueError naming what is missing or fails, and the remedy.
        """
        where = f"task {self.name!r}"
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"{where}: a name must be a word, as it is given to --task")
        try:
            inspect.signature(self.load).bind(glue_dir=None, seed=0, n_train=None)
        except TypeError as error:
            raise ValueError(f"{where}: load({error}): define load(*, glue_dir=None, seed=0, n_train=None)") from None
        perfect = self.likelihood.examples
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
    def num_labels(self) -> int:
        """Outputs of the task head: one per class, one for regression."""
        return self.likelihood.outputs

    def metric(self) -> evaluate.Metric:
        """A fresh metric; predictions are decisions, as the labels are."""
        if self.make_metric:
            return self.make_metric()
        return metric_of(self.name, self.likelihood)

    def validate(
        self, splits: Mapping[str, datasets.Dataset], *, source: str = "the data"
    ) -> dict[str, datasets.Dataset]:
        """The splits, once every column is there, every text is one, and every label is one of the task's.

        They are unchanged, but that they are read as Python's objects, and that labels which are true or false, or 0.0
        and 1.0, are whole numbers where the task's are. Empty texts are let through: the official QQP has some.
        Errors: ValueError naming the source, the split, the row (from 0), the text or label and what is allowed.
        """
        for split in SPLITS:
            if split not in splits:
                raise ValueError(
                    f"task {self.name!r}: {source} has no split {split!r}, only {sorted(splits)}: return both from load"
                )
        found = {}
        for split, rows in splits.items():
            where = f"task {self.name!r}: {source}, split {split!r}"
            if not hasattr(rows, "column_names"):
                raise ValueError(f"{where} is a {type(rows).__name__}: load must return a datasets.Dataset of each")
            if not len(rows):
                raise ValueError(f"{where} has no rows: leave it out")
            if "/" in split:
                raise ValueError(f"{where}: its predictions are a file of that name: rename it")
            rows = rows if rows.format["type"] in (None, "custom") else rows.with_format(None)  # not as tensors
            missing = [column for column in (*self.text_columns, "label") if column not in rows.column_names]
            if missing:
                raise ValueError(f"{where} lacks the columns {missing}; it has {rows.column_names}: rename in load")
            labels = rows.select_columns(["label"]).with_format("numpy")[:]["label"]
            wrong = np.flatnonzero(~self.likelihood.allows(labels))
            if wrong.size:
                row = int(wrong[0])
                raise ValueError(
                    f"{where}, row {row} has label {labels[row]}; {self.allowed_labels}: correct it or drop it"
                )
            self._require_texts(rows, where)
            found[split] = self._as_whole(rows, labels)
        return found

    def _as_whole(self, rows: datasets.Dataset, labels: np.ndarray) -> datasets.Dataset:
        """The rows with whole numbers as labels, where they are others and the task's are whole."""
        if type(self.likelihood.examples[0]) is not int or labels.dtype.kind in "iu":
            return rows
        import datasets

        return rows.cast_column("label", datasets.Value("int64"))

    def _require_texts(self, rows: datasets.Dataset, where: str) -> None:
        read = rows.select_columns([*self.text_columns, "label"])  # as they are tokenized
        for start, batch in zip(itertools.count(0, _AT_ONCE), read.iter(_AT_ONCE), strict=False):
            for column in self.text_columns:
                for row, cell in enumerate(batch[column], start):
                    is_empty = isinstance(cell, str) and not cell.strip()
                    if not is_empty and not self.likelihood.is_text(cell):
                        raise ValueError(
                            f"{where}, row {row} has {repr(cell)[:60]} in its text column {column!r}, which is no text "
                            "that is read there: correct it or drop it"
                        )

    @property
    def allowed_labels(self) -> str:
        """The labels in words, for messages."""
        return self.likelihood.allowed_labels


def metric_of(task: str, likelihood: Likelihood) -> Any:
    """The `GlueScore` of a task's name, and for other names the metric of its kind of outcome."""
    from .glue_metric import SCORES, GlueScore  # now, as evaluate takes seconds to import

    return GlueScore(task) if task in SCORES else likelihood.metric()


def has_glue_score(task: str) -> bool:
    from .glue_metric import SCORES

    return task in SCORES
