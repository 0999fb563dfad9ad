"""Gaussian distributions of the adapter's weights, learned with the gates by SVI. Shapes: D weights, S draws."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from ..registries import register_weights
from .base import Head, Parameters, RandomWeights, Sides, random_sides

_COLUMN = 10.0  # starting standard deviations in a unit of a factor's column: it has further to go than the diagonal
_TINY = 1e-12  # least variance of a scale that is learned in closed form


class Gaussian(RandomWeights):
    """theta ~ Normal(mean, std^2), independent weights; prior Normal(0, prior_std^2)."""

    in_training = True

    def __init__(self, weights: Parameters, head: Head, prior_std: float | None, start_std: float, kl_weight: float):
        super().__init__(weights, head)
        for name, value in (("prior_std", prior_std), ("start_std", start_std), ("kl_weight", kl_weight)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"weights: {name} must be a positive number, got {value}: leave it out")
        self.prior_std, self.start_std, self.kl_weight = prior_std, start_std, kl_weight
        self.spread = nn.Parameter(torch.zeros(self.size, dtype=torch.float32))

    @property
    def std(self) -> Tensor:
        """(D,); the diagonal part only, where there is more."""
        return self.start_std * torch.exp(self.spread)

    @property
    def stored(self) -> int:
        return 2 * self.size

    def distribution(self) -> Distribution:
        return dist.Normal(self.mean, self.std, validate_args=False).to_event(1)

    def variance(self) -> Tensor:
        return self.std.square()

    def prior_scale(self) -> Tensor:
        """(D,); where it is learned, the best one for each part of theta, which has a closed form."""
        if self.prior_std is not None:
            return torch.full_like(self.spread, self.prior_std)
        squares = (self.mean.square() + self.variance()).split([p.numel() for p in self._parts.values()])
        best = [square.mean().clamp(min=_TINY).sqrt() for square in squares]
        return torch.cat([scale.expand(len(square)) for scale, square in zip(best, squares, strict=True)])

    def prior(self) -> Distribution:
        return dist.Normal(torch.zeros_like(self.spread), self.prior_scale(), validate_args=False).to_event(1)

    def divergence(self) -> Tensor:
        return kl_divergence(self.distribution(), self.prior())

    def draw(self, draws: int) -> Tensor:
        return self.distribution().sample((draws,))


class LowRank(Gaussian):
    """theta ~ Normal(mean, diag(std^2) + F F^T) with F of `rank` columns."""

    def __init__(
        self, weights: Parameters, head: Head, prior_std: float | None, start_std: float, kl_weight: float, rank: int
    ):
        super().__init__(weights, head, prior_std, start_std, kl_weight)
        if rank < 1:
            raise ValueError(f"weights 'low_rank' needs a rank of at least 1, got {rank}: rank 0 is weights 'gaussian'")
        start = torch.randn(self.size, rank, dtype=torch.float32)
        self.columns = nn.Parameter(start * 0.1 / (_COLUMN * math.sqrt(rank)))

    @property
    def factor(self) -> Tensor:
        """F, (D, rank)."""
        return _COLUMN * self.start_std * self.columns

    @property
    def stored(self) -> int:
        return self.size * (2 + self.columns.shape[1])

    def variance(self) -> Tensor:
        return self.std.square() + self.factor.square().sum(-1)

    def distribution(self) -> Distribution:
        return dist.LowRankMultivariateNormal(self.mean, self.factor, self.std.square(), validate_args=False)

    def prior(self) -> Distribution:
        """In the same family as `distribution`, so that the KL is in closed form."""
        scale = self.prior_scale()
        zeros = torch.zeros_like(scale)
        return dist.LowRankMultivariateNormal(zeros, zeros[:, None], scale.square(), validate_args=False)


@register_weights("gaussian")
def gaussian(
    weights: Parameters, head: Head, *, prior_std: float | None = None, start_std: float = 0.01,
    kl_weight: float = 1.0, sides: Sides = "lora_A",
) -> Gaussian:  # fmt: skip
    """Independent Gaussians, learned with the gates by SVI: mean field, the BLoB family.

    Settings: prior_std (default: for each matrix the best, which has a closed form); start_std; kl_weight, of theta's
    KL beside that of the run: where rows are few the KL outweighs the likelihood, and nothing is learned, unless it is
    below 1; sides, of LoRA: lora_A as in BLoB, or both. An XS adapter has its core.
    Source: Wang et al., BLoB (2024).
    """
    return Gaussian(random_sides(weights, sides), head, prior_std, start_std, kl_weight)


@register_weights("low_rank")
def low_rank(
    weights: Parameters, head: Head, *, rank: int = 10, prior_std: float | None = None, start_std: float = 0.01,
    kl_weight: float = 1.0, sides: Sides = "lora_A",
) -> LowRank:  # fmt: skip
    """A Gaussian whose covariance is a diagonal plus `rank` directions across all matrices, learned by SVI.

    Settings: as of gaussian, and rank.
    Source: Ong, Nott and Smith, Gaussian variational approximation with a factor covariance structure (2018).
    """
    return LowRank(random_sides(weights, sides), head, prior_std, start_std, kl_weight, rank)
