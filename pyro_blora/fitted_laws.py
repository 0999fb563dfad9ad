"""Laws of the adapter's weights that are fitted to a training, SWAG along its path and Laplace's at its end.

What a law has: weight_laws.py. Shapes: D random weights, S draws, K deviations or eigenvalues.
"""

import math

import torch
from torch import Tensor

from .weight_laws import RandomWeights

PRECISIONS = (-5.0, 13.0)  # natural logarithms of the prior precisions that are tried on held-out rows: from, to
_LARGEST_FULL = 2048  # weights whose full Laplace covariance is computed by default


class Swag(RandomWeights):
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

    def require(self, steps: int, opening: int) -> None:
        """Refuse a training of `steps` steps, whose gates start at `opening`, in which there is too little to see.

        Errors: ValueError.
        """
        first, least = int(self.constant_from * steps), max(2, self.rank)
        if steps - first < least:
            raise ValueError(
                f"weights 'swag': {steps - first} steps after the burn-in are fewer than the {least} snapshots that it "
                "needs, at least its rank: raise --epochs, or lower --weights.burn_in or --weights.rank"
            )
        if first < opening:
            raise ValueError(
                f"weights 'swag' would average from step {first}, the gates start at step {opening}: raise "
                "--weights.burn_in to at least --kl_warmup"
            )

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


class Laplace(RandomWeights):
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
        self.register_buffer("prior_precision", torch.zeros((), dtype=torch.float32))
        if self.curvature == "low_rank":
            self.register_buffer("directions", torch.zeros(self.size, self.rank, dtype=torch.float32))  # orthonormal
            self.register_buffer("eigenvalues", torch.zeros(self.rank, dtype=torch.float32))
        else:  # theta = mean + scale noise
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
