"""Laws of the gates before the data: functions of the layout, by name.

A prior is a pure function `(layout, **settings) -> Gates(z, g)`: two `NestedBernoulli`s, batch shapes (L, T), (L,).
Rates are in nats a gate: p(open | parent open) = exp(-rate). Register one with `@register_prior`, or name it as
`--prior file.py:function`. A prior that learns, adapts or looks at the data is an `nn.Module` whose call returns the
same, see adaptive.py; the function returns the module. Either site can have a prior of its own: the settings `z` and
`g` name it, `z.NAME` and `g.NAME` are its settings, and `off` opens all its gates for good (32 bit; rank R).

To set against the data: what 2 bits cost in log-likelihood over 4,000 examples was measured as about 126 nats for the
`input` of a projection, 42 for its `base` weight and 2 to 4 for the others, so rates of 0.1 to 100 are a dial.
"""

import math

import torch
from torch import Tensor, nn

from .adaptive import Budget, ExplainedVariance, Hierarchical, Separate
from .gates import Gates, NestedBernoulli
from .layout import AdapterLayout
from .registry import Registry

PRIORS = Registry("prior")
register_prior = PRIORS.register
_OFF = ("fixed", {})  # what the word `off` means


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
def budget(layout: AdapterLayout, *, bops: float = 0.1, denominator: str = "adapted") -> Budget:
    """As `bops`, with the rate adapted in training so that the expected bit operations meet a target.

    Settings: bops, the target as a fraction of the denominator; denominator, `adapted` or `model` (see bops.py).
    """
    return Budget(layout, bops, denominator)


@register_prior("hierarchical")
def hierarchical(layout: AdapterLayout, *, shape: float = 1.0, rate: float = 1.0) -> Hierarchical:
    """Rates that are random: one for the bit gates of each tensor role, one for the ranks of each projection type.

    Settings: shape and rate of their Gamma hyperprior; its mean shape / rate is in nats a gate.
    Source: the Gamma hyperprior of sparse Bayesian learning (Tipping, 2001) on the rates of Bayesian-LoRA.
    """
    if not (shape > 0 and rate > 0):
        raise ValueError(f"prior 'hierarchical': shape and rate of the Gamma must be > 0, got {shape} and {rate}")
    return Hierarchical(layout, float(shape), float(rate))


@register_prior("depth")
def depth(layout: AdapterLayout) -> Gates:
    """Every bit width of a tensor is equally likely, and every rank of an adapter.

    In nats: a gate that is followed by n - 1 more costs log((n + 1) / n). No settings.
    Source: Valipour et al., DyLoRA (2023), which trains under this law of the rank and never updates it.
    """
    z, g = (torch.zeros(*shape[:-1], shape[-1] + 1) for shape in (layout.z_shape, layout.g_shape))
    return Gates(NestedBernoulli.from_depth_logits(z), NestedBernoulli.from_depth_logits(g))


@register_prior("eva")
def eva(layout: AdapterLayout, *, strength: float = 1.0, share: float = 0.5) -> ExplainedVariance:
    """Bit widths equally likely; a rank's log-odds from the variance of the layer's input that it explains.

    Settings: strength, of the log-odds in the logarithm of that share of variance; share, of all ranks, whose
    odds are at least even.
    Source: Paischer et al., EVA (2024), as a prior instead of an initialization.
    """
    if not (strength > 0 and 0 < share <= 1):
        raise ValueError(f"prior 'eva': strength must be > 0 and share in (0, 1], got {strength} and {share}")
    return ExplainedVariance(layout, float(strength), float(share))


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

        self._laws = None

    def forward(self) -> Gates:
        """The same laws at every call, as they keep what they compute, until the buffers are others."""
        log_probs = self.z_log_probs, self.g_log_probs
        if self._laws is None or any(law.log_probs is not x for law, x in zip(self._laws, log_probs, strict=True)):
            self._laws = Gates(*(NestedBernoulli(x, validate_args=False) for x in log_probs))
        return self._laws


def build_prior(name: str, layout: AdapterLayout, settings: dict | None = None) -> nn.Module:
    """The named prior on a layout, as a module that returns Gates when called; settings `z` and `g` replace a site.

    Errors: ValueError for an unknown name or setting, and for a law of the wrong kind or shape.
    """
    built = {owner: _built(*part, layout) for owner, part in parts(name, settings or {}).items()}
    whole = built.get("both")
    return Separate(built.get("z", whole), built.get("g", whole)) if built.keys() - {"both"} else whole


def _built(name: str, settings: dict, layout: AdapterLayout) -> nn.Module:
    function = PRIORS.resolve(name)
    name = getattr(name, "__name__", name)
    result = function(layout, **PRIORS.settings(function, settings))
    prior = result if isinstance(result, nn.Module) else _Constant(checked(name, result, layout))
    if not isinstance(prior(), Gates):
        raise ValueError(f"prior {name!r} must return Gates(z, g) when it is called, got {type(prior()).__name__}")
    checked(name, prior(), layout)
    return prior


def parts(name: str, settings: dict) -> dict[str, tuple[str, dict]]:
    """Name and settings of what is left of the prior of `both` sites, and of a `z` and a `g` of their own.

    Errors: ValueError for an unknown name or setting, and for settings of a prior that has no site left.
    """
    own = {site: str(settings[site]) for site in ("z", "g") if site in settings}
    found = {} if len(own) == 2 else {"both": (name, {})}
    found |= {site: _OFF if chosen == "off" else (chosen, {}) for site, chosen in own.items()}
    for key, value in settings.items():
        site, dot, setting = key.partition(".")
        if key in own:
            continue
        owner, setting = (site, setting) if dot else ("both", key)
        if owner not in found or own.get(owner) == "off":
            remedy = f"name one with --prior.{owner} NAME" if dot else "z and g have priors of their own"
            raise ValueError(f"setting {key!r} belongs to no prior here: {remedy}, or drop --prior.{key}")
        found[owner] = (found[owner][0], {**found[owner][1], setting: value})
    for chosen, given in found.values():
        PRIORS.settings(PRIORS.resolve(chosen), given)
    return found


def checked(name: str, gates: Gates, layout: AdapterLayout) -> Gates:
    """The gates of a prior.  Errors: ValueError for what is no pair of laws in the shapes of the layout."""
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
