"""One of several classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from .columns import beside, numbers
from .conformal import ClassSets
from .divergences import of_classes
from .label_scores import by_label
from .likelihoods import Likelihood, register_likelihood

if TYPE_CHECKING:
    import datasets
    import evaluate
    import pandas as pd


@register_likelihood("categorical")
@dataclasses.dataclass(frozen=True)
class Categorical(Likelihood):
    """One of several classes."""

    names: tuple[str, ...]
    problem_type: ClassVar[str | None] = "single_label_classification"
    has_confidence = True
    averaged_in_code: ClassVar[str | None] = "logits.softmax(-1)"
    dims: ClassVar = {"label": ("example",), "probability": ("example", "class")}
    curvature: ClassVar[str | None] = "classification"

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ValueError(f"the single label {''.join(self.names)!r}: classification needs two or more")
        if not isinstance(self.names, str) and (wrong := [name for name in self.names if not isinstance(name, str)]):
            raise ValueError(f"labels {self.names!r}: a name is a text, not {wrong[0]!r}: write {str(wrong[0])!r}")
        if isinstance(self.names, str) or len(set(self.names)) < len(self.names):
            raise ValueError(f"labels {self.names!r}: give a tuple of different class names")

    @property
    def outputs(self) -> int:
        return len(self.names)

    @property
    def classes(self) -> int:
        return len(self.names)

    def __call__(self, logits: Tensor, *, scale: Tensor | None = None) -> dist.Categorical:
        self.require_outputs(logits)
        return dist.Categorical(logits=logits.float())

    def allows(self, labels: np.ndarray) -> np.ndarray:
        return np.isin(numbers(labels), np.arange(self.outputs))

    @property
    def allowed_labels(self) -> str:
        return "allowed are " + ", ".join(f"{index} ({label})" for index, label in enumerate(self.names))

    @property
    def feature(self) -> datasets.Features:
        import datasets

        return datasets.ClassLabel(names=list(self.names))

    @property
    def examples(self) -> list[int]:
        return [*range(self.outputs)] * 2

    def reader(self, by_name: bool) -> tuple[Callable[[str], int], str]:
        written = self.names if by_name else map(str, range(self.outputs))
        allowed = "allowed are " + ", ".join(self.names) if by_name else self.allowed_labels
        return {label: index for index, label in enumerate(written)}.__getitem__, allowed

    def averaged(self, distribution: dist.Categorical, labels: Tensor) -> Tensor:
        return distribution.probs

    def divergence(self, teacher: Any, student: Any, labels: Tensor) -> Tensor:
        return of_classes(teacher, student)

    def decision(self, mean: Tensor) -> Tensor:
        return mean.argmax(-1)

    def columns(self, outputs: Tensor) -> dict[str, np.ndarray]:
        mean = outputs.mean(0)
        return {f"p_{label}": mean[:, index].numpy() for index, label in enumerate(self.names)}

    def read(self, table: pd.DataFrame) -> Tensor:
        return torch.tensor(self.probabilities(table).to_numpy())

    def answers(self, outputs: Tensor, scale: Tensor) -> dict[str, Any]:
        decision = self.decision(outputs.mean(0)).tolist()
        return {"label": [self.names[index] for index in decision], **self.columns(outputs)}

    def conformal(self, mean: Tensor, labels: Tensor, coverage: float) -> ClassSets:
        return ClassSets(self.names, mean, labels, coverage)

    def predicted(self, outputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        label = torch.multinomial(outputs.flatten(0, 1), 1, generator=generator).view(outputs.shape[:2]).short()
        return {"label": label, "probability": outputs}

    def metric(self) -> evaluate.Metric:
        """Accuracy, macro F1 and Matthews' correlation."""
        from .glue_metric import GlueScore  # now, as evaluate takes seconds

        return GlueScore("categorical")

    def constants(self, labels: np.ndarray) -> list[np.ndarray]:
        return [np.broadcast_to(c, labels.shape) for c in np.flatnonzero(np.bincount(labels, minlength=self.classes))]

    def constant_log_scores(self, labels: np.ndarray) -> np.ndarray:
        counts = np.bincount(labels, minlength=self.classes)
        return np.asarray(np.log(np.maximum(counts, 1) / len(labels))[labels])  # a class of no example is not asked

    def right(self, decision: Tensor, labels: Tensor) -> float | None:
        return float((decision == labels).double().mean())

    def details(self, mean: Tensor, labels: Tensor) -> dict[str, Any]:
        """Precision, recall and F1 of every class, worst first."""
        return {"tables": by_label(self.names, self.decision(mean), labels)}

    def probabilities(self, table: pd.DataFrame) -> pd.DataFrame:
        return table[[f"p_{label}" for label in self.names]]

    def worst(self, table: pd.DataFrame, count: int) -> tuple[str, pd.DataFrame]:
        answers = ("idx", "label", "decision", "deployed_decision")
        text = [name for name in table if table[name].dtype.kind not in "fiub" and name not in answers]
        wrong = table[table["decision"] != table["label"]]
        confidence = self.probabilities(wrong).max(axis=1).sort_values(ascending=False).head(count)
        worst = wrong.loc[confidence.index]
        label, answer = (worst[column].map(lambda i: self.names[int(i)]) for column in ("label", "decision"))
        added = {"label": label, "answer": answer, "confidence": confidence.map("{:.3f}".format)}
        sentence = f"{len(wrong)} of {len(table)} answers are wrong; these are the most confident."
        return sentence, beside(worst[text], added)

    def fisher_directions(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return self.in_eigenbasis(logits, scale)

    def gauss_newton_rows(self, J: Tensor, logits: Tensor) -> Tensor:
        """H of softmax probabilities p is diag(p) - p p^T."""
        p = logits.softmax(-1)[..., None]
        return (p.sqrt() * (J - (p * J).sum(1, keepdim=True))).flatten(0, 1)
