"""DisARM: an unbiased gradient from two antithetic hard draws."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ..gates import Gates
from ..guides.base import Guide
from ..registries import register_elbo
from .base import Evaluation, GateELBO


@register_elbo("score_function")
class ScoreFunction(GateELBO):
    """DisARM: two antithetic draws u and 1 - u, each the other's baseline, over the conditional gates of each ladder.

    A gate whose parent is closed in both draws changes neither NLL, so its term, which is zero on average, is left
    out. The temperature plays no part.
    Errors: ValueError for a guide whose distributions have no logits.
    Source: Dong, Mnih and Tucker, DisARM (2020); Yin et al., U2G (2020), found the same.
    """

    draws = "discrete"

    def check(self, family: Guide) -> None:
        for distribution in family.distributions(1.0, True):
            _logits(distribution)

    def draw(self, distribution: dist.TorchDistribution) -> Tensor:
        """Two draws of the conditional gates that are as opposed as their probabilities allow.  (2, ..., K)"""
        logits = _logits(distribution)
        uniform = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)  # a 0 would close a pinned gate
        closed = torch.sigmoid(-logits.detach())
        return torch.stack([uniform > closed, 1 - uniform > closed]).to(logits.dtype)

    def expected_nll(self, at: Evaluation) -> Tensor:
        first, second = (at.nll(Gates(*(pair[i].cumprod(-1) for pair in at.gates))) for i in range(2))
        difference = (first - second).detach() / 2
        of_z, of_g = (_disarm(_logits(q), pair, difference) for q, pair in zip(at.distributions, at.gates, strict=True))
        surrogate = of_z + of_g
        return (first + second) / 2 + surrogate - surrogate.detach()


def _logits(site: Any) -> Tensor:
    try:
        logits: Tensor = site.logits
    except AttributeError:
        raise ValueError(
            f"estimator 'score_function' needs a guide with logits, not one of {type(site).__name__} distributions: "
            "use --guide mean_field, or --estimator straight_through"
        ) from None
    return logits


def _disarm(logits: Tensor, pair: Tensor, difference: Tensor) -> Tensor:
    parents = torch.cat([torch.ones_like(pair[..., :1]), pair.cumprod(-1)[..., :-1]], -1).amax(0)
    finite = torch.where(logits.isfinite(), logits, 0.0)  # a pinned gate is the same in both draws
    weight = parents * (pair[0] - pair[1]) * torch.sigmoid(finite.detach().abs())
    return (weight * difference * finite).sum()
