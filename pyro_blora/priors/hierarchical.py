"""A prior whose rates are random: Gamma distributions of the rates, learned with everything else."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import register_kl

from ..gates import Gates, NestedBernoulli
from ..interval import INTERVAL
from ..layout import AdapterLayout
from ..registries import register_prior
from .base import Prior


@register_kl(torch.distributions.LogNormal, torch.distributions.Gamma)
def _kl_log_normal_gamma(q: torch.distributions.LogNormal, p: torch.distributions.Gamma) -> Tensor:
    entropy = q.loc + 0.5 + 0.5 * math.log(2 * math.pi) + q.scale.log()
    gamma = p.concentration * p.rate.log() - p.concentration.lgamma()
    return -entropy - gamma - (p.concentration - 1) * q.loc + p.rate * q.mean


class Hierarchical(Prior):
    """Nested gates whose rates, site `rates`, have a Gamma prior and a log-normal guide, learned with everything else.

    As the prior of z or g alone its site is `z_rates` or `g_rates`. A role or type without a ladder has parameters, as
    in older checkpoints, but no rate, which would only cost KL.
    """

    site = "rates"
    kind: Tensor  # (L,), the number of each projection's type
    used: Tensor  # (n,), places among all names of the rates of ladders that exist

    def __init__(self, layout: AdapterLayout, shape: float, rate: float):
        super().__init__()
        self.shape, self.rate, self.z_shape, self.g_shape = shape, rate, layout.z_shape, layout.g_shape
        kinds = list(dict.fromkeys(p.type for p in layout.projections))
        self.names = [*layout.tensors, *(f"rank_{kind}" for kind in kinds)]
        self.register_buffer("kind", torch.tensor([kinds.index(p.type) for p in layout.projections]), persistent=False)
        ranked = {p.type for p in layout.adapted} if layout.rank > 1 else set()
        exist = [*layout.z_mask.any(0).tolist(), *(kind in ranked for kind in kinds)]
        self._use([i for i, exists in enumerate(exist) if exists])
        self.loc = nn.Parameter(torch.full((len(self.names),), math.log(shape / rate)))  # of log(rate)
        self.log_sd = nn.Parameter(torch.full((len(self.names),), -1.0))

    def only(self, site: str) -> None:
        tensors = self.z_shape[1]
        self._use([i for i in self.used.tolist() if (i < tensors) == (site == "z")])
        self.site = f"{site}_rates"

    def _use(self, places: list[int]) -> None:
        self.in_use = [self.names[i] for i in places]
        self.register_buffer("used", torch.tensor(places, dtype=torch.long, device=self.kind.device), persistent=False)

    def _gates(self, rates: Tensor) -> Gates[NestedBernoulli]:
        """rates (..., tensors + types) -> distributions of z (..., L, T, K) and g (..., L, R - 1)."""
        T, lead = self.z_shape[1], rates.shape[:-1]
        z, g = rates[..., None, :T, None].expand(*lead, *self.z_shape), rates[..., T:][..., self.kind, None]
        return Gates(*(NestedBernoulli(-x, validate_args=False) for x in (z, g.expand(*lead, *self.g_shape))))

    def _distribution(self, name: str) -> torch.distributions.Distribution:
        """Of all rates (n,), used or not: variational (`posterior`) or Gamma (`prior`)."""
        if name == "posterior":
            return torch.distributions.LogNormal(self.loc, self.log_sd.exp(), validate_args=False)
        shape, rate = (torch.full_like(self.loc, x) for x in (self.shape, self.rate))
        return torch.distributions.Gamma(shape, rate, validate_args=False)

    def distribution_in_use(self, name: str) -> dist.TorchDistribution:
        """The same as a distribution of Pyro's, of the rates in use."""
        distribution, kinds = self._distribution(name), {"posterior": dist.LogNormal, "prior": dist.Gamma}
        kind: Callable[..., dist.TorchDistribution] = kinds[name]
        return kind(
            *(getattr(distribution, key)[self.used] for key in distribution.arg_constraints), validate_args=False
        )

    def forward(self) -> Gates[NestedBernoulli]:
        """The gates' distributions at the rates' posterior means."""
        return self._gates(self._distribution("posterior").mean)

    def pyro_model(self) -> Gates[NestedBernoulli]:
        return self.gates_at(self._rates("prior")) if self.in_use else self()

    def pyro_guide(self) -> dict[str, Tensor]:
        return {self.site: self._rates("posterior")} if self.in_use else {}

    def _rates(self, of: str) -> Tensor:
        """A sample site of the rates in use, (n,)."""
        count = len(self.rate_names)
        with pyro.plate(self.site.removesuffix("s"), count):
            return pyro.sample(self.site, self.distribution_in_use(of)).reshape(count)

    @property
    def rate_names(self) -> list[str]:
        return self.in_use

    def draw_rates(self, draws: int, distribution: str = "posterior") -> Tensor:
        """(S, n) rates in use, from their log-normal guide or from their Gamma distribution."""
        return self._distribution(distribution).sample((draws,))[:, self.used]

    def gates_at(self, rates: Tensor) -> Gates[NestedBernoulli]:
        """Distributions of the gates at given rates in use (..., n)."""
        every = self._distribution("posterior").mean.expand(*rates.shape[:-1], -1)
        return self._gates(every.index_copy(-1, self.used, rates))

    def log_ratio(self, rates: Tensor) -> Tensor:
        """log Gamma density - log density of the guide, of rates in use (S, n) -> (S,)"""
        every = rates.new_ones(len(rates), len(self.names))
        every[:, self.used] = rates
        gap = self._distribution("prior").log_prob(every) - self._distribution("posterior").log_prob(every)
        return gap[:, self.used].sum(-1)

    def sample_prior(self, draws: int) -> Gates[NestedBernoulli]:
        """The gates' distributions at draws of the rates from their Gamma distribution; draws come first."""
        return self._gates(self._distribution("prior").sample((draws,)))

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Posterior mean and central interval (interval.py) of every rate, nats a gate."""
        distribution = self._distribution("posterior")
        low, high = (distribution.icdf(torch.full_like(self.loc, p)) for p in INTERVAL)
        columns = {end: x[self.used].tolist() for end, x in (("", distribution.mean), ("_low", low), ("_high", high))}
        return {f"rate_{name}{end}": x[i] for i, name in enumerate(self.rate_names) for end, x in columns.items()}


_MOST = 1e6  # shape and rate of the Gamma, and one over it the least: digamma and float32 hold there


@register_prior("hierarchical")
def hierarchical(layout: AdapterLayout, *, shape: float = 1.0, rate: float = 1.0) -> Hierarchical:
    """Rates that are random: one for the bit gates of each tensor role, one for the ranks of each projection type.

    Settings: shape and rate of their Gamma hyperprior; its mean shape / rate is in nats a gate.
    Source: the Gamma hyperprior of sparse Bayesian learning (Tipping, 2001) on the rates of Bayesian-LoRA.
    """
    if not all(1 / _MOST <= x <= _MOST for x in (shape, rate)):
        raise ValueError(
            f"prior 'hierarchical': shape and rate of the Gamma must be from {1 / _MOST:g} to {_MOST:g}, got {shape} "
            f"and {rate}"
        )
    return Hierarchical(layout, float(shape), float(rate))
