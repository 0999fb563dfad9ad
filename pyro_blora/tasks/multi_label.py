"""Any of several labels: independent Bernoullis, one an output of the head.

Such a task is `Task(kind=MultiLabel(("angry", "sad")), metric_name="micro_f1", ...)`; its column `label` has a list of
0 and 1, one for every label, in their order.
Shapes: S draws, E examples, C labels.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from .divergences import of_labels
from .label_scores import by_label
from .likelihoods import Likelihood, register_likelihood

if TYPE_CHECKING:
    import datasets
    import evaluate
    import pandas as pd

_CONSTANTS = 50  # numbers of labels that are tried as the constant answer


class _Bernoulli(dist.Bernoulli):  # type: ignore[misc]  # made at run time by Pyro, with no type
    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = super().log_prob(value.to(self.logits.dtype))  # labels are integers
        return log_prob


@register_likelihood("multi_label")
@dataclasses.dataclass(frozen=True)
class MultiLabel(Likelihood):
    """Any of several labels, each with a probability of its own."""

    names: tuple[str, ...]
    problem_type = "multi_label_classification"
    no_confidence = "several labels: no single confidence"
    averaged_in_code = "logits.sigmoid()"
    left_out = ("Calibration",)
    observed = "labels"
    dims: ClassVar = {"labels": ("example", "class"), "probability": ("example", "class")}

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(f"labels {self.names!r}: give a tuple of two or more different names")

    @property
    def outputs(self) -> int:
        return len(self.names)

    def __call__(self, logits: Tensor, *, scale: Tensor | None = None) -> dist.Independent:
        self.require_outputs(logits)
        return dist.Independent(_Bernoulli(logits=logits.float()), 1)

    def allows(self, labels: np.ndarray) -> np.ndarray:
        if labels.ndim == 2 and labels.shape[1] == self.outputs:
            return np.asarray(np.isin(labels, (0, 1)).all(1))
        return np.array([np.shape(x) == (self.outputs,) and bool(np.isin(x, (0, 1)).all()) for x in labels])

    @property
    def allowed_labels(self) -> str:
        return f"allowed are lists of {self.outputs} numbers, 0 or 1 for each of {', '.join(self.names)}"

    @property
    def feature(self) -> datasets.Features:
        import datasets

        return datasets.Sequence(datasets.Value("int64"), length=self.outputs)

    @property
    def examples(self) -> list[list[int]]:
        each = np.eye(self.outputs, dtype=int)
        return [*each.tolist(), *(1 - each).tolist()]

    def averaged(self, distribution: dist.Independent, labels: Tensor) -> Tensor:
        return distribution.mean

    def decision(self, mean: Tensor) -> Tensor:
        return (mean > 0.5).long()

    def columns(self, outputs: Tensor) -> dict[str, np.ndarray]:
        mean = outputs.mean(0)
        return {f"probability_{label}": mean[:, index].numpy() for index, label in enumerate(self.names)}

    def read(self, table: pd.DataFrame) -> Tensor:
        return torch.tensor(table[[f"probability_{label}" for label in self.names]].to_numpy())

    def answers(self, outputs: Tensor, scale: Tensor) -> dict[str, Any]:
        decisions = self.decision(outputs.mean(0)).tolist()
        on = [[name for name, is_on in zip(self.names, row, strict=True) if is_on] for row in decisions]
        return {"labels": on, **self.columns(outputs)}

    def predicted(self, outputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"labels": torch.bernoulli(outputs, generator=generator).short(), "probability": outputs}

    def metric(self) -> evaluate.Metric:
        """Micro and macro F1, and the share of exact matches."""
        from .glue_metric import LabelF1  # now, as evaluate takes seconds

        return LabelF1()

    def constants(self, labels: np.ndarray) -> list[np.ndarray]:
        """The most frequent set of labels, which matches most often; and numbers of the most frequent labels, every one
        up to 50: the best for F1 is among them, and that of each label alone. Of more labels about as many as an
        example has."""
        order = np.argsort(-labels.mean(0), kind="stable")
        first = int(np.clip(round(labels.sum(1).mean()) - _CONSTANTS // 2, 0, max(0, self.outputs - _CONSTANTS)))
        counts = range(first, min(self.outputs, first + _CONSTANTS) + 1)
        _, rows, times = np.unique(np.packbits(labels > 0, axis=1), axis=0, return_index=True, return_counts=True)
        answers = [labels[rows[times.argmax()]]]
        answers += [np.isin(np.arange(self.outputs), order[:count]).astype(int) for count in counts]
        return [np.broadcast_to(answer, labels.shape) for answer in answers]

    def constant_log_scores(self, labels: np.ndarray) -> np.ndarray:
        from scipy.special import xlog1py, xlogy

        shares = labels.mean(0)
        return np.asarray((xlogy(labels, shares) + xlog1py(1 - labels, -shares)).sum(1))

    def divergence(self, teacher: Any, student: Any, labels: Tensor) -> Tensor:
        return of_labels(teacher.base_dist, student.base_dist)

    def fisher_directions(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return self.in_eigenbasis(logits, scale)

    def details(self, mean: Tensor, labels: Tensor) -> dict[str, Any]:
        """nll_per_label: of each label's averaged probability, nats an example; and a table of scores, worst first."""
        p, found = mean.double().clamp(1e-12, 1 - 1e-12), labels.double()
        nll = -(found * p.log() + (1 - found) * torch.log1p(-p)).mean(0)
        return {
            "nll_per_label": dict(zip(self.names, nll.tolist(), strict=True)),
            "tables": by_label(self.names, self.decision(mean), labels),
        }  # fmt: skip
