"""Priors that are more than a table: they steer, learn or look at the data. Registered by name in priors.py.

Each is an `nn.Module` whose call returns Gates. What else it may have, all optional:

    adapt(means)      called after every step with the marginals of M components, z (M, L, T, K) and g (M, L, R - 1)
    explain(ratios)   called when the gates start, with the explained variances of the layers' inputs (L, R), spectra.py
    sample()          if its own settings are random: the laws at a draw from their posterior, reparametrised
    divergence()      ... and the KL of that posterior from their law, nats
    sample_prior(S)   ... and the laws at S draws before any data
    report()          numbers for log and summary
    only(site)        called where it is the law of `z` or `g` alone: what it says of the other counts for nothing
"""

import math

import torch
from torch import Tensor, nn

from .bops import expected_bops
from .gates import Gates, NestedBernoulli
from .layout import AdapterLayout

HOOKS = ("adapt", "explain", "sample", "divergence", "sample_prior", "report")


class Budget(nn.Module):
    """p(z, g) proportional to exp(-rate * BOPs(z, g)), each chain's law taken at the others' expected bits and ranks.

    BOPs are linear in each chain's gates, so the price of a gate is the derivative of E[BOPs] with respect to its
    marginal, and the gradient of the KL is that of rate * E[BOPs] - entropy. `adapt` follows prices and moves
    asinh(rate) by log(E[BOPs] / target) times a gain, but not further than Newton's step at these prices: dual ascent
    that does not swing when few bits are undecided. Rate: nats for the whole of the denominator's BOPs; below 0 where
    the data use less than the target, which is met all the same.
    """

    GAIN = 0.3  # and the largest step of asinh(rate), which is that of log(rate) for all but small rates
    LARGEST = 20.0  # asinh of 2e8 nats: where a guide does not follow, the way back stays short
    FOLLOW = 0.2  # of the way to new prices: all the way, an input and its weight would turn dear and cheap in step

    def __init__(self, layout: AdapterLayout, target: float, denominator: str, name: str = "budget"):
        super().__init__()
        if denominator not in ("adapted", "model"):
            raise ValueError(f"prior {name!r}: denominator must be 'adapted' or 'model', got {denominator!r}")
        self.layout, self.target, self.field = layout, target, f"{denominator}_ratio"
        self.name, self.denominator = name, denominator
        self.require_reach(*(Gates(*(torch.full(s, v) for s in (layout.z_shape, layout.g_shape))) for v in (0.0, 1.0)))
        self.register_buffer("asinh_rate", torch.tensor(math.asinh(1e3)))
        self.register_buffer("z_price", torch.zeros(layout.z_shape))  # (L, T, K), ratio of BOPs a gate
        self.register_buffer("g_price", torch.zeros(layout.g_shape))  # (L, R - 1)
        self._follow(Gates(torch.ones(layout.z_shape), torch.ones(layout.g_shape)))

    def require_reach(self, closed: Gates, opened: Gates) -> None:
        """Refuse a target that is not between the least and the most that the gates can spend."""
        least, most = self._ratio(*closed), self._ratio(*opened)
        if not least < self.target < most:
            raise ValueError(
                f"prior {self.name!r}: bops must be between {least:.3g} (every gate closed) and {most:.3g} (open) of "
                f"denominator {self.denominator!r} in scope {self.layout.scope!r}, got {self.target:g}; in scope "
                "`encoder` more gates save bit operations"
            )

    def _ratio(self, z: Tensor, g: Tensor) -> Tensor:
        return getattr(expected_bops(self.layout, z, g), self.field)

    def _follow(self, means: Gates, share: float = 1.0) -> Tensor:
        """Move the prices a share of the way to those at these marginals; returns the expected ratio there."""
        means = [mean.detach().double().requires_grad_() for mean in means]
        with torch.enable_grad():
            ratio = self._ratio(*means).mean()
            prices = torch.autograd.grad(ratio, means)
        for buffer, price in zip((self.z_price, self.g_price), prices, strict=True):
            buffer.lerp_(price.sum_to_size(buffer.shape).to(buffer), share)
        return ratio.detach()

    def _variance(self, means: Gates) -> Tensor:
        """Of the ratio at these prices, chains independent given the component: minus its slope, by the Gibbs form."""
        total = 0.0
        for price, mean in zip((self.z_price, self.g_price), means, strict=True):
            cost = nn.functional.pad(price.double().cumsum(-1), (1, 0))  # of each depth
            law = -nn.functional.pad(mean.double(), (1, 1)).diff(dim=-1)
            law[..., 0] += 1
            spread = (law * (cost - (law * cost).sum(-1, keepdim=True)).square()).sum(-1)
            total = total + spread.reshape(-1, *price.shape[:-1]).mean(0).sum()
        return total

    @torch.no_grad()
    def adapt(self, means: Gates) -> None:
        """One step towards the target, at the marginals of M components.  z (M, L, T, K), g (M, L, R - 1)."""
        ratio = self._follow(means, self.FOLLOW)
        slope = self.asinh_rate.cosh() * self._variance(means) / ratio  # -d log E[BOPs] / d asinh(rate)
        step = (ratio / self.target).log() / slope.clamp(min=1 / self.GAIN)
        step = step.clamp(-self.GAIN, self.GAIN).to(self.asinh_rate)
        self.asinh_rate.add_(step).clamp_(-self.LARGEST, self.LARGEST)

    def forward(self) -> Gates:
        costs = (self.asinh_rate.sinh() * price for price in (self.z_price, self.g_price))
        depths = (-nn.functional.pad(cost.cumsum(-1), (1, 0)) for cost in costs)
        return Gates(*(NestedBernoulli.from_depth_logits(x, validate_args=False) for x in depths))

    def report(self) -> dict[str, float]:
        return {"rate": self.asinh_rate.sinh().item()}


class Hierarchical(nn.Module):
    """Nested gates whose rates have a Gamma law and a log-normal guide, learned with everything else."""

    def __init__(self, layout: AdapterLayout, shape: float, rate: float):
        super().__init__()
        self.shape, self.rate, self.z_shape, self.g_shape = shape, rate, layout.z_shape, layout.g_shape
        kinds = list(dict.fromkeys(p.type for p in layout.projections))
        self.names = [*layout.tensors, *(f"rank_{kind}" for kind in kinds)]
        self.register_buffer("kind", torch.tensor([kinds.index(p.type) for p in layout.projections]), persistent=False)
        self.used = slice(0, len(self.names))
        self.loc = nn.Parameter(torch.full((len(self.names),), math.log(shape / rate)))  # of log(rate)
        self.log_sd = nn.Parameter(torch.full((len(self.names),), -1.0))

    def only(self, site: str) -> None:
        tensors = self.z_shape[1]
        self.used = slice(0, tensors) if site == "z" else slice(tensors, len(self.names))

    def _gates(self, rates: Tensor) -> Gates:
        """rates (..., tensors + types) -> laws of z (..., L, T, K) and g (..., L, R - 1)."""
        T, lead = self.z_shape[1], rates.shape[:-1]
        z, g = rates[..., None, :T, None].expand(*lead, *self.z_shape), rates[..., T:][..., self.kind, None]
        return Gates(*(NestedBernoulli(-x, validate_args=False) for x in (z, g.expand(*lead, *self.g_shape))))

    def _law(self, name: str) -> torch.distributions.Distribution:
        """Of all rates (n,), used or not: their guide (`posterior`), or their Gamma law (`prior`)."""
        if name == "posterior":
            return torch.distributions.LogNormal(self.loc, self.log_sd.exp(), validate_args=False)
        settings = (torch.full_like(self.loc, x) for x in (self.shape, self.rate))
        return torch.distributions.Gamma(*settings, validate_args=False)

    def forward(self) -> Gates:
        """At the rates' posterior means."""
        return self._gates(self._law("posterior").mean)

    def sample(self) -> Gates:
        """At one reparametrised draw of the rates from their posterior."""
        return self._gates((self.loc + self.log_sd.exp() * torch.randn_like(self.loc)).exp())

    @property
    def rate_names(self) -> list[str]:
        return self.names[self.used]

    def draw_rates(self, draws: int, law: str = "posterior") -> Tensor:
        """(S, n) rates in use, from their log-normal guide or from their Gamma law."""
        return self._law(law).sample((draws,))[:, self.used]

    def gates_at(self, rates: Tensor) -> Gates:
        """Laws of the gates at given rates in use (S, n)."""
        every = self._law("posterior").mean.expand(len(rates), -1).clone()
        every[:, self.used] = rates
        return self._gates(every)

    def log_ratio(self, rates: Tensor) -> Tensor:
        """log Gamma law - log guide of rates in use (S, n) -> (S,)"""
        every = rates.new_ones(len(rates), len(self.names))
        every[:, self.used] = rates
        gap = self._law("prior").log_prob(every) - self._law("posterior").log_prob(every)
        return gap[:, self.used].sum(-1)

    def sample_prior(self, draws: int) -> Gates:
        """At as many draws of the rates from their Gamma law, before any data: laws with the draws first."""
        return self._gates(self._law("prior").sample((draws,)))

    def divergence(self) -> Tensor:
        """KL of the rates' log-normal guide from their Gamma law, nats, closed form."""
        sd = self.log_sd.exp()
        entropy = self.loc + 0.5 + 0.5 * math.log(2 * math.pi) + self.log_sd
        mean = (self.loc + sd.square() / 2).exp()
        gamma = self.shape * math.log(self.rate) - math.lgamma(self.shape)
        return (-entropy - gamma - (self.shape - 1) * self.loc + self.rate * mean)[self.used].sum()

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Posterior mean and central 94 % interval of every rate, nats a gate."""
        law = self._law("posterior")
        low, high = (law.icdf(torch.full_like(self.loc, p)) for p in (0.03, 0.97))
        columns = {end: x[self.used].tolist() for end, x in (("", law.mean), ("_low", low), ("_high", high))}
        return {f"rate_{name}{end}": x[i] for i, name in enumerate(self.rate_names) for end, x in columns.items()}


class ExplainedVariance(nn.Module):
    """Depths of bits are equally likely; a rank's log-odds say how much of its layer's input it explains.

    log-odds of rank r = strength * log(ratio_r / cut), with ratio_r the share of the input's variance along its r-th
    principal component, and the cut the smallest that EVA would keep if it kept `share` of all ranks. Ranks are even
    until the gates start and the data are seen.
    """

    def __init__(self, layout: AdapterLayout, strength: float, share: float):
        super().__init__()
        self.strength, self.share, self.silent = strength, share, False
        self.register_buffer("z_depths", torch.zeros(*layout.z_shape[:2], layout.z_shape[-1] + 1), persistent=False)
        self.register_buffer("adapted", layout.g_mask.clone(), persistent=False)
        self.register_buffer("log_odds", torch.zeros(layout.g_shape))  # (L, R - 1)

    def only(self, site: str) -> None:
        self.silent = site == "z"

    @torch.no_grad()
    def explain(self, ratios: Tensor) -> None:
        """Set the log-odds.  ratios (L, R): share of the variance along each of R principal components, falling."""
        log_ratios = ratios.to(self.log_odds).clamp(min=torch.finfo(self.log_odds.dtype).tiny).log()
        cut = log_ratios[self.adapted].quantile(1 - self.share)
        self.log_odds.copy_(self.strength * (log_ratios[:, 1:] - cut))

    def forward(self) -> Gates:
        z = NestedBernoulli.from_depth_logits(self.z_depths, validate_args=False)
        return Gates(z, NestedBernoulli(nn.functional.logsigmoid(self.log_odds), validate_args=False))

    def report(self) -> dict[str, float]:
        """Ranks that the prior alone expects, averaged over the adapters."""
        expected = 1 + self.log_odds.sigmoid().cumprod(-1).sum(-1)
        return {} if self.silent else {"prior_rank": expected[self.adapted].mean().item()}


class Separate(nn.Module):
    """The z of one prior and the g of another; what only one of them can do is done by it alone."""

    def __init__(self, z: nn.Module, g: nn.Module):
        super().__init__()
        if isinstance(z, Budget) and isinstance(g, Budget):
            raise ValueError("z and g cannot both have prior 'budget', whose targets are of the same bit operations")
        self.z, self.g = z, g
        for site, part in (("z", z), ("g", g)):
            if hasattr(part, "only"):
                part.only(site)
            if isinstance(part, Budget):  # as far as this site's gates reach, with the other's as they are
                means = Gates(*(law.mean for law in self()))
                ends = (means._replace(**{site: torch.full_like(getattr(means, site), v)}) for v in (0.0, 1.0))
                part.require_reach(*ends)

    def forward(self) -> Gates:
        return Gates(self.z().z, self.g().g)

    def __getattr__(self, name: str):
        if name in HOOKS and any(hasattr(part, name) for part in (self.z, self.g)):
            return getattr(type(self), f"_{name}").__get__(self)
        return super().__getattr__(name)

    def _each(self, name: str) -> dict[str, nn.Module]:
        return {site: part for site, part in (("z", self.z), ("g", self.g)) if hasattr(part, name)}

    def _adapt(self, means: Gates) -> None:
        for part in self._each("adapt").values():
            part.adapt(means)

    def _explain(self, ratios: Tensor) -> None:
        for part in self._each("explain").values():
            part.explain(ratios)

    def _sample(self) -> Gates:
        z, g = (part.sample() if hasattr(part, "sample") else part() for part in (self.z, self.g))
        return Gates(z.z, g.g)

    def _sample_prior(self, draws: int) -> Gates:
        laws = []
        for site, part in (("z", self.z), ("g", self.g)):
            if hasattr(part, "sample_prior"):
                laws.append(getattr(part.sample_prior(draws), site))
            else:
                law = getattr(part(), site)
                laws.append(law.expand((draws, *law.batch_shape)))
        return Gates(*laws)

    def _divergence(self) -> Tensor:
        return sum(part.divergence() for part in self._each("divergence").values())

    def _report(self) -> dict[str, float]:
        parts = self._each("report").items()
        return {f"{site}_{name}": value for site, part in parts for name, value in part.report().items()}
