"""Laws of the adapter's weights theta, one vector of D numbers: what is random about them, and how they are drawn.

A law is an `nn.Module`. The mean of theta is the net's own parameters, so that what trains is what is exported; the
task head is a point.

    random                      the keys of theta's parts, in order; none: theta is a point
    law() and prior()           if `in_training`: the guide's law of theta and its prior, of one event dimension
    divergence()                KL(law || prior), nats; 0 where training has a point
    kl_weight                   its weight in the loss; below 1: a cold posterior of the weights
    draw(S)                     (S, D) draws of what was learned
    stored                      numbers that are kept to draw from it, the mean included
    constant_from, plateau      SWAG: from which fraction of the steps the learning rate stays, and at which of its peak
    require(steps, opening)     SWAG: called before the first step, to refuse what is too short
    collect(step, steps)        SWAG: called after each step
    finish()                    SWAG: called after the last
    curvature                   Laplace: the structure that curvature.py fits when training has ended
    linearized                  predictions are those of the network linearized at the mean

Shapes: D random weights, S draws, K deviations.
"""

import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

Parameters = Mapping[tuple[int, str], nn.Parameter]  # by (projection, "lora_A", "lora_B" or "core")
_COLUMN = 10.0  # starting standard deviations in a unit of a factor's column: it has further to go than the diagonal
_TINY = 1e-12  # least variance of a scale that is learned in closed form


class Point(nn.Module):
    """Nothing is random."""

    in_training = linearized = False
    constant_from, curvature, kl_weight = 1.0, None, 1.0

    def __init__(self, weights: Parameters, head: Parameters | None = None):
        super().__init__()
        self.follow(weights, head or {})
        self.size = sum(p.numel() for p in weights.values())

    def follow(self, weights: Parameters, head: Mapping) -> None:
        """Take these parameters, which are the net's, for theta's mean and the head."""
        held = self.__dict__.get("_parts", weights)  # in the dict: this module does not own them
        self.__dict__["_parts"] = {key: weights[key] for key in held}
        self.__dict__["_head"] = dict(head)

    @property
    def parameters_of_net(self) -> list[nn.Parameter]:
        """theta's mean, where its law is learned."""
        return list(self._parts.values()) if self.in_training else []

    @property
    def random(self) -> tuple:
        return ()

    @property
    def stored(self) -> int:
        return self.size

    @property
    def mean(self) -> Tensor:
        """theta's mean, (D,): differentiable in the net's parameters."""
        return torch.cat([p.flatten() for p in self._parts.values()])

    def split(self, theta: Tensor) -> dict:
        """The parts of theta (..., D), by key."""
        sizes = [p.numel() for p in self._parts.values()]
        parts = zip(self._parts.items(), theta.split(sizes, -1), strict=True)
        return {key: part.unflatten(-1, p.shape) for (key, p), part in parts}

    def divergence(self) -> Tensor | float:
        return 0.0


class RandomWeights(Point):
    """All weights that are given are random."""

    def __init__(self, weights: Parameters, head: Parameters | None = None):
        if not weights:
            raise ValueError(
                "this law of the weights needs an adapter whose weights can be random: --adapter lora or xs"
            )
        super().__init__(weights, head)

    @property
    def random(self) -> tuple:
        return tuple(self._parts)


class Gaussian(RandomWeights):
    """theta ~ Normal(mean, std^2), every weight by itself; prior Normal(0, prior_std^2)."""

    in_training = True

    def __init__(
        self, weights: Parameters, head: Parameters, prior_std: float | None, start_std: float, kl_weight: float
    ):
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

    def law(self) -> dist.Distribution:
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

    def prior(self) -> dist.Distribution:
        return dist.Normal(torch.zeros_like(self.spread), self.prior_scale(), validate_args=False).to_event(1)

    def divergence(self) -> Tensor:
        return kl_divergence(self.law(), self.prior())

    def draw(self, draws: int) -> Tensor:
        return self.law().sample((draws,))


class LowRank(Gaussian):
    """theta ~ Normal(mean, diag(std^2) + F F^T) with F of `rank` columns."""

    def __init__(self, weights, head, prior_std, start_std, kl_weight, rank: int):
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

    def law(self) -> dist.Distribution:
        return dist.LowRankMultivariateNormal(self.mean, self.factor, self.std.square(), validate_args=False)

    def divergence(self) -> Tensor:
        scale = self.prior_scale()
        prior = dist.LowRankMultivariateNormal(
            torch.zeros_like(scale), torch.zeros_like(scale)[:, None], scale.square(), validate_args=False
        )
        return kl_divergence(self.law(), prior)
