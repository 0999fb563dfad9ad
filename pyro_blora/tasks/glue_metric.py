"""The official GLUE scores as an `evaluate.Metric`, computed here by scikit-learn and scipy.

`evaluate.load("glue", name)` fetches its script from the network; this one gives the same numbers under the same
keys, offline: `GlueScore("cola").compute(predictions=..., references=...)`, or `add_batch` for each batch and
`compute()` at the end. Source: Wang et al. 2019, GLUE (ICLR), section 3.

Where a score is undefined it is 0, the value of a predictor that knows nothing, so that averages over runs and JSON
stay finite: Matthews' and both correlations when the predictions (or the references) are constant, F1 when no
positive was predicted or present.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, recall_score, root_mean_squared_error


def matthews(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    if _is_constant(predictions) or _is_constant(references):
        return {"matthews_correlation": 0.0}
    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def correlations(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    if _is_constant(predictions) or _is_constant(references):
        return {"pearson": 0.0, "spearmanr": 0.0}
    return {
        "pearson": float(pearsonr(predictions, references).statistic),
        "spearmanr": float(spearmanr(predictions, references).statistic),
    }


def accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {"accuracy": float(accuracy_score(references, predictions))}


def accuracy_and_f1(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return accuracy(predictions, references) | {"f1": float(f1_score(references, predictions, zero_division=0.0))}


def of_pairs(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Sensitivity and specificity: the share that is found of the positives, and of the negatives; 0 without any."""
    found = {
        name: float(recall_score(references, predictions, pos_label=positive, zero_division=0.0))
        for name, positive in (("sensitivity", 1), ("specificity", 0))
    }
    return matthews(predictions, references) | found | accuracy_and_f1(predictions, references)


def of_classes(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """macro_f1: the mean over classes that are among labels or answers."""
    macro = float(f1_score(references, predictions, average="macro", zero_division=0.0))
    return accuracy(predictions, references) | {"macro_f1": macro} | matthews(predictions, references)


def of_numbers(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return correlations(predictions, references) | {"rmse": float(root_mean_squared_error(references, predictions))}


SCORES = {
    "cola": matthews,
    "sst2": accuracy,
    "mrpc": accuracy_and_f1,
    "stsb": correlations,
    "qqp": accuracy_and_f1,
    "mnli": accuracy,
    "mnli_mismatched": accuracy,
    "qnli": accuracy,
    "rte": accuracy,
    "wnli": accuracy,
    "acceptability": accuracy,
    "pairs": of_pairs,
}
OF_KINDS = {"categorical": of_classes, "normal": of_numbers}  # where a task has no score of its own


class GlueScore(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """The score of one GLUE task, of the demo task, or of a kind of outcome; no cache file is written.

    Errors: ValueError for an unknown configuration, and for `compute` on nothing or on non-finite values.
    """

    def __init__(self, config_name: str, *, keep_in_memory: bool = True, **settings: Any) -> None:
        if config_name not in SCORES | OF_KINDS:
            raise ValueError(f"no GLUE score is called {config_name!r}; known: {', '.join(SCORES)}")
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **settings)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float64" if self.config_name in ("stsb", "normal") else "int64")
        return evaluate.MetricInfo(
            description="The official score of a GLUE task, computed offline.",
            citation="Wang et al. 2019, GLUE: a multi-task benchmark for natural language understanding, ICLR.",
            inputs_description="predictions and references: class indices, or similarities from 0 to 5 for stsb.",
            features=datasets.Features({"predictions": value, "references": value}),
            format="numpy",
        )

    def _finalize(self) -> None:
        if self.keep_in_memory and self.buf_writer is None:  # evaluate would end in an AttributeError
            raise ValueError(_nothing(self.config_name))
        super()._finalize()

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError(_nothing(self.config_name))
        if not (np.isfinite(predictions).all() and np.isfinite(references).all()):
            raise ValueError(
                f"{self.config_name!r}: predictions or references are not finite; see whether the loss diverged"
            )
        return (SCORES | OF_KINDS)[self.config_name](predictions, references)


class LabelF1(evaluate.Metric):  # type: ignore[misc]
    """Of several labels an example, lists of 0 and 1: micro_f1, macro_f1, and the share of exact_match.

    A label that nobody has and no answer names counts 0.
    """

    def __init__(self, *, keep_in_memory: bool = True, **settings: Any) -> None:
        super().__init__(keep_in_memory=keep_in_memory, **settings)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="F1 of several labels an example.", citation="", inputs_description="lists of 0 and 1",
            features=datasets.Features({"predictions": value, "references": value}),
        )  # fmt: skip

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        x, y = np.asarray(predictions), np.asarray(references)
        scores = {f"{kind}_f1": float(f1_score(y, x, average=kind, zero_division=0.0)) for kind in ("micro", "macro")}
        return scores | {"exact_match": float((x == y).all(1).mean())}


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _nothing(name: str) -> str:
    return f"the score of {name!r} needs at least one prediction: call add_batch before compute"
