"""Guides: variational families of the gates, each made from layout and prior by a named function.

The function takes `(layout, prior, **settings)`, where the prior is a module whose call returns its Gates, and returns
a `Guide`. Register it with `@register_guide("name")`, or name it as `--guide file.py:function`.

The families here learn log Bayes factors, in nats. The depth d of a ladder is the number of its open gates, and
q(d) = softmax over d of log prior(d) + e_1 + ... + e_d, where e_d is the log Bayes factor of depth d against d - 1: the
posterior is prior times likelihood. The prior enters exactly, so a change of the prior (a budget, a learned rate) moves
the gates in the same step, whatever the optimizer's step size.
A gate that the prior pins (probability 0 or 1) is pinned in the guide, as the posterior cannot differ.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..gates import Gates, NestedBernoulli, RelaxedNestedBernoulli, pinned_logits
from ..ladder_math import log_at_least
from ..layout import AdapterLayout
from ..registries import GUIDES
from ..registry import adopted, undefined


class Guide(nn.Module):
    """The variational family of the gates.

    A subclass must define `distributions` and `posterior`; the other methods have defaults. A plain nn.Module with
    these methods works as well.

    Shapes: L projections, T tensors, K gates of a ladder, R ranks, M components; z (L, T, K), g (L, R - 1).
    Units: KLs and log Bayes factors in nats.
    """

    serves_every_rank = False
    """Whether every rank from 1 to R, the same for all adapters, is evaluated after training."""
    starts_from_data = False
    """Whether `start` is called when the gates start."""
    target_rank = 0
    """For a guide whose ranks the adapter allocates: the average rank at the end."""

    def distributions(self, temperature: float | Tensor, hard: bool) -> Gates[TorchDistribution]:
        """The variational distributions that training samples: reparametrized, of batch shapes (L, T) and (L,).

        They need a KL against NestedBernoulli, registered with torch.distributions.register_kl. hard: draws are
        ladders of 0 and 1. temperature > 0: of the relaxation, which decreases during training; a number or a tensor
        ().
        """
        raise undefined(self, "distributions")

    def posterior(self) -> Gates[NestedBernoulli]:
        """The exact marginal distributions of the ladders, two NestedBernoulli: reported and deployed."""
        raise undefined(self, "posterior")

    # --- families that are not mean field -----------------------------------------------------------------------------

    def components(self) -> Gates[NestedBernoulli]:
        """Equally likely discrete components, given which ladders are independent: z (M, L, T, K), g (M, L, R - 1)."""
        return Gates(*(NestedBernoulli(q.log_probs[None], validate_args=False) for q in self.posterior()))

    def each_component(self, temperature: float | Tensor, hard: bool) -> list[Gates[TorchDistribution]]:
        """What training draws from, each in a forward of its own: of every component its distribution.

        Drawing from one component alone would be M times noisier than a mean field.
        """
        return [self.distributions(temperature, hard)]

    def divergence(self, prior: Gates[NestedBernoulli], z_mask: Tensor, g_mask: Tensor) -> Gates[Tensor]:
        """KLs of all existing z and of all existing g, each (), where they are not sums over ladders."""
        raise undefined(self, "divergence")

    @property
    def has_divergence(self) -> bool:
        """Whether `divergence` is defined; else the KLs of `distributions` are summed over the ladders."""
        return type(self).divergence is not Guide.divergence

    def deployed(self) -> Gates[Tensor] | None:
        """The allocation to export, z and g of 0 and 1; None: where marginals exceed 1/2."""
        return None

    # --- training -----------------------------------------------------------------------------------------------------

    def computed_once(self) -> contextlib.AbstractContextManager[None]:
        """A context for one evaluation of the ELBO, in which parameters and prior do not change."""
        return contextlib.nullcontext()

    def start(self, log_bayes_factors: Gates[Tensor]) -> None:
        """Initialize the distributions from estimates of each depth's log-likelihood, up to a constant, nats.

        log_bayes_factors: of each depth of each ladder, z (L, T, K + 1), g (L, R).
        """

    def allocate(self, ranks: Tensor) -> None:
        """Set the ranks that the adapter's allocator has kept.  (L,)"""
        raise undefined(self, "allocate")

    @property
    def is_allocated(self) -> bool:
        return type(self).allocate is not Guide.allocate


_OPEN = 6.0  # log-odds of an open gate at the start: q(1 - q) = 0.0025, enough gradient to close it again
IMPOSSIBLE = -1e30  # in place of log 0 where a prior pins a gate, so that sums and gradients stay finite
_SURE = 1e4  # nats, in place of an infinite log Bayes factor


def conditional_logits(depth_logits: Tensor) -> Tensor:
    """Log-odds of opening each gate given its parent, from unnormalised log P(depth).  (..., K + 1) -> (..., K)"""
    return log_at_least(depth_logits)[..., 1:] - depth_logits[..., :-1]


class LogBayesFactors(Guide):
    """A log Bayes factor (nats) for each gate, its depth against the one below, per component; pins are the prior's.

    The parameters keep their stored names, `z_evidence` and `g_evidence`.
    """

    z_pins: Tensor  # (L, T, K), log-odds at which the prior holds a gate, nan where it is free
    g_pins: Tensor  # (L, R - 1)
    z_curvature: Tensor
    g_curvature: Tensor
    _shared: Gates[Tensor] | None = None
    _held = False

    def __init__(self, layout: AdapterLayout, prior: nn.Module, open_logit: float | None, components: int = 1):
        super().__init__()
        self.prior = prior
        distributions: Gates[NestedBernoulli] = prior()
        self.z_evidence = nn.Parameter(torch.zeros(components, *layout.z_shape))  # (M, L, T, K)
        self.g_evidence = nn.Parameter(torch.zeros(components, *layout.g_shape))  # (M, L, R - 1)
        for name, distribution, mask in (
            ("z_pins", distributions.z, layout.z_mask),
            ("g_pins", distributions.g, layout.g_mask),
        ):
            pins = torch.where(
                mask[..., None], pinned_logits(distribution.log_probs.detach()), torch.inf
            )  # or does not exist
            self.register_buffer(name, pins, persistent=False)
        self.free = Gates(bool(self.z_pins.isnan().any()), bool(self.g_pins.isnan().any()))  # is anything random?
        self.starts_from_data = any(self.free) and open_logit is None
        self._open(distributions, _OPEN if open_logit is None else float(open_logit))

    @torch.no_grad()
    def _open(self, prior: Gates[NestedBernoulli], logit: float) -> None:
        """Set every gate to log-odds `logit` under any prior."""
        for parameter, distribution in zip((self.z_evidence, self.g_evidence), prior, strict=True):
            odds = torch.full_like(distribution.log_probs, logit)
            wanted = RelaxedNestedBernoulli(odds, 1.0, validate_args=False).discrete.depth_log_probs
            parameter.copy_((wanted - distribution.depth_log_probs).diff(dim=-1).nan_to_num(0.0, 0.0, 0.0))

    @contextlib.contextmanager
    def computed_once(self) -> Iterator[None]:
        """A context in which parameters and prior do not change: sampling and KL share the log-odds."""
        self._shared = self._logits()  # a subclass that overrides it transforms this once
        try:
            yield
        finally:
            self._shared = None

    @property
    def is_natural(self) -> bool:
        """Whether q is the prior times exp(log Bayes factors), whose natural gradient is the slope in the marginals."""
        return type(self).logits is LogBayesFactors.logits

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which no gradient reaches parameters or prior through the distributions."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def factors(self, component: int) -> Gates[Tensor]:
        """The log Bayes factors of a component, nats.  z (L, T, K), g (L, R - 1)"""
        return Gates(self.z_evidence[component], self.g_evidence[component])

    def kl_slopes(self, z_mask: Tensor, g_mask: Tensor) -> Gates[Tensor]:
        """The natural gradient of KL(q || prior) in the factors, nats.  z (M, L, T, K), g (M, L, R - 1)

        Of a mean field the factors themselves: its log-odds are the prior's plus these.
        """
        return Gates(self.z_evidence.detach(), self.g_evidence.detach())

    def logits(self) -> Gates[Tensor]:
        """Conditional log-odds of every component.  z (M, L, T, K), g (M, L, R - 1)"""
        logits = self._logits() if self._shared is None else self._shared
        return Gates(*(x.detach() for x in logits)) if self._held else logits

    def _logits(self) -> Gates[Tensor]:
        prior: Gates[NestedBernoulli] = self.prior()
        return Gates(
            self._site_logits(prior.z, self.z_evidence, self.free.z, self.z_pins),
            self._site_logits(prior.g, self.g_evidence, self.free.g, self.g_pins),
        )

    @staticmethod
    def _site_logits(prior: NestedBernoulli, log_factors: Tensor, free: bool, pins: Tensor) -> Tensor:
        pinned = pins.expand(log_factors.shape)
        if not free:
            return pinned
        log_likelihood = nn.functional.pad(log_factors.cumsum(-1), (1, 0))  # of each depth, up to a constant
        logits = conditional_logits(prior.depth_log_probs.clamp(min=IMPOSSIBLE) + log_likelihood)
        return torch.where(pinned.isnan(), logits, pinned)

    def keep_curvature(self) -> None:
        """Have buffers for the curvature that `gauss_newton` needs, zero until the gates start."""
        for site, factors in (("z", self.z_evidence), ("g", self.g_evidence)):
            *ladders, gates = factors.shape[1:]
            self.register_buffer(f"{site}_curvature", factors.new_zeros(*ladders, gates + 1, gates + 1))

    @property
    def curvature(self) -> Gates[Tensor]:
        """Mean products of an example's changes of NLL at two depths.  z (L, T, K + 1, K + 1), g (L, R, R)"""
        return Gates(self.z_curvature, self.g_curvature)

    @torch.no_grad()
    def start(self, log_bayes_factors: Gates[Tensor]) -> None:
        """Set the factors from those of each depth, up to a constant.  z (L, T, K + 1), g (L, R), nats."""
        for parameter, of_depths in zip((self.z_evidence, self.g_evidence), log_bayes_factors, strict=True):
            parameter.copy_(of_depths.diff(dim=-1).nan_to_num(0.0, _SURE, -_SURE))

    def components(self) -> Gates[NestedBernoulli]:
        return Gates(*(RelaxedNestedBernoulli(x, 1.0, validate_args=False).discrete for x in self.logits()))


def require_natural(guide: nn.Module, wanted: str, remedy: str) -> LogBayesFactors:
    """The guide, if it has log Bayes factors in their own terms.  Errors: ValueError for any other."""
    if not isinstance(guide, LogBayesFactors) or not guide.is_natural:
        raise ValueError(
            f"{wanted} needs a guide of log Bayes factors, not a {type(guide).__name__}: use --guide mean_field or "
            f"mixture, or {remedy}"
        )
    return guide


def build_guide(
    name: str | Callable[..., Any], layout: AdapterLayout, prior: nn.Module, settings: dict | None = None
) -> Guide:
    """The named guide on a layout and a prior.  Errors: ValueError for an unknown name, setting or a wrong kind."""
    function = GUIDES.resolve(name)
    guide = function(layout, prior, **GUIDES.settings(function, settings or {}))
    if isinstance(guide, nn.Module):
        guide = adopted(guide, Guide)
    missing = [must.__name__ for must in (Guide.distributions, Guide.posterior)
               if getattr(type(guide), must.__name__, must) is must]  # fmt: skip
    if missing:
        raise ValueError(
            f"guide {GUIDES.called(name)!r} must return an nn.Module with distributions() and posterior(); "
            f"missing: {missing}"
        )
    return guide


def components(guide: Guide) -> Gates[NestedBernoulli]:
    """The discrete distribution as equally likely components, z (M, L, T, K), g (M, L, R - 1); one if mean field."""
    return guide.components()


def draw_gates(guide: Guide, draws: int) -> Gates[Tensor]:
    """Joint discrete draws.  z (S, L, T, K), g (S, L, R - 1)."""
    distributions = components(guide)
    m = torch.randint(len(distributions.z.log_probs), (draws,), device=distributions.z.log_probs.device)
    return Gates(*(NestedBernoulli(q.log_probs[m], validate_args=False).sample() for q in distributions))


def log_prob(guide: Guide, gates: Gates[Tensor], z_mask: Tensor, g_mask: Tensor) -> Tensor:
    """log q of joint draws, in nats, over the ladders that exist.  z (S, L, T, K), g (S, L, R - 1) -> (S,)."""
    distributions = components(guide)
    z = torch.where(z_mask, distributions.z.log_prob(gates.z[:, None]), 0.0).sum((-1, -2))  # (S, M)
    g = torch.where(g_mask, distributions.g.log_prob(gates.g[:, None]), 0.0).sum(-1)
    return (z + g).logsumexp(-1) - math.log(len(distributions.z.log_probs))
