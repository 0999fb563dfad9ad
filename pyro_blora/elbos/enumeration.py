"""The exact expected NLL: the sum over all states of the gates."""

import math
from itertools import product
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ..gates import Gates
from ..guides.base import Guide, components
from ..registries import register_elbo
from .base import Evaluation, GateELBO, unused

_MOST_STATES = 1 << 14  # forwards in one exact expectation


@register_elbo(
    "enumerate", excludes={"distillation": "--estimator enumerate has no draw at which a teacher answers: drop one"}
)
class Enumerate(GateELBO):
    """The exact expectation, a forward for each state of the free ladders. The temperature plays no part.

    Errors: ValueError for more than 16,384 states, and for a guide of one allocation, which would get no gradient.
    """

    draws = "discrete"

    def check(self, family: Guide) -> None:
        for distribution in family.distributions(1.0, True):
            _require_gradient(distribution)
        _free(_depth_tables(components(family)))

    def draw(self, distribution: dist.TorchDistribution) -> Tensor:
        _require_gradient(distribution)
        return unused(distribution)

    def expected_nll(self, at: Evaluation) -> Tensor:
        tables, modes = _tables_of(at)
        free, total = _free(tables), torch.zeros((), device=tables[0].device)
        for state in product(*(range(tables[site].shape[-1]) for site, _ in free)):
            gates = [mode.detach().clone() for mode in modes]
            weight = torch.ones_like(tables[0][:, 0, 0])  # (M,)
            for (site, ladder), depth in zip(free, state, strict=True):
                ladders = gates[site].view(-1, gates[site].shape[-1])
                ladders[ladder] = (torch.arange(ladders.shape[-1], device=ladders.device) < depth).to(ladders.dtype)
                weight = weight * tables[site][:, ladder, depth]
            total = total + weight.mean() * at.nll(Gates(*gates))
        return total


def _require_gradient(distribution: dist.TorchDistribution) -> None:
    if isinstance(distribution, dist.Delta):
        raise ValueError(
            "estimator 'enumerate' has no gradient for a guide of one allocation: use --guide mean_field, or "
            "--estimator straight_through"
        )


def _depth_tables(distributions: Gates[Any]) -> list[Tensor]:
    """The probability of each depth of each ladder, (M, ladders, K + 1), of z and of g."""
    return [q.depth_probs.flatten(1, -2) for q in distributions]


def _tables_of(at: Evaluation) -> tuple[list[Tensor], list[Tensor]]:
    """The same, and of each site a state, which is the only one of pinned ladders."""
    if at.joint is not None:
        distributions = components(at.joint.family)
        return _depth_tables(distributions), [q.mode[0] for q in distributions]
    discrete: list[Any] = [getattr(q, "discrete", q) for q in at.distributions]
    return [q.depth_probs.flatten(0, -2)[None] for q in discrete], [q.mode for q in discrete]


def _free(tables: list[Tensor]) -> list[tuple[int, int]]:
    """(site, ladder) of those that are free.  Errors: ValueError where they have too many states."""
    free = [(site, ladder) for site, table in enumerate(tables) for ladder in range(table.shape[1])
            if (table[:, ladder] > 0).any(0).sum() > 1]  # fmt: skip
    states = math.prod(tables[site].shape[-1] for site, _ in free)
    if states > _MOST_STATES:
        given = f"{states:,}" if states < 1e12 else f"10^{int(math.log10(states))}"
        raise ValueError(
            f"estimator 'enumerate' would take {given} forwards a step, more than {_MOST_STATES:,}: use "
            "--estimator relaxed, or a prior that leaves fewer gates free"
        )
    return free
