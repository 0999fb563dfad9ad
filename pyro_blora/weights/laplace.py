"""Laplace's approximation at the end of a training. Shapes: D random weights, S draws, K eigenvalues."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..registries import register_weights
from .base import Head, Parameters, RandomWeights

PRECISIONS = (-5.0, 13.0)  # natural logarithms of the prior precisions that are tried on held-out rows: from, to
_LARGEST_FULL = 2048  # weights whose full Laplace covariance is computed by default


class Laplace(RandomWeights):
    """theta ~ Normal(mean, inverse of prior precision and Gauss-Newton curvature at the trained weights).

    training/laplace_fit.py fits it. What is kept: full, the Cholesky factor of the covariance; low_rank, the
    curvature's largest eigenvalues with their eigenvectors; diag, the standard deviation of each weight.
    """

    curvature: str
    prior_precision: Tensor  # ()
    directions: Tensor  # (D, K), of low_rank, orthonormal
    eigenvalues: Tensor  # (K,), of low_rank
    scale: Tensor  # theta = mean + scale noise: (D, D) of full, (D,) of diag

    def __init__(
        self,
        weights: Parameters,
        head: Head,
        structure: str | None,
        rank: int,
        prior_precision: float | None,
        linearized: bool,
    ):
        super().__init__(weights, head)
        if prior_precision is not None and not 0 < prior_precision < math.inf:
            raise ValueError(f"weights 'laplace': prior_precision must be a positive number, got {prior_precision}")
        if rank < 1:
            raise ValueError(f"weights 'laplace': rank must be at least 1, got {rank}")
        self.curvature = structure or ("full" if self.size <= _LARGEST_FULL else "low_rank")
        self.rank, self.linearized, self.given_precision = min(rank, self.size), linearized, prior_precision
        self.register_buffer("prior_precision", torch.zeros((), dtype=torch.float32))
        if self.curvature == "low_rank":
            self.register_buffer("directions", torch.zeros(self.size, self.rank, dtype=torch.float32))
            self.register_buffer("eigenvalues", torch.zeros(self.rank, dtype=torch.float32))
        else:
            shape = (self.size,) * (2 if self.curvature == "full" else 1)
            self.register_buffer("scale", torch.zeros(shape, dtype=torch.float32))

    @property
    def stored(self) -> int:
        more = {
            "full": self.size * (self.size + 1) // 2, "low_rank": self.rank * (self.size + 1) + 1, "diag": self.size
        }  # fmt: skip
        return self.size + more[self.curvature]

    def draw(self, draws: int) -> Tensor:
        noise = torch.randn(draws, self.size, dtype=torch.float32, device=self.prior_precision.device)
        if self.curvature == "full":
            return self.mean + noise @ self.scale.mT
        if self.curvature == "diag":
            return self.mean + noise * self.scale
        shrunk = 1 - (1 + self.eigenvalues / self.prior_precision).rsqrt()  # of the prior's width, by direction
        noise = noise - noise @ self.directions * shrunk @ self.directions.mT
        return self.mean + noise * self.prior_precision.rsqrt()


@register_weights(
    "laplace",
    excludes={
        "average_over": "--weights laplace predicts by a network without dropout: drop --average_over dropout",
    },
)
def laplace(
    weights: Parameters, head: Head, *, structure: Literal["full", "low_rank", "diag"] | None = None,
    rank: int = 100, prior_precision: float | None = None, linearized: bool = True,
) -> Laplace:  # fmt: skip
    """A Gaussian from the curvature at the trained weights, by laplace-torch.

    Settings: structure of the curvature (default: full up to 2,048 weights, low_rank above); rank, how many of its
    largest eigenvalues low_rank keeps; prior_precision (default: of the least NLL on rows held out by --validation;
    without them of the largest marginal likelihood, which is often far too low); linearized, whether predictions are
    those of the network linearized at its weights, with derivatives that pass rounding straight through: where bit
    gates leave few bits, false is truer.
    Source: Daxberger et al., Laplace redux (2021); Yang et al., Laplace-LoRA (2024).
    """
    return Laplace(weights, head, structure, rank, prior_precision, linearized)
