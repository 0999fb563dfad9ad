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
_LARGEST_FULL = 2048  # weights whose full Laplace covariance is computed by default
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


class _Random(Point):
    def __init__(self, weights: Parameters, head: Parameters | None = None):
        if not weights:
            raise ValueError(
                "this law of the weights needs an adapter whose weights can be random: --adapter lora or xs"
            )
        super().__init__(weights, head)

    @property
    def random(self) -> tuple:
        return tuple(self._parts)


class Gaussian(_Random):
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
        self.spread = nn.Parameter(torch.zeros(self.size))

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
        self.columns = nn.Parameter(torch.randn(self.size, rank) * 0.1 / (_COLUMN * math.sqrt(rank)))

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


class Swag(_Random):
    """A Gaussian fitted to the weights that stochastic gradient steps pass through at a constant learning rate.

    theta ~ Normal(mean, (diag(variance) + D D^T / (K - 1)) / 2) with D the last K deviations from the running mean, as
    they are two estimates of the same covariance; K = 0: Normal(mean, diag(variance)). After the last step the net has
    the mean, and the head its own.
    """

    def __init__(self, weights, head, rank: int, burn_in: float, snapshots: int, plateau: float):
        super().__init__(weights, head)
        if rank < 0 or rank == 1:
            raise ValueError(f"weights 'swag': rank must be 0 (diagonal) or at least 2, got {rank}: rank - 1 divides")
        if not 0 <= burn_in < 1 or not 0 < plateau <= 1:
            raise ValueError(
                "weights 'swag': burn_in must be from 0 to below 1 and plateau above 0 up to 1, fractions of the "
                f"steps and of the learning rate, got {burn_in} and {plateau}"
            )
        if snapshots < max(2, rank):
            raise ValueError(f"weights 'swag' needs as many snapshots as rank, and 2, got {snapshots}: raise it")
        self.rank, self.constant_from, self.snapshots, self.plateau = rank, burn_in, snapshots, plateau
        # double precision, as a variance is a difference of these
        self.register_buffer("centre", torch.zeros(self.size, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(self.size, dtype=torch.float64))
        self.register_buffer("deviations", torch.zeros(rank, self.size, dtype=torch.float64))
        self.register_buffer("head_centre", torch.zeros(sum(p.numel() for p in head.values()), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @property
    def stored(self) -> int:
        return self.size * (2 + self.rank)

    def due(self, step: int, steps: int) -> bool:
        """Whether the weights after step `step` (from 1) of `steps` are noted: evenly, from the burn-in on."""
        first = int(self.constant_from * steps)
        before, now = (max(0, (s - first) * self.snapshots // max(1, steps - first)) for s in (step - 1, step))
        return now > before

    @torch.no_grad()
    def collect(self, step: int, steps: int) -> None:
        if self.due(step, steps):
            self.note(self.mean, torch.cat([p.flatten() for p in self._head.values()] or [self.head_centre]))

    @torch.no_grad()
    def note(self, theta: Tensor, head: Tensor) -> None:
        """One more snapshot."""
        theta, n = theta.double(), int(self.count) + 1
        self.centre += (theta - self.centre) / n
        self.square += (theta.square() - self.square) / n
        self.head_centre += (head.double() - self.head_centre) / n
        if self.rank:
            self.deviations.copy_(torch.cat([self.deviations[1:], (theta - self.centre)[None]]))
        self.count += 1

    @torch.no_grad()
    def finish(self) -> None:
        """Set the net to the mean."""
        if not self.count:
            raise ValueError("weights 'swag' saw no snapshot: train for more steps, or lower --weights.burn_in")
        for key, value in self.split(self.centre).items():
            self._parts[key].copy_(value)
        for p, value in zip(
            self._head.values(), self.head_centre.split([p.numel() for p in self._head.values()]), strict=True
        ):
            p.copy_(value.view_as(p))

    def variance(self) -> Tensor:
        return (self.square - self.centre.square()).clamp(min=0.0)

    def covariance_parts(self, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """(diagonal (D,), factor (D, K)) of the covariance; rank: of the last deviations only."""
        rank = min(self.rank if rank is None else rank, int(self.count))
        if rank < 2:
            return self.variance(), self.deviations.new_zeros(self.size, 0)
        return self.variance() / 2, self.deviations[-rank:].mT / math.sqrt(2 * (rank - 1))

    def draw(self, draws: int, rank: int | None = None) -> Tensor:
        diagonal, factor = self.covariance_parts(rank)
        noise = torch.randn(draws, self.size, dtype=torch.float64, device=factor.device) * diagonal.sqrt()
        noise += torch.randn(draws, factor.shape[1], dtype=torch.float64, device=factor.device) @ factor.mT
        return (self.centre + noise).float()


class Laplace(_Random):
    """theta ~ Normal(mean, inverse of prior precision and Gauss-Newton curvature at the trained weights).

    curvature.py fits it. full: the Cholesky factor of the covariance is kept; low_rank: the curvature's largest
    eigenvalues, with their eigenvectors; diag: of every weight by itself.
    """

    def __init__(
        self, weights, head, structure: str | None, rank: int, prior_precision: float | None, linearized: bool
    ):
        super().__init__(weights, head)
        if prior_precision is not None and not 0 < prior_precision < math.inf:
            raise ValueError(f"weights 'laplace': prior_precision must be a positive number, got {prior_precision}")
        if rank < 1:
            raise ValueError(f"weights 'laplace': rank must be at least 1, got {rank}")
        self.curvature = structure or ("full" if self.size <= _LARGEST_FULL else "low_rank")
        self.rank, self.linearized, self.given_precision = min(rank, self.size), linearized, prior_precision
        self.register_buffer("prior_precision", torch.zeros(()))
        if self.curvature == "low_rank":
            self.register_buffer("directions", torch.zeros(self.size, self.rank))  # orthonormal, or 0
            self.register_buffer("eigenvalues", torch.zeros(self.rank))
        else:  # theta = mean + scale noise
            self.register_buffer("scale", torch.zeros((self.size,) * (2 if self.curvature == "full" else 1)))

    @property
    def stored(self) -> int:
        more = {
            "full": self.size * (self.size + 1) // 2, "low_rank": self.rank * (self.size + 1) + 1, "diag": self.size
        }  # fmt: skip
        return self.size + more[self.curvature]

    def draw(self, draws: int) -> Tensor:
        noise = torch.randn(draws, self.size, device=self.prior_precision.device)
        if self.curvature == "full":
            return self.mean + noise @ self.scale.mT
        if self.curvature == "diag":
            return self.mean + noise * self.scale
        shrunk = 1 - (1 + self.eigenvalues / self.prior_precision).rsqrt()  # of the prior's width, by direction
        noise = noise - noise @ self.directions * shrunk @ self.directions.mT
        return self.mean + noise * self.prior_precision.rsqrt()
