"""A number in a range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from ..interval import INTERVAL
from .columns import numbers
from .conformal import Intervals
from .likelihoods import Likelihood, register_likelihood

if TYPE_CHECKING:
    import datasets
    import evaluate
    import pandas as pd

_LEAST_VARIANCE = 1e-12  # of labels that are all alike, in squares of the standard deviation that training starts from
_FAR, _HALVINGS = 8.0, 60  # standard deviations that hold all quantiles; halvings that leave nothing in float64


@register_likelihood("normal")
@dataclasses.dataclass(frozen=True)
class Normal(Likelihood):
    """A number from `low` to `high`, with one learned standard deviation.

    The distribution is centred on `middle + half_range * logit`. An untrained head puts out values near 0, so it
    predicts the middle of the range (2.5 for STS-B) and logits of order 1 span the labels, as they do in
    classification. On the raw scale the first steps would only teach the bias where the labels lie, with gradients
    several times those of the adapters. The noise starts at a fifth of the range, so that labels in another unit are
    learned as well: its logarithm moves by no more than the learning rate in a step.
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

    @property
    def starting_std(self) -> float:  # type: ignore[override]  # a default of the class there, of the range here
        """1 on STS-B's range, 0 to 5."""
        return (self.high - self.low) / 5

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

    def answers(self, outputs: Tensor, scale: Tensor) -> dict[str, Any]:
        """mean; std_over_draws of the mean; std of a label, with its noise; low and high: 94 % of a label's density."""
        means = outputs.squeeze(-1).double()  # (S, E)
        noise, over_draws = scale.double().cpu().expand(len(means), 1), means.std(0, correction=0)
        low, high = (_quantile(means, noise, p) for p in INTERVAL)
        std = (over_draws**2 + noise.square().mean(0)).sqrt()
        found = {"mean": means.mean(0), "std_over_draws": over_draws, "std": std}
        return {name: x.numpy() for name, x in {**found, "low": low, "high": high}.items()}

    def conformal(self, mean: Tensor, labels: Tensor, coverage: float) -> Intervals:
        return Intervals(mean, labels, coverage)

    def predicted(self, outputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"mean": outputs.squeeze(-1)}

    def metric(self) -> evaluate.Metric:
        """Pearson's and Spearman's correlations, and the root of the mean squared error."""
        from .glue_metric import GlueScore  # now, as evaluate takes seconds

        return GlueScore("normal")

    def constants(self, labels: np.ndarray) -> list[np.ndarray]:
        return [np.full(len(labels), labels.mean()), np.full(len(labels), np.median(labels))]

    def constant_log_scores(self, labels: np.ndarray) -> np.ndarray:
        variance = max(labels.var(), _LEAST_VARIANCE * self.starting_std**2)
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

    @property
    def averaged_in_code(self) -> str:
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        return f"{float(middle)!r} + {float(half)!r} * logits.squeeze(-1)"


def _quantile(means: Tensor, std: Tensor, p: float) -> Tensor:
    """(E,) of equally likely normal distributions, by bisection.  means (S, E), std (S, 1)"""
    low, high = (means - _FAR * std).amin(0), (means + _FAR * std).amax(0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle - means) / std).mean(0) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
