"""What a guide is: the variational family of the gates, made from layout and prior by a function with a name.

The function takes `(layout, prior, **settings)`, where the prior is a module whose call returns its Gates, and returns
a `Guide`. Register it with `@register_guide("name")`, or name it as `--guide file.py:function`.

The families here hold *evidence*: q(depth d) = softmax over d of log prior(d) + e_1 + ... + e_d, as the posterior is
prior times likelihood. What the data say is learned in nats, whatever the optimizer makes of gradients; what the prior
says enters exactly, so that a prior that moves (a budget, a learned rate) moves the gates in the same step.
Gates that the prior pins (probability 0 or 1) are held there: the posterior cannot differ.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..gates import Gates, NestedBernoulli, RelaxedNestedBernoulli, pinned_logits
from ..ladder_math import log_at_least
from ..layout import AdapterLayout
from ..registries import GUIDES
from ..registry import adopted


class Guide(nn.Module):
    """The variational family of the gates.

    Must have: `laws` and `posterior`. May have: everything else, whose defaults stand here. A plain nn.Module with
    these methods serves as well.

    Shapes: L projections, T tensors, K gates of a ladder, R ranks, M components; z (L, T, K), g (L, R - 1).
    Units: KLs and evidence in nats.
    """

    serves_every_rank = False
    """Whether, after training, the same rank everywhere is evaluated, from 1 to R."""
    starts_from_data = False
    """Whether `start` is called when the gates start."""
    target_rank = 0
    """Of a guide that is allocated: the average that the allocator is to end at."""

    def laws(self, temperature: float, hard: bool) -> Gates:
        """What is sampled in training: reparametrized distributions of batch shapes (L, T) and (L,).

        They need a KL against NestedBernoulli, registered with torch.distributions.register_kl. hard: draws are
        ladders of 0 and 1. temperature > 0: of the relaxation, which falls in training; a number or a tensor ().
        """
        raise NotImplementedError

    def posterior(self) -> Gates:
        """The exact marginal distributions of the ladders, two NestedBernoulli: what is reported and deployed."""
        raise NotImplementedError

    # --- a family that is not mean field ------------------------------------------------------------------------------

    def components(self) -> Gates:
        """Equally likely discrete components, given which ladders are independent: z (M, L, T, K), g (M, L, R - 1)."""
        return Gates(*(NestedBernoulli(law.log_probs[None], validate_args=False) for law in self.posterior()))

    def each_law(self, temperature: float, hard: bool) -> list[Gates]:
        """What training draws from, each in a forward of its own: of every component its distribution.

        One alone would be M times noisier than a mean field.
        """
        return [self.laws(temperature, hard)]

    def divergence(self, prior: Gates, z_mask: Tensor, g_mask: Tensor) -> Gates:
        """KLs of all z and of all g that exist, (), where their sum is none over ladders."""
        raise NotImplementedError

    @property
    def has_divergence(self) -> bool:
        """Whether `divergence` is asked; else the KLs of `laws` are summed over the ladders."""
        return type(self).divergence is not Guide.divergence

    def deployed(self) -> Gates | None:
        """The allocation to export, z and g of 0 and 1; None: where marginals exceed 1/2."""
        return None

    # --- training -----------------------------------------------------------------------------------------------------

    def computed_once(self) -> contextlib.AbstractContextManager[None]:
        """A block of one evaluation of the ELBO, in which the parameters and the prior stay as they are."""
        return contextlib.nullcontext()

    def start(self, evidence: Gates) -> None:
        """Set the distributions from an estimate of each depth's log-likelihood, up to a constant, nats.

        evidence: z (L, T, K + 1), g (L, R).
        """

    def allocate(self, ranks: Tensor) -> None:
        """Take the ranks that the adapter's own allocator has left.  (L,)"""
        raise NotImplementedError

    @property
    def is_allocated(self) -> bool:
        return type(self).allocate is not Guide.allocate


_OPEN = 6.0  # log-odds of a gate that waits for the data: q(1 - q) = 0.0025, enough gradient to come back
_IMPOSSIBLE = -1e30  # in place of log 0 where a prior pins a gate, so that sums and gradients stay finite
_SURE = 1e4  # nats, in place of infinite evidence


def conditional_logits(depth_logits: Tensor) -> Tensor:
    """Log-odds of opening each gate given its parent, from unnormalised log P(depth).  (..., K + 1) -> (..., K)"""
    return log_at_least(depth_logits)[..., 1:] - depth_logits[..., :-1]


class Evidence(Guide):
    """Nats that the data add to each step of a chain's depth, for each component; the prior's pins laid over them."""

    _shared: Gates | None = None

    def __init__(self, layout: AdapterLayout, prior: nn.Module, open_logit: float | None, components: int = 1):
        super().__init__()
        self.prior = prior
        laws = prior()
        self.z_evidence = nn.Parameter(torch.zeros(components, *layout.z_shape))  # (M, L, T, K)
        self.g_evidence = nn.Parameter(torch.zeros(components, *layout.g_shape))  # (M, L, R - 1)
        for name, law, mask in (("z_pins", laws.z, layout.z_mask), ("g_pins", laws.g, layout.g_mask)):
            pins = torch.where(mask[..., None], pinned_logits(law.log_probs.detach()), torch.inf)  # or does not exist
            self.register_buffer(name, pins, persistent=False)
        self.free = Gates(bool(self.z_pins.isnan().any()), bool(self.g_pins.isnan().any()))  # is anything random?
        self.starts_from_data = any(self.free) and open_logit is None
        self._open(laws, _OPEN if open_logit is None else float(open_logit))

    @torch.no_grad()
    def _open(self, prior: Gates, logit: float) -> None:
        """Every gate at log-odds `logit`, whatever the prior."""
        for parameter, law in zip((self.z_evidence, self.g_evidence), prior, strict=True):
            odds = torch.full_like(law.log_probs, logit)
            wanted = RelaxedNestedBernoulli(odds, 1.0, validate_args=False).discrete.depth_log_probs
            parameter.copy_((wanted - law.depth_log_probs).diff(dim=-1).nan_to_num(0.0, 0.0, 0.0))

    @contextlib.contextmanager
    def computed_once(self) -> Iterator[None]:
        """A block in which the parameters, and the prior, stay as they are: sampling and KL share the log-odds."""
        self._shared = Evidence.logits(self)  # a family that changes them does so to each copy, once
        try:
            yield
        finally:
            self._shared = None

    def logits(self) -> Gates:
        """Conditional log-odds of every component.  z (M, L, T, K), g (M, L, R - 1)"""
        if self._shared is not None:
            return self._shared
        return Gates(*map(self._site_logits, self.prior(), (self.z_evidence, self.g_evidence), self.free,
                          (self.z_pins, self.g_pins)))  # fmt: skip

    @staticmethod
    def _site_logits(prior: NestedBernoulli, evidence: Tensor, free: bool, pins: Tensor) -> Tensor:
        pinned = pins.expand(evidence.shape)
        if not free:
            return pinned
        said = nn.functional.pad(evidence.cumsum(-1), (1, 0))
        logits = conditional_logits(prior.depth_log_probs.clamp(min=_IMPOSSIBLE) + said)
        return torch.where(pinned.isnan(), logits, pinned)

    @torch.no_grad()
    def start(self, evidence: Gates) -> None:
        """Set the evidence to that of each depth, up to a constant.  z (L, T, K + 1), g (L, R), nats."""
        for parameter, said in zip((self.z_evidence, self.g_evidence), evidence, strict=True):
            parameter.copy_(said.diff(dim=-1).nan_to_num(0.0, _SURE, -_SURE))

    def components(self) -> Gates:
        return Gates(*(RelaxedNestedBernoulli(x, 1.0, validate_args=False).discrete for x in self.logits()))


def build_guide(name: str | Callable, layout: AdapterLayout, prior: nn.Module, settings: dict | None = None) -> Guide:
    """The guide of a name, or of a function, on a layout and a prior.

    Errors: ValueError for an unknown name, setting or a wrong kind.
    """
    function = GUIDES.resolve(name)
    guide = function(layout, prior, **GUIDES.settings(function, settings or {}))
    if isinstance(guide, nn.Module):
        guide = adopted(guide, Guide)
    missing = [must.__name__ for must in (Guide.laws, Guide.posterior)
               if getattr(type(guide), must.__name__, must) is must]  # fmt: skip
    if missing:
        raise ValueError(
            f"guide {GUIDES.called(name)!r} must return an nn.Module with laws() and posterior(); missing: {missing}"
        )
    return guide


def components(guide: Guide) -> Gates:
    """The discrete distribution as equally likely components, z (M, L, T, K), g (M, L, R - 1); one if mean field."""
    return guide.components()


def draw_gates(guide: Guide, draws: int) -> Gates:
    """Joint discrete draws.  z (S, L, T, K), g (S, L, R - 1)."""
    laws = components(guide)
    m = torch.randint(len(laws.z.log_probs), (draws,), device=laws.z.log_probs.device)
    return Gates(*(NestedBernoulli(law.log_probs[m], validate_args=False).sample() for law in laws))


def log_prob(guide: Guide, gates: Gates, z_mask: Tensor, g_mask: Tensor) -> Tensor:
    """log q of joint draws, in nats, over the chains that exist.  z (S, L, T, K), g (S, L, R - 1) -> (S,)."""
    laws = components(guide)
    z = torch.where(z_mask, laws.z.log_prob(gates.z[:, None]), 0.0).sum((-1, -2))  # (S, M)
    g = torch.where(g_mask, laws.g.log_prob(gates.g[:, None]), 0.0).sum(-1)
    return (z + g).logsumexp(-1) - math.log(len(laws.z.log_probs))
