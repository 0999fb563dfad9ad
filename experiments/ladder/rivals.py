"""Gradient estimators that the package does not ship, with its signature: (score, guide, temperature) -> E_q[score].

    reinforce          two independent hard draws, no baseline: unbiased
    leave_one_out      two independent hard draws, each the other's baseline (RLOO): unbiased
    disarm_unmasked    antithetic draws without leaving out the gates whose parent is closed: unbiased
    reinmax            one hard draw with a second-order straight-through gradient: biased

The score of a nested chain counts only the gates that were reached, which is its Rao-Blackwellised form.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_blora.gates import Gates, NestedBernoulli


def _discrete(law) -> NestedBernoulli:
    return law.discrete


def _independent(score: Callable, guide: nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
    """Two draws: their scores (2,) without and their log-probabilities (2,) with gradients."""
    laws = [_discrete(law) for law in guide.laws(temperature, True)]
    scores, log_q = [], []
    for _ in range(2):
        gates = Gates(*(law.sample() for law in laws))
        scores.append(score(gates).detach())
        log_q.append(sum(law.log_prob(value).sum() for law, value in zip(laws, gates, strict=True)))
    return torch.stack(scores), torch.stack(log_q)


def reinforce(score: Callable, guide: nn.Module, temperature: float) -> Tensor:
    """Source: Williams (1992)."""
    scores, log_q = _independent(score, guide, temperature)
    surrogate = (scores * log_q).mean()
    return scores.mean() + surrogate - surrogate.detach()


def leave_one_out(score: Callable, guide: nn.Module, temperature: float) -> Tensor:
    """Source: Kool, van Hoof and Welling, Buy 4 REINFORCE samples, get a baseline for free (2019)."""
    scores, log_q = _independent(score, guide, temperature)
    surrogate = ((scores - scores.flip(0)) * log_q).mean()
    return scores.mean() + surrogate - surrogate.detach()


def disarm_unmasked(score: Callable, guide: nn.Module, temperature: float) -> Tensor:
    """Source: Dong, Mnih and Tucker, DisARM (2020), over all conditional gates as if they were independent."""
    laws = guide.laws(temperature, True)
    surrogate, pairs = 0.0, []
    for law in laws:
        uniform, closed = torch.rand_like(law.logits), torch.sigmoid(-law.logits.detach())
        pairs.append(torch.stack([uniform > closed, 1 - uniform > closed]).to(law.logits.dtype))
    first, second = (score(Gates(*(pair[i].cumprod(-1) for pair in pairs))).detach() for i in range(2))
    for law, pair in zip(laws, pairs, strict=True):
        finite = torch.where(law.logits.isfinite(), law.logits, 0.0)
        weight = (pair[0] - pair[1]) * torch.sigmoid(finite.detach().abs())
        surrogate = surrogate + (weight * (first - second) / 2 * finite).sum()
    return (first + second) / 2 + surrogate - surrogate.detach()


def reinmax(score: Callable, guide: nn.Module, temperature: float) -> Tensor:
    """At temperature 1.  Source: Liu et al., Bridging Discrete and Backpropagation (2023)."""
    return score(Gates(*(_second_order(law.logits).cumprod(-1) for law in guide.laws(temperature, True))))


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
