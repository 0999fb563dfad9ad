"""Laws of the gates before the data: functions of the layout, by name.

A prior is a pure function `(layout, **settings) -> Gates(z, g)`: two `NestedBernoulli`s, batch shapes (L, T), (L,).
Rates are in nats a gate: p(open | parent open) = exp(-rate). Register one with `@register_prior`, or name it as
`--prior file.py:function`. A prior that learns or adapts is an `nn.Module` whose call returns the same; the function
returns the module. It may have `adapt(means)`, called after every step with the marginals of the guide's M components,
z (M, L, T, K) and g (M, L, R - 1); if its own settings are random, `sample()`, at a draw from their posterior, its
`divergence()`, and `sample_prior(S)`, at S draws before any data; and `report()`, numbers for log and summary.

To set against the data: what 2 bits cost in log-likelihood over 4,000 examples was measured as about 126 nats for the
`input` of a projection, 42 for its `base` weight and 2 to 4 for the others, so rates of 0.1 to 100 are a dial.
"""

import math

import torch
from torch import Tensor, nn

from .bops import expected_bops
from .gates import Gates, NestedBernoulli
from .layout import AdapterLayout
from .registry import Registry

PRIORS = Registry("prior")
register_prior = PRIORS.register


@register_prior("nested")
def nested(layout: AdapterLayout, *, rate: float = 1.0, rank_rate: float | None = None) -> Gates:
    """The same rate at every rung and every rank.

    Settings: rate, nats a bit gate; rank_rate, nats a rank gate (default: rate / 10, as a rank is a tenth of a rung).
    Source: Bayesian-LoRA, equations 7 and 8 and its rank prior.
    """
    z = torch.full(layout.z_shape, _rate("rate", rate))
    g = torch.full(layout.g_shape, _rate("rank_rate", rate / 10 if rank_rate is None else rank_rate))
    return Gates(NestedBernoulli.from_rate(z), NestedBernoulli.from_rate(g))


@register_prior("bops")
def bops(layout: AdapterLayout, *, rate: float = 0.2, rank_rate: float | None = None) -> Gates:
    """A gate's rate is proportional to the bit operations that opening it adds.

    Settings: rate, nats for one more bit of the tensor that the most MACs pass through, its partner at 32 bit;
    rank_rate, the same unit for ranks (default: rate). So the rungs of that tensor cost 2, 4, 8 and 16 times `rate`,
    and a rank of an adapter 32 * rate * (its MACs / the most MACs).
    Source: van Baalen et al., Bayesian Bits (2020), section 2.3: rate' = b * MACs(l) / max MACs.
    """
    rate, rank_rate = _rate("rate", rate), _rate("rank_rate", rate if rank_rate is None else rank_rate)
    largest = layout.tensor_macs.max()
    added_bits = torch.tensor(layout.ladder, dtype=torch.float64).diff()  # (K,)
    z = rate * layout.tensor_macs[..., None] / largest * added_bits  # (L, T, K)
    g = rank_rate * layout.ladder[-1] * layout.rank_macs.sum(-1, keepdim=True) / largest  # (L, 1)
    g = g.expand(layout.g_shape)
    return Gates(NestedBernoulli.from_rate(z.float()), NestedBernoulli.from_rate(g.float()))


@register_prior("budget")
def budget(layout: AdapterLayout, *, bops: float = 0.1, denominator: str = "adapted") -> "Budget":
    """As `bops`, with the rate adapted in training so that the expected bit operations meet a target.

    Settings: bops, the target as a fraction of the denominator; denominator, `adapted` or `model` (see bops.py).
    """
    return Budget(layout, bops, denominator)


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
        closed, opened = (
            self._ratio(*(torch.full(s, v) for s in (layout.z_shape, layout.g_shape))) for v in (0.0, 1.0)
        )
        if not closed < target < opened:
            raise ValueError(
                f"prior {name!r}: bops must be between {closed:.3g} (every gate closed) and {opened:.3g} (open) of "
                f"denominator {denominator!r} in scope {layout.scope!r}, got {target:g}; in scope `encoder` "
                "more gates save bit operations"
            )
        self.register_buffer("asinh_rate", torch.tensor(math.asinh(1e3)))
        self.register_buffer("z_price", torch.zeros(layout.z_shape))  # (L, T, K), ratio of BOPs a gate
        self.register_buffer("g_price", torch.zeros(layout.g_shape))  # (L, R - 1)
        self._follow(Gates(torch.ones(layout.z_shape), torch.ones(layout.g_shape)))

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


@register_prior("hierarchical")
def hierarchical(layout: AdapterLayout, *, shape: float = 1.0, rate: float = 1.0) -> "Hierarchical":
    """Rates that are random: one for the bit gates of each tensor role, one for the ranks of each projection type.

    Settings: shape and rate of their Gamma hyperprior; its mean shape / rate is in nats a gate.
    Source: the Gamma hyperprior of sparse Bayesian learning (Tipping, 2001) on the rates of Bayesian-LoRA.
    """
    if not (shape > 0 and rate > 0):
        raise ValueError(f"prior 'hierarchical': shape and rate of the Gamma must be > 0, got {shape} and {rate}")
    return Hierarchical(layout, float(shape), float(rate))


class Hierarchical(nn.Module):
    """Nested gates whose rates have a Gamma law and a log-normal guide, learned with everything else."""

    def __init__(self, layout: AdapterLayout, shape: float, rate: float):
        super().__init__()
        self.shape, self.rate, self.z_shape, self.g_shape = shape, rate, layout.z_shape, layout.g_shape
        kinds = list(dict.fromkeys(p.type for p in layout.projections))
        self.names = [*layout.tensors, *(f"rank_{kind}" for kind in kinds)]
        self.register_buffer("kind", torch.tensor([kinds.index(p.type) for p in layout.projections]), persistent=False)
        self.loc = nn.Parameter(torch.full((len(self.names),), math.log(shape / rate)))  # of log(rate)
        self.log_sd = nn.Parameter(torch.full((len(self.names),), -1.0))

    def _gates(self, rates: Tensor) -> Gates:
        """rates (..., tensors + types) -> laws of z (..., L, T, K) and g (..., L, R - 1)."""
        T, lead = self.z_shape[1], rates.shape[:-1]
        z, g = rates[..., None, :T, None].expand(*lead, *self.z_shape), rates[..., T:][..., self.kind, None]
        return Gates(*(NestedBernoulli(-x, validate_args=False) for x in (z, g.expand(*lead, *self.g_shape))))

    def forward(self) -> Gates:
        """At the rates' posterior means."""
        return self._gates((self.loc + self.log_sd.exp().square() / 2).exp())

    def sample(self) -> Gates:
        """At one reparametrised draw of the rates from their posterior."""
        return self._gates((self.loc + self.log_sd.exp() * torch.randn_like(self.loc)).exp())

    def sample_prior(self, draws: int) -> Gates:
        """At as many draws of the rates from their Gamma law, before any data: laws with the draws first."""
        law = torch.distributions.Gamma(*(torch.full_like(self.loc, x) for x in (self.shape, self.rate)))
        return self._gates(law.sample((draws,)))

    def divergence(self) -> Tensor:
        """KL of the rates' log-normal guide from their Gamma law, nats, closed form."""
        sd = self.log_sd.exp()
        entropy = self.loc + 0.5 + 0.5 * math.log(2 * math.pi) + self.log_sd
        mean = (self.loc + sd.square() / 2).exp()
        gamma = self.shape * math.log(self.rate) - math.lgamma(self.shape)
        return (-entropy - gamma - (self.shape - 1) * self.loc + self.rate * mean).sum()

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Posterior mean and central 94 % interval of every rate, nats a gate."""
        law = torch.distributions.LogNormal(self.loc, self.log_sd.exp())
        low, high = (law.icdf(torch.full_like(self.loc, p)) for p in (0.03, 0.97))
        columns = {"": law.mean, "_low": low, "_high": high}
        return {f"rate_{n}{end}": x[i].item() for i, n in enumerate(self.names) for end, x in columns.items()}


@register_prior("fixed")
def fixed(
    layout: AdapterLayout, *, bits: int = 32, activation_bits: int | None = None, rank: int | None = None
) -> Gates:
    """Every gate pinned: named bit widths and a named rank; nothing is random.

    Settings: bits, of the weights (`base`, `lora_A`, `lora_B`), one of the ladder; activation_bits, of `input` and
    `hidden` (default: bits); rank, 1 to R (default: R). 32 bit at rank R is plain LoRA; others are uniform
    quantization-aware LoRA.
    """
    activation_bits = bits if activation_bits is None else activation_bits
    for name, width in (("bits", bits), ("activation_bits", activation_bits)):
        if width not in layout.ladder:
            raise ValueError(f"prior 'fixed': {name} must be one of {', '.join(map(str, layout.ladder))}, got {width}")
    rank = layout.rank if rank is None else rank
    if not 1 <= rank <= layout.rank:
        raise ValueError(f"prior 'fixed': rank must be from 1 to the adapter's rank {layout.rank}, got {rank}")
    widths = [activation_bits if tensor in ("input", "hidden") else bits for tensor in layout.tensors]
    depths = torch.tensor([layout.ladder.index(width) for width in widths]).expand(layout.z_shape[:2])
    return Gates(
        _pinned(depths, layout.z_shape[-1]), _pinned(torch.full(layout.g_shape[:1], rank - 1), layout.rank - 1)
    )


@register_prior("random")
def random(layout: AdapterLayout, *, bops: float = 0.1, denominator: str = "adapted", seed: int = 0) -> Gates:
    """Every gate pinned at random, with the bit operations of a target, to see what an allocation is worth.

    Rungs of tensors drawn at random are closed, one at a time, until the target is met; all ranks are open.
    Settings: bops and denominator as in `budget`; seed, of the allocation.
    """
    steer = Budget(layout, bops, denominator, "random")  # checks the target
    least = steer._ratio(torch.zeros(layout.z_shape), torch.ones(layout.g_shape))
    if bops < least:
        raise ValueError(f"prior 'random': bops must be at least {least:.3g} (2 bit, every rank open), got {bops:g}")
    generator = torch.Generator().manual_seed(seed)
    ladder, ranks = layout.z_shape[-1], torch.ones(layout.g_shape)
    depths = torch.where(layout.z_mask, ladder, 0)
    gate = torch.arange(ladder)
    while steer._ratio((gate < depths[..., None]).double(), ranks) > bops:
        closing = torch.multinomial((depths > 0).double().flatten(), 1, generator=generator)
        depths.view(-1)[closing] -= 1
    return Gates(_pinned(depths, ladder), _pinned(torch.full(layout.g_shape[:1], layout.rank - 1), layout.rank - 1))


def _pinned(depths: Tensor, gates: int) -> NestedBernoulli:
    """Chains of `gates` gates at known depths.  depths (...) -> batch shape (...)"""
    return NestedBernoulli(torch.where(torch.arange(gates) < depths[..., None], 0.0, -torch.inf))


def _rate(name: str, rate: float) -> float:
    if not (rate >= 0 and math.isfinite(rate)):
        raise ValueError(f"{name} must be a finite number >= 0 (nats; p(open) = exp(-{name})), got {rate}")
    return float(rate)


class _Constant(nn.Module):
    """A prior without parameters, as a module, so that it moves between devices with its program."""

    def __init__(self, gates: Gates):
        super().__init__()
        self.register_buffer("z_log_probs", gates.z.log_probs, persistent=False)
        self.register_buffer("g_log_probs", gates.g.log_probs, persistent=False)

    def forward(self) -> Gates:
        z, g = self.z_log_probs, self.g_log_probs
        return Gates(NestedBernoulli(z, validate_args=False), NestedBernoulli(g, validate_args=False))


def build_prior(name: str, layout: AdapterLayout, settings: dict | None = None) -> nn.Module:
    """The named prior on a layout, as a module that returns Gates when called.

    Errors: ValueError for an unknown name or setting, and for a law of the wrong kind or shape.
    """
    function = PRIORS.resolve(name)
    result = function(layout, **PRIORS.settings(function, settings or {}))
    prior = result if isinstance(result, nn.Module) else _Constant(_checked(name, result, layout))
    _checked(name, prior(), layout)
    return prior


def _checked(name: str, gates: Gates, layout: AdapterLayout) -> Gates:
    if not (isinstance(gates, tuple) and len(gates) == 2):
        raise ValueError(f"prior {name!r} must return Gates(z, g), got {type(gates).__name__}")
    gates = Gates(*gates)
    for site, shape in (("z", layout.z_shape), ("g", layout.g_shape)):
        law = getattr(gates, site)
        if not isinstance(law, NestedBernoulli):
            raise ValueError(f"prior {name!r}: {site} must be a NestedBernoulli, got {type(law).__name__}")
        if tuple(law.log_probs.shape) != shape:
            raise ValueError(f"prior {name!r}: {site} has shape {tuple(law.log_probs.shape)}, expected {shape}")
        if not bool((law.log_probs <= 0).all()):
            raise ValueError(f"prior {name!r}: the log-probabilities of {site} must be <= 0 and not nan")
    return gates
