"""Simulation-based calibration: draw gates from the prior and labels from the model, infer, compare with the truth.

If the inference is exact, the truth is one more draw of the posterior: an event of posterior probability p is true with
probability p, and the rank of the truth among posterior draws is uniform. Ranks are taken among infinitely many draws,
from the exact distribution of the states, with random ties (the randomised probability integral transform).

Shapes: D simulations, S states, G gates.
Source: Talts et al. (2018); Modrak et al. (2023), for the log-likelihood as a quantity; Säilynoja, Bürkner and Vehtari,
Graphical test for discrete uniformity (2022), for simultaneous bands of an ECDF.
"""

import dataclasses
import functools

import numpy as np
import torch
from scipy import stats
from torch import Tensor

LEVEL = 0.05  # familywise, for one inference: shared among its statistics, and within the gates among the gates
STATISTICS = ("gates", "effective rank", "log-likelihood")
_NULL_DRAWS = 4000  # data sets simulated under calibration, for a p-value or a band
_POINTS = 100  # at which an ECDF is held against its band


@dataclasses.dataclass(frozen=True)
class Simulations:
    """D joint draws: states (D,), labels (D, N), and the labels' log-likelihood in all states (D, S)."""

    truth: Tensor
    labels: Tensor
    log_likelihood: Tensor

    @classmethod
    def of(cls, network, count: int, seed: int = 0) -> "Simulations":
        generator = torch.Generator().manual_seed(seed)
        prior = network.states.log_prior.exp()
        truth = torch.multinomial(prior, count, replacement=True, generator=generator)
        return cls(truth, *network.drawn(truth, generator))

    def split(self, size: int) -> list["Simulations"]:
        """The same in parts of at most `size`."""
        return [Simulations(*part) for part in zip(*(x.split(size) for x in dataclasses.astuple(self)), strict=True)]


def randomised_rank(quantity: Tensor, distribution: Tensor, truth: Tensor, generator: torch.Generator) -> Tensor:
    """P(quantity < truth's) + U P(quantity = truth's) under each distribution: uniform if calibrated.

    Shapes: quantity (S,) or (D, S), distribution (D, S), truth (D,) -> (D,).
    """
    quantity = quantity.expand(distribution.shape)
    true = quantity.gather(1, truth[:, None])
    below = torch.where(quantity < true, distribution, 0.0).sum(1)
    tied = torch.where(quantity == true, distribution, 0.0).sum(1)
    return below + torch.rand(len(distribution), generator=generator, dtype=distribution.dtype) * tied


@functools.lru_cache
def _null_minima(count: int, draws: int) -> np.ndarray:
    """Of uniform samples, the smallest two-sided binomial tail probability over the points, (draws,)."""
    random = np.random.default_rng(0)
    return np.array([_smallest_tail(random.random(count)) for _ in range(draws)])


def _points() -> np.ndarray:
    return np.arange(1, _POINTS) / _POINTS


def _smallest_tail(uniforms: np.ndarray) -> float:
    counts = np.searchsorted(np.sort(uniforms), _points(), side="right")
    distribution = stats.binom(len(uniforms), _points())
    return float(2 * np.minimum(distribution.cdf(counts), distribution.sf(counts - 1)).min())


def ecdf_p_value(uniforms: Tensor) -> float:
    """P(an exact inference leaves the ECDF's envelope as far as this one): the simultaneous test of uniformity."""
    null = _null_minima(len(uniforms), _NULL_DRAWS)
    return float((1 + (null <= _smallest_tail(uniforms.numpy())).sum()) / (1 + len(null)))


def ecdf_band(count: int, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, and the lower and upper ends of ECDF - point that exact ranks leave with probability `level`."""
    gamma = np.quantile(_null_minima(count, _NULL_DRAWS), level)
    distribution, points = stats.binom(count, _points()), _points()
    return points, distribution.ppf(gamma / 2) / count - points, distribution.ppf(1 - gamma / 2) / count - points


def gate_p_values(probability: Tensor, opened: Tensor, seed: int = 0) -> Tensor:
    """P-value of each gate's calibration: does an event of probability p come true with probability p?

    The statistic is the largest absolute sum of (opened - p) over the simulations in order of p, from either end; its
    distribution under calibration is simulated by drawing every event at its own p.
    Shapes: probability, opened (D, G) -> (G,).   Source: Tygert, Plots of the cumulative differences (2022).
    """
    generator = torch.Generator().manual_seed(seed)
    order = probability.argsort(0)
    p, truth = probability.gather(0, order), opened.gather(0, order)
    draws = torch.rand((_NULL_DRAWS, *p.shape), generator=generator) < p.float()
    null = _largest_sum(draws.float() - p.float())
    observed = _largest_sum((truth - p)[None].float())
    return (1 + (null >= observed - 1e-5).sum(0)) / (1 + _NULL_DRAWS)


def _largest_sum(difference: Tensor) -> Tensor:
    """(..., D, G) -> (..., G)"""
    return difference.cumsum(-2).abs().amax(-2)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What one inference makes of the simulations.

    probability, opened (D, G): P(open) and the truth. ranks: randomised ranks (D,) by quantity. gate_p: (G,).
    """

    probability: Tensor
    opened: Tensor
    ranks: dict[str, Tensor]
    gate_p: Tensor

    @property
    def p_values(self) -> dict[str, float]:
        """Of each statistic; for the gates Bonferroni's over all of them."""
        gates = min(1.0, self.gate_p.min().item() * len(self.gate_p))
        return {"gates": gates, **{name: ecdf_p_value(ranks) for name, ranks in self.ranks.items()}}

    @property
    def overconfidence(self) -> float:
        """Mean log score (nats an event) that q expects of itself, minus the one it gets: positive if overconfident."""
        p = self.probability.clamp(1e-6, 1 - 1e-6)
        gain = (p.log() - (1 - p).log()) * (p - self.opened)
        return gain.mean().item()


def calibration(states, simulations: Simulations, distribution: Tensor, seed: int = 0) -> Calibration:
    """Of an inference that answers with `distribution` (D, S); only the first D simulations are looked at."""
    generator = torch.Generator().manual_seed(seed)
    truth, log_likelihood = simulations.truth[: len(distribution)], simulations.log_likelihood[: len(distribution)]
    effective_rank = sum(states.depths[:, c] for c, (site, _) in enumerate(states.chains) if site == 1).double()
    ranks = {
        "effective rank": randomised_rank(effective_rank, distribution, truth, generator),
        "log-likelihood": randomised_rank(log_likelihood, distribution, truth, generator),
    }
    probability, opened = (distribution @ states.open).clamp(0, 1), states.open[truth]
    return Calibration(probability, opened, ranks, gate_p_values(probability, opened, seed))
