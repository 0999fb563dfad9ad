"""What a posterior of gates becomes where one of its ladders is forced into some of its states.

Shapes: M equally likely components of the guide, given which ladders are independent; D states of a ladder (widths or
ranks).   Units: nats; BOPs as ratios to 32 x 32 bit with all ranks.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..bops import expected_bops
from ..gates import Gates
from ..layout import AdapterLayout

_DRAWS, _NUMBERS = 512, 1 << 22  # of every component at most; of all that is drawn


class WhatIf(NamedTuple):
    """The predicted effect of forcing a gate: the guide, conditioned on it.

    probability: of the forced state under the guide. elbo_loss: nats that the ELBO loses, exact for a mean field at
    its optimum: -log probability, and less (1 - beta) / beta nll_rise of a cold posterior, whose KL has weight beta.
    nll_rise: the part of them that the expected NLL rises (negative where the likelihood favours the forced state); the
    KL has the rest. bops_adapted, bops_model: E[BOPs] then, against before_adapted and before_model.
    """

    gate: str
    opened: bool
    probability: float
    elbo_loss: float
    nll_rise: float
    bops_adapted: float
    bops_model: float
    before_adapted: float
    before_model: float


class Forced(NamedTuple):
    """The guide given the forced states: their log probability, by how much E[log guide / prior] is below that of the
    whole guide, and E[BOPs] then."""

    log_probability: float
    log_factor_loss: float
    bops_adapted: float
    bops_model: float


class Slopes(NamedTuple):
    """E[BOPs] of every component, (M,) of either denominator, and their slopes in the marginals of all gates."""

    adapted: Tensor
    model: Tensor
    of_adapted: Gates
    of_model: Gates


class Forcing:
    """Conditions a guide on states of one ladder, again and again: what all of them share is computed once.

    log_q: log probabilities of the guide's components, z (M, L, T, D), g (M, L, D); log_prior the same without M.
    A ladder that does not exist is in its last state with probability 1.
    """

    def __init__(self, layout: AdapterLayout, log_q: Gates[Tensor], log_prior: Gates[Tensor]):
        self.layout, self.log_q, self.log_prior = layout, log_q, log_prior

    def __call__(self, site: str, index: tuple[int, ...], kept: Tensor) -> Forced:
        """site: z or g; index: of the ladder, (l, t) or (l,); kept: (D,), whether a state stays possible.

        Everything is exact but for a guide of several components, of which the log density of the mixture is averaged
        over draws (`_excess`), always the same ones.
        """
        log_q = getattr(self.log_q, site)[(slice(None), *index)]  # (M, D)
        mass = torch.where(kept, log_q, -torch.inf).logsumexp(-1)  # (M,)
        log_probability = float(mass.logsumexp(0) - math.log(len(mass)))
        weights, alive = mass.softmax(0), (mass > -torch.inf)[:, None]
        forced = torch.where(kept & alive, log_q - mass.clamp(min=-1e300)[:, None], -torch.inf)
        forced = torch.where(alive, forced, log_q)  # of weight 0
        shift = opening(forced) - opening(log_q)  # (M, D - 1); E[BOPs] is linear in the marginals of one ladder
        adapted, model, *slopes = self.slopes
        adapted_then, model_then = (
            float(weights @ (x + (getattr(slope, site)[(slice(None), *index)] * shift).sum(-1)))
            for x, slope in zip((adapted, model), slopes, strict=True)
        )
        even = torch.full_like(weights, 1 / len(weights))
        change = even[:, None] * log_q.exp() - weights[:, None] * forced.exp()  # (M, D), of the joint probability
        own = log_q - getattr(self.log_prior, site)[index]  # (M, D)
        loss = torch.where(change != 0, change * own, 0.0).sum()
        if len(weights) > 1:
            loss = loss + (even - weights) @ (self._kl - torch.where(log_q.exp() > 0, log_q.exp() * own, 0.0).sum(-1))
            loss = loss + torch.where(change != 0, change * self._excess(site, index), 0.0).sum()
        return Forced(log_probability, float(loss), adapted_then, model_then)

    @functools.cached_property
    def slopes(self) -> Slopes:
        """E[BOPs] of every component and its slopes in the marginals."""
        with torch.enable_grad():
            marginals = Gates(*(opening(x).requires_grad_() for x in self.log_q))
            found = expected_bops(self.layout, *marginals)
            ratios = found.adapted_ratio, found.model_ratio
            each = [Gates(*torch.autograd.grad(x.sum(), marginals, retain_graph=True)) for x in ratios]
        return Slopes(found.adapted_ratio.detach(), found.model_ratio.detach(), *each)

    @functools.cached_property
    def _kl(self) -> Tensor:
        """KL(component || prior), (M,)"""
        each = (
            torch.where(q.exp() > 0, q.exp() * (q - p), 0.0) for q, p in zip(self.log_q, self.log_prior, strict=True)
        )
        return sum((x.flatten(1).sum(-1) for x in each), start=torch.zeros((), dtype=torch.float64))

    def _excess(self, site: str, index: tuple[int, ...]) -> Tensor:
        """E[log guide - log component] given a state of the ladder, the others drawn from the component.  (M, D)"""
        log_q = getattr(self.log_q, site)[(slice(None), *index)]
        own = log_q[
            :, getattr(self._drawn, site)[(slice(None), slice(None), *index)]
        ]  # (M, S, M): of a density, of a draw, of what drew it
        others = _minus(self._joint, own.permute(1, 2, 0))  # (S, M, M)
        joint = others[..., None] + log_q  # (S, M, M, D), of every state
        excess = joint.logsumexp(2) - math.log(len(log_q)) - joint.diagonal(dim1=1, dim2=2).permute(0, 2, 1)
        return excess.mean(0)  # nan where a component is never in that state

    @functools.cached_property
    def _drawn(self) -> Gates[Tensor]:
        """States of draws of every component, z (S, M, L, T), g (S, M, L)."""
        generator = torch.Generator().manual_seed(0)
        components, ladders = len(self.log_q.z), sum(x[0, ..., 0].numel() for x in self.log_q)
        S = min(_DRAWS, max(1, _NUMBERS // (components**2 * ladders)))
        return Gates(*(
            torch.multinomial(x.exp().flatten(0, -2), S, replacement=True, generator=generator).T.unflatten(
                1, x.shape[:-1]
            )
            for x in self.log_q
        ))  # fmt: skip

    @functools.cached_property
    def _joint(self) -> "_LogProb":
        """log probabilities of the draws under every component, (S, M, M), the last dimension that of the density."""
        found = []
        for log_q, drawn in zip(self.log_q, self._drawn, strict=True):
            each = [
                x.expand(*drawn.shape, -1).gather(-1, drawn[..., None]).squeeze(-1).flatten(2) for x in log_q
            ]  # of every density (S, M, ladders)
            found.append(torch.stack(each, 2))
        return _LogProb.of(torch.cat(found, -1))


class _LogProb(NamedTuple):
    """A sum of log probabilities from which one can be taken out again, where some are -inf."""

    finite: Tensor
    impossible: Tensor  # how many of them are -inf

    @classmethod
    def of(cls, each: Tensor) -> "_LogProb":
        """The sum over the last dimension."""
        impossible = each == -torch.inf
        return cls(torch.where(impossible, 0.0, each).sum(-1), impossible.sum(-1))


def _minus(total: _LogProb, one: Tensor) -> Tensor:
    impossible = one == -torch.inf
    rest = total.finite - torch.where(impossible, 0.0, one)
    return torch.where(total.impossible > impossible, -torch.inf, rest)


def opening(log_q: Tensor) -> Tensor:
    """Probabilities that each gate is open, from log probabilities of a ladder's states.  (..., D) -> (..., D - 1)"""
    return log_q.exp().flip(-1).cumsum(-1).flip(-1)[..., 1:].clamp(max=1.0)
