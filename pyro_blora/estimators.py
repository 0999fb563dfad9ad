"""Gradients of the expected negative log-likelihood through random gates, by name.

An estimator is `(score, guide, temperature) -> E_q[score]`, where `score(gates)` is the mean NLL of a batch at given
gates and the result is differentiable in the guide and in whatever the score depends on. The KL is added elsewhere, in
closed form, whichever estimator is used. Its attribute `check`, if it has one, is called with the guide before anything
is trained, and raises ValueError for a guide that it cannot serve.

    relaxed            one soft draw, reparametrised: low variance, biased by the temperature
    straight_through   one hard draw with the soft draw's gradient: exact values, biased gradient
    score_function     two antithetic hard draws: unbiased, two forwards, variance grows with the number of gates
    enumerate          the sum over all states: exact, for programs with few free gates

The first two draw once from each component of a mixture. Measured bias and variance: benchmarks/posterior.md.
"""

import math
from collections.abc import Callable
from itertools import product

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from . import guides
from .gates import Gates
from .registry import Registry

ESTIMATORS = Registry("estimator")
register_estimator = ESTIMATORS.register
Score = Callable[[Gates], Tensor]
_MOST_STATES = 1 << 14  # forwards in one exact expectation


@register_estimator("relaxed")
def relaxed(score: Score, guide: nn.Module, temperature: float) -> Tensor:
    """One soft draw. Source: Maddison et al., Jang et al. (2017)."""
    return _reparametrised(score, guide, temperature, False)


@register_estimator("straight_through")
def straight_through(score: Score, guide: nn.Module, temperature: float) -> Tensor:
    """One hard draw with the gradient of the soft one. Source: Bengio et al. (2013), Jang et al. (2017)."""
    return _reparametrised(score, guide, temperature, True)


def _reparametrised(score: Score, guide: nn.Module, temperature: float, hard: bool) -> Tensor:
    each = guide.each_law(temperature, hard) if hasattr(guide, "each_law") else [guide.laws(temperature, hard)]
    return sum(score(Gates(*(law.rsample() for law in laws))) for laws in each) / len(each)


@register_estimator("score_function")
def score_function(score: Score, guide: nn.Module, temperature: float) -> Tensor:
    """DisARM: two antithetic draws u and 1 - u, each the other's baseline, over the conditional gates of each chain.

    A gate whose parent is closed in both draws changes neither score, so its term, which is zero on average, is left
    out. The temperature plays no part.
    Errors: ValueError for a guide whose laws have no logits.
    Source: Dong, Mnih and Tucker, DisARM (2020); Yin et al., U2G (2020), found the same.
    """
    laws = _with_logits(guide, temperature)
    pairs = Gates(*(_antithetic(law.logits) for law in laws))  # each (2, ..., K), of 0 and 1
    first, second = (score(Gates(*(pair[i].cumprod(-1) for pair in pairs))) for i in range(2))
    difference = (first - second).detach() / 2
    surrogate = sum(_disarm(law.logits, pair, difference) for law, pair in zip(laws, pairs, strict=True))
    return (first + second) / 2 + surrogate - surrogate.detach()


def _with_logits(guide: nn.Module, temperature: float = 1.0) -> Gates:
    laws = guide.laws(temperature, True)
    if not all(hasattr(law, "logits") for law in laws):
        raise ValueError(
            f"estimator 'score_function' needs a guide with logits, not one of {type(laws.z).__name__} laws: use "
            "--guide mean_field, or --estimator straight_through"
        )
    return laws


score_function.check = _with_logits


def _antithetic(logits: Tensor) -> Tensor:
    """Two draws of each conditional gate that are as opposed as their probabilities allow.  (..., K) -> (2, ..., K)"""
    uniform = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)  # a 0 would close a pinned gate
    closed = torch.sigmoid(-logits.detach())
    return torch.stack([uniform > closed, 1 - uniform > closed]).to(logits.dtype)


def _disarm(logits: Tensor, pair: Tensor, difference: Tensor) -> Tensor:
    parents = torch.cat([torch.ones_like(pair[..., :1]), pair.cumprod(-1)[..., :-1]], -1).amax(0)
    finite = torch.where(logits.isfinite(), logits, 0.0)  # a pinned gate is the same in both draws
    weight = parents * (pair[0] - pair[1]) * torch.sigmoid(finite.detach().abs())
    return (weight * difference * finite).sum()


@register_estimator("enumerate")
def enumerate_states(score: Score, guide: nn.Module, temperature: float) -> Tensor:
    """The exact expectation, a forward for each state of the free chains. The temperature plays no part.

    Errors: ValueError for more than 16,384 states, and for a guide of one allocation, which would get no gradient.
    """
    laws, tables, free = _chains(guide)
    depths = [tables[site].shape[-1] for site, _ in free]
    total = 0.0
    modes = [law.mode[0] for law in laws]  # of a pinned chain, its only state
    for state in product(*(range(depth) for depth in depths)):
        gates = [mode.detach().clone() for mode in modes]
        weight = torch.ones_like(tables[0][:, 0, 0])  # (M,)
        for (site, chain), depth in zip(free, state, strict=True):
            chains = gates[site].view(-1, gates[site].shape[-1])
            chains[chain] = (torch.arange(chains.shape[-1], device=chains.device) < depth).to(chains.dtype)
            weight = weight * tables[site][:, chain, depth]
        total = total + weight.mean() * score(Gates(*gates))
    return total


def _chains(guide: nn.Module) -> tuple[Gates, list[Tensor], list[tuple[int, int]]]:
    """Components, the probability of each depth of each chain, and (site, chain) of those that are free."""
    if any(isinstance(law, dist.Delta) for law in guide.laws(1.0, True)):
        raise ValueError(
            "estimator 'enumerate' has no gradient for a guide of one allocation: use --guide mean_field, or "
            "--estimator straight_through"
        )
    laws = guides.components(guide)
    tables = [law.depth_probs.flatten(1, -2) for law in laws]  # (M, chains, K + 1)
    free = [(site, chain) for site, table in enumerate(tables) for chain in range(table.shape[1])
            if (table[:, chain] > 0).any(0).sum() > 1]  # fmt: skip
    states = math.prod(tables[site].shape[-1] for site, _ in free)
    if states > _MOST_STATES:
        given = f"{states:,}" if states < 1e12 else f"10^{int(math.log10(states))}"
        raise ValueError(
            f"estimator 'enumerate' would take {given} forwards a step, more than {_MOST_STATES:,}: use "
            "--estimator relaxed, or a prior that leaves fewer gates free"
        )
    return laws, tables, free


enumerate_states.check = _chains


def build_estimator(name: str, guide: nn.Module) -> Callable:
    """The named estimator.  Errors: ValueError for an unknown name, and for a guide that it cannot serve."""
    estimator = ESTIMATORS.resolve(name)
    if hasattr(estimator, "check"):
        estimator.check(guide)
    return estimator
