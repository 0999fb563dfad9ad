"""ELBOs that the package does not ship: other gradients of the expected NLL through the gates.

    Reinforce         two independent hard draws, no baseline: unbiased
    LeaveOneOut       two independent hard draws, each the other's baseline (RLOO): unbiased
    UnmaskedDisarm    antithetic draws without leaving out the gates whose parent is closed: unbiased
    ReinMax           one hard draw with a second-order straight-through gradient: biased

The score of a nested ladder counts only the gates that were reached, which is its Rao-Blackwellised form.
"""

import torch
from torch import Tensor

from pyro_blora.elbos import Evaluation, GateELBO, ScoreFunction
from pyro_blora.gates import Gates


class Reinforce(GateELBO):
    """Source: Williams (1992)."""

    draws = "discrete"

    def draw(self, distribution) -> Tensor:
        """Two draws, (2, ..., K)."""
        return distribution.discrete.sample((2,))

    def rewards(self, scores: Tensor) -> Tensor:
        """What each draw's log-probability is multiplied by, (2,)."""
        return scores

    def expected_nll(self, at: Evaluation) -> Tensor:
        scores = torch.stack([at.nll(Gates(z, g)).detach() for z, g in zip(*at.gates, strict=True)])
        log_q = sum(
            distribution.discrete.log_prob(x).flatten(1).sum(-1)
            for distribution, x in zip(at.distributions, at.gates, strict=True)
        )
        surrogate = (self.rewards(scores) * log_q).mean()
        return scores.mean() + surrogate - surrogate.detach()


class LeaveOneOut(Reinforce):
    """Source: Kool, van Hoof and Welling, Buy 4 REINFORCE samples, get a baseline for free (2019)."""

    def rewards(self, scores: Tensor) -> Tensor:
        return scores - scores.flip(0)


class UnmaskedDisarm(ScoreFunction):
    """Source: Dong, Mnih and Tucker, DisARM (2020), over all conditional gates as if they were independent."""

    def expected_nll(self, at: Evaluation) -> Tensor:
        first, second = (at.nll(Gates(*(pair[i].cumprod(-1) for pair in at.gates))).detach() for i in range(2))
        surrogate = first.new_zeros(())
        for distribution, pair in zip(at.distributions, at.gates, strict=True):
            finite = torch.where(distribution.logits.isfinite(), distribution.logits, 0.0)
            weight = (pair[0] - pair[1]) * torch.sigmoid(finite.detach().abs())
            surrogate = surrogate + (weight * (first - second) / 2 * finite).sum()
        return (first + second) / 2 + surrogate - surrogate.detach()


class ReinMax(GateELBO):
    """At temperature 1.  Source: Liu et al., Bridging Discrete and Backpropagation (2023)."""

    def draw(self, distribution) -> Tensor:
        return _second_order(distribution.logits).cumprod(-1)

    def expected_nll(self, at: Evaluation) -> Tensor:
        return at.nll(at.gates)


def _second_order(logits: Tensor) -> Tensor:
    pinned = ~logits.isfinite()
    finite = torch.where(pinned, 0.0, logits)
    pair = torch.stack([torch.zeros_like(finite), finite], -1)  # (..., K, 2), closed and open
    probs = pair.softmax(-1)
    opened = torch.bernoulli(probs[..., 1].detach())
    hard = torch.stack([1 - opened, opened], -1)
    halfway = ((((hard + probs) / 2).log() - pair).detach() + pair).softmax(-1)
    second = (2 * halfway - probs / 2)[..., 1]
    return torch.where(pinned, (logits > 0).to(logits.dtype), opened + (second - second.detach()))
