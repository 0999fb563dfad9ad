"""Laws of the gates before the data: functions of the layout, by name.

A prior is a pure function `(layout, **settings) -> Gates(z, g)`: two `NestedBernoulli`s, batch shapes (L, T), (L,).
Rates are in nats a gate: p(open | parent open) = exp(-rate). Register one with `@register_prior`, or name it as
`--prior file.py:function`. A prior that learns or adapts is an `nn.Module` whose call returns the same; the function
returns the module.

To set against the data: what 2 bits cost in log-likelihood over 4,000 examples was measured as about 126 nats for the
`input` of a projection, 42 for its `base` weight and 2 to 4 for the others, so rates of 0.1 to 100 are a dial.
"""

import math

import torch
from torch import nn

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


@register_prior("fixed")
def fixed(layout: AdapterLayout, *, bits: int = 32, rank: int | None = None) -> Gates:
    """Every gate pinned: a named bit width for every tensor and a named rank; nothing is random.

    Settings: bits, one of the ladder; rank, 1 to R (default: R). 32 bit at rank R is plain LoRA; b bit is uniform
    quantization-aware LoRA.
    """
    if bits not in layout.ladder:
        raise ValueError(f"prior 'fixed': bits must be one of {', '.join(map(str, layout.ladder))}, got {bits}")
    rank = layout.rank if rank is None else rank
    if not 1 <= rank <= layout.rank:
        raise ValueError(f"prior 'fixed': rank must be from 1 to the adapter's rank {layout.rank}, got {rank}")
    z = _pinned(layout.z_shape, layout.ladder.index(bits))
    g = _pinned(layout.g_shape, rank - 1)
    return Gates(z, g)


def _pinned(shape: tuple[int, ...], depth: int) -> NestedBernoulli:
    gate = torch.arange(shape[-1])
    return NestedBernoulli(torch.where(gate < depth, 0.0, -torch.inf).expand(shape).contiguous())


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
