"""A natural gradient of the gates from one hard draw: slopes of the NLL, and its Gauss-Newton curvature."""

import functools
from typing import Any

import torch
from torch import Tensor

from ..gates import Gates
from ..guides.base import Guide, LogBayesFactors, require_natural
from ..registries import register_elbo
from .base import Evaluation, GateELBO, Program, Terms


@register_elbo("gauss_newton")
class GaussNewton(GateELBO):
    """One hard draw of each component; its gradient in the log Bayes factors is the natural one.

    A quantized tensor is linear in its ladder, so one backward pass has the slope of the NLL towards every depth at
    once. Along the way from the drawn depth c to depth d the NLL of an example changes by its slope, D_d - D_c, and
    by half the square of that change in a direction drawn from its Fisher metric:

        E[NLL | d] - E[NLL | c]  ~  slope_d - slope_c + (C_dd - 2 C_cd + C_cc) / 2          C = mean of D D'

    C is estimated when the gates start (training/gate_init.py). Without it the estimate is biased: the slope at a
    drawn state points to where the tangent goes. The differences from each depth to the next are the gradient in the
    marginals, which for log Bayes factors is the natural gradient: a gate far from undecided has the same slope as
    any other. The gradient of the KL in the marginals is the log Bayes factor itself.
    Errors: ValueError for a guide without log Bayes factors.
    Source: Khan and Rue, The Bayesian learning rule (2023), with the Gauss-Newton form of the curvature.
    """

    draws = "discrete"
    first = 0
    natural = True

    def __init__(self) -> None:
        super().__init__()
        self.family: LogBayesFactors | None = None

    def check(self, family: Guide) -> None:
        self.family = require_natural(family, "estimator 'gauss_newton'", "--estimator straight_through")
        self.family.keep_curvature()
        self.needs_curvature = any(self.family.free)

    @property
    def guide(self) -> LogBayesFactors:
        assert self.family is not None, "check() has not been called"
        return self.family

    @torch.no_grad()
    def take_curvature(self, curvature: Gates[Tensor]) -> None:
        for kept, found in zip(self.guide.curvature, curvature, strict=True):
            kept.copy_(found)

    def expected_nll(self, at: Evaluation) -> Tensor:
        return at.mean_over_components(functools.partial(self._nll, at))

    def _nll(self, at: Evaluation, drawn: Gates[Tensor], component: int) -> Tensor:
        """The NLL at a draw of a component, whose gradient in its factors is the natural one."""
        factors, passed, half_curvatures = self.guide.factors(component), [], []
        for gates, e, curvature, free in zip(drawn, factors, self.guide.curvature, self.guide.free, strict=True):
            slope = at.components * _zero(e)
            passed.append(gates.detach() + slope if free else gates)
            half_curvatures.append((half_curvature(gates.detach(), curvature) * slope).sum() if free else 0.0)
        return at.nll(Gates(*passed)) + sum(half_curvatures)

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        with self.guide.held():
            return super().terms(model, guide, *args, **kwargs)

    def divergences(self, at: Evaluation) -> dict[str, Tensor]:
        """By site; the gradient reaches the factors in closed form, and what the prior learns as if q were fixed."""
        found = super().divergences(at)
        masks = Gates(*(at.drawn[site]["mask"] for site in Gates._fields))
        slopes, factors = self.guide.kl_slopes(*masks), Gates(self.guide.z_evidence, self.guide.g_evidence)
        if at.shared.keys() - {"theta"}:  # rates are random: factors multiply the prior at their mean
            slopes = Gates(*(a + b for a, b in zip(slopes, self._from_the_mean(at), strict=True)))
        for site, mask, slope, e in zip(Gates._fields, masks, slopes, factors, strict=True):
            found[site] = found[site] + torch.where(mask[..., None], slope * _zero(e), 0.0).sum()
        return found

    @torch.no_grad()
    def _from_the_mean(self, at: Evaluation) -> Gates[Tensor]:
        """From one depth to the next, the slopes of the prior's log-probability at the mean rates less those at the
        drawn ones, nats.  z (L, T, K), g (L, R - 1)
        """
        own, scored = self.guide.prior(), Gates(*(at.scored[site]["fn"] for site in Gates._fields))
        pairs = ((p.depth_log_probs - s.depth_log_probs).diff(dim=-1) for p, s in zip(own, scored, strict=True))
        return Gates(*(x.nan_to_num(0.0, 0.0, 0.0) for x in pairs))


def _zero(factors: Tensor) -> Tensor:
    """0, to the bit, with a gradient of 1."""
    return factors - factors.detach()


def half_curvature(gates: Tensor, curvature: Tensor) -> Tensor:
    """Half the curvature of the NLL from a drawn depth c to depth d, less that to d - 1, nats an example.

    gates (..., K) of 0 and 1, curvature (..., K + 1, K + 1) -> (..., K)
    """
    own = curvature.diagonal(dim1=-2, dim2=-1)  # (..., K + 1)
    drawn = gates.sum(-1).long()[..., None]
    crossed = curvature.gather(-1, drawn[..., None].expand(*own.shape, 1))[..., 0]
    half: Tensor = (own - 2 * crossed + own.gather(-1, drawn)) / 2
    return half.diff(dim=-1)
