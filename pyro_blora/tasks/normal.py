"""A number in a range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from .likelihoods import Likelihood, numbers, register_likelihood

if TYPE_CHECKING:
    import datasets
    import evaluate
    import pandas as pd


@register_likelihood("normal")
@dataclasses.dataclass(frozen=True)
class Normal(Likelihood):
    """A number from `low` to `high`, with one learned standard deviation.

    The distribution is centred on `middle + half_range * logit`. An untrained head puts out values near 0, so it
    predicts the middle of the range (2.5 for STS-B) and logits of order 1 span the labels, as they do in
    classification. On the raw scale the first steps would only teach the bias where the labels lie, with gradients
    several times those of the adapters.
    """

    low: float
    high: float
    problem_type = "regression"
    constant = "one normal distribution for all"
    averages = "predicted means"
    no_confidence = "regression: no confidence"
    dims: ClassVar = {"label": ("example",), "mean": ("example",)}
    curvature = "regression"

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"label_range {(self.low, self.high)}: give (lowest, highest), finite")

    @property
    def outputs(self) -> int:
        return 1

    def __call__(self, logits: Tensor, *, scale: Tensor | None = None) -> dist.Normal:
        self.require_outputs(logits)
        if scale is None:
            raise ValueError("the likelihood needs scale: pass the standard deviation of a label as a 0-d tensor")
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        return dist.Normal(middle + half * logits.squeeze(-1).float(), scale.float())

    def allows(self, labels: np.ndarray) -> np.ndarray:
        found = numbers(labels)
        return (found >= self.low) & (found <= self.high)

    @property
    def allowed_labels(self) -> str:
        return f"allowed are numbers from {self.low:g} to {self.high:g}"

    @property
    def feature(self) -> datasets.Features:
        import datasets

        return datasets.Value("float32")

    @property
    def examples(self) -> list[float]:
        return [self.low, (self.low + self.high) / 2, self.high]

    def reader(self, by_name: bool) -> tuple[Callable[[str], float], str]:
        return self._within, self.allowed_labels

    def _within(self, text: str) -> float:
        value = float(text)
        if not self.low <= value <= self.high:  # nan too
            raise ValueError(text)
        return value

    def averaged(self, distribution: dist.Normal, labels: Tensor) -> Tensor:
        return distribution.mean[..., None]

    def decision(self, mean: Tensor) -> Tensor:
        return mean.squeeze(-1)

    def columns(self, outputs: Tensor) -> dict[str, np.ndarray]:
        return {"std_over_draws": outputs.squeeze(-1).std(0, correction=0).numpy()}

    def read(self, table: pd.DataFrame) -> Tensor:
        return torch.tensor(table[["decision"]].to_numpy())

    def predicted(self, outputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"mean": outputs.squeeze(-1)}

    def metric(self) -> evaluate.Metric:
        """Pearson's and Spearman's correlations, and the root of the mean squared error."""
        from .glue_metric import GlueScore  # now, as evaluate takes seconds

        return GlueScore("normal")

    def constants(self, labels: np.ndarray) -> list[np.ndarray]:
        return [np.full(len(labels), labels.mean())]

    def constant_log_scores(self, labels: np.ndarray) -> np.ndarray:
        variance = max(labels.var(), 1e-12)
        squares = np.square(labels - labels.mean())
        return np.asarray(-0.5 * (np.log(2 * np.pi * variance) + squares / variance))

    def fisher_directions(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return self.in_eigenbasis(logits, scale)

    def linearized(self, logits: Tensor, scale: Tensor) -> Tensor:
        return self(logits, scale=scale).mean[:, None]

    def noise_std(self, scale: Tensor) -> Tensor | None:
        return scale

    def gauss_newton_rows(self, J: Tensor, logits: Tensor) -> Tensor:
        """H of a squared error is 1."""
        return J.flatten(0, 1)

    def card(self, labels: Sequence[str]) -> str:
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        return f"It predicts {middle:g} + {half:g} * its one output, from {self.low:g} to {self.high:g}."
