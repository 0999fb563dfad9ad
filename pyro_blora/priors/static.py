"""Priors that are a table: the same rate everywhere, rates by bit operations, equal depths, pinned gates.

To set against the data: what 2 bits cost in log-likelihood over 4,000 examples was measured as about 126 nats for the
`input` of a projection, 42 for its `base` weight and 2 to 4 for the others, so rates of 0.1 to 100 are a dial.
"""

import math

import torch
from torch import Tensor

from ..gates import Gates, NestedBernoulli
from ..layout import ACTIVATIONS, AdapterLayout
from ..registries import register_prior
from .budget import Budget


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


@register_prior("depth")
def depth(layout: AdapterLayout) -> Gates:
    """Every bit width of a tensor is equally likely, and every rank of an adapter.

    In nats: a gate that is followed by n - 1 more costs log((n + 1) / n). No settings.
    Source: Valipour et al., DyLoRA (2023), which trains under this distribution of the rank and never updates it.
    """
    z, g = (torch.zeros(*shape[:-1], shape[-1] + 1) for shape in (layout.z_shape, layout.g_shape))
    return Gates(NestedBernoulli.from_depth_logits(z), NestedBernoulli.from_depth_logits(g))


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
    widths = [activation_bits if tensor in ACTIVATIONS else bits for tensor in layout.tensors]
    depths = torch.tensor([layout.ladder.index(width) for width in widths]).expand(layout.z_shape[:2])
    return Gates(pinned(depths, layout.z_shape[-1]), pinned(torch.full(layout.g_shape[:1], rank - 1), layout.rank - 1))


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
    return Gates(pinned(depths, ladder), pinned(torch.full(layout.g_shape[:1], layout.rank - 1), layout.rank - 1))


def pinned(depths: Tensor, gates: int) -> NestedBernoulli:
    """Ladders of `gates` gates with known depths.  depths (...) -> batch shape (...)"""
    return NestedBernoulli(torch.where(torch.arange(gates) < depths[..., None], 0.0, -torch.inf))


def _rate(name: str, rate: float) -> float:
    if not (rate >= 0 and math.isfinite(rate)):
        raise ValueError(f"{name} must be a finite number >= 0 (nats; p(open) = exp(-{name})), got {rate}")
    return float(rate)
