"""What the fits of an ensemble predict together: each fit's mean counts as a draw, a label has the draws of all fits.

Shapes: S draws, E examples; `*` further dimensions of an outcome.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..posterior.prediction import Prediction


@dataclasses.dataclass(frozen=True)
class OfFits(Prediction):
    """fits: the outputs of the draws of each fit, (S, E, *); scales: () the standard deviation of a label in each."""

    fits: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    @classmethod
    def of(cls, each: Sequence[Prediction], scales: Sequence[Tensor]) -> OfFits:
        """scales: where a label is no number, they are not read."""
        first, fits = each[0], tuple(p.outputs for p in each)
        outputs, log_likelihood = first.outputs, first.log_likelihood
        if len(each) > 1:
            outputs, log_likelihood = torch.stack([p.mean for p in each]), torch.stack([p.log_score for p in each])
        return cls(outputs, log_likelihood, first.labels, first.likelihood, fits, tuple(x.cpu() for x in scales))

    @property
    def of_label(self) -> tuple[Tensor, Tensor]:
        """(outputs, scale) as `Likelihood.answers` takes them: all draws of all fits where a label has noise."""
        if len(self.fits) == 1 or self.likelihood.noise_std(self.scales[0]) is None:
            return self.outputs, self.scales[0]
        scales = [scale.expand(len(outputs), 1) for outputs, scale in zip(self.fits, self.scales, strict=True)]
        return torch.cat(self.fits), torch.cat(scales)

    def alone(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same of every draw, of an ensemble of every fit."""
        if len(self.fits) > 1 and self.likelihood.noise_std(self.scales[0]) is not None:
            return zip(self.fits, self.scales, strict=True)
        return ((outputs[None], self.scales[0]) for outputs in self.outputs)
