"""SWAG: a Gaussian fitted to the path of the training. Shapes: D random weights, S draws, K deviations."""

import math

import torch
from torch import Tensor

from ..registries import register_weights
from .base import Head, Parameters, RandomWeights, whole_steps


class Swag(RandomWeights):
    """A Gaussian fitted to the weights that stochastic gradient steps pass through at a constant learning rate.

    theta ~ Normal(mean, (diag(variance) + D D^T / (K - 1)) / 2) with D the last K deviations from the running mean, as
    they are two estimates of the same covariance; K = 0: Normal(mean, diag(variance)). After the last step the net has
    the mean, and the head its own.
    """

    centre: Tensor  # (D,), running means of the weights
    square: Tensor  # (D,), of their squares
    deviations: Tensor  # (K, D)
    head_centre: Tensor
    count: Tensor  # (), snapshots so far

    def __init__(self, weights: Parameters, head: Head, rank: int, burn_in: float, snapshots: int, plateau: float):
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
        first, least = whole_steps(self.constant_from, steps), max(2, self.rank)
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
        first = whole_steps(self.constant_from, steps)
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


@register_weights(
    "swag",
    excludes={"choose_epoch": "--weights swag averages over the epochs among which --choose_epoch chooses: drop one"},
)
def swag(
    weights: Parameters, head: Head, *, rank: int = 10, burn_in: float = 0.5, snapshots: int = 20,
    plateau: float = 0.5,
) -> Swag:  # fmt: skip
    """A Gaussian fitted to the path of the training, with the paper's covariance.

    Settings: rank, K: deviations that are kept, 0 for a diagonal covariance; burn_in, the fraction of the steps before
    the first snapshot; snapshots, taken evenly after it; plateau, the learning rate then, as a fraction of the peak.
    Source: Maddox et al., A simple baseline for Bayesian uncertainty (2019); Marszalek et al., B-LoRA-XS (2025).
    """
    return Swag(weights, head, rank, burn_in, snapshots, plateau)
