"""Every state of a program's free ladders, and what follows exactly from a table of their log-likelihoods.

Shapes: S states, C free ladders, G free gates (the sum of the ladders' K), M components of a mixture.   Units: nats.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_blora.gates import Gates, NestedBernoulli


@dataclasses.dataclass(frozen=True)
class States:
    """All depths of the ladders that a prior leaves free, in the order of `itertools.product`.

    chains: (site, index) of each ladder, site 0 for z and 1 for g. sizes: K + 1 of each. gates: z (S, L, T, K),
    g (S, L, R - 1). depths (S, C). open (S, G), float64: which free gates are open. log_prior (S,), float64.
    """

    chains: list[tuple[int, tuple[int, ...]]]
    sizes: tuple[int, ...]
    depths: Tensor
    gates: Gates
    open: Tensor
    log_prior: Tensor

    @classmethod
    def of(cls, prior: Gates) -> "States":
        """The states of a prior that leaves a few ladders free; the others must be pinned."""
        chains, sizes = [], []
        for site, distribution in enumerate(prior):
            free = ((distribution.log_probs < 0) & (distribution.log_probs > -torch.inf)).any(-1)
            chains += [(site, tuple(index.tolist())) for index in free.nonzero()]
            sizes += [distribution.log_probs.shape[-1] + 1] * int(free.sum())
        depths = torch.tensor(list(itertools.product(*map(range, sizes))))
        gates = [distribution.mode.expand(len(depths), *distribution.log_probs.shape).clone() for distribution in prior]
        opened, log_prior = [], torch.zeros(len(depths), dtype=torch.float64)
        for c, (site, index) in enumerate(chains):
            K = sizes[c] - 1
            chain = (torch.arange(K) < depths[:, c, None]).double()  # (S, K)
            gates[site][(slice(None), *index)] = chain.to(gates[site].dtype)
            opened.append(chain)
            log_prior += NestedBernoulli(prior[site].log_probs[index].double()).depth_log_probs[depths[:, c]]
        return cls(chains, tuple(sizes), depths, Gates(*gates), torch.cat(opened, -1), log_prior)

    @functools.cached_property
    def _strides(self) -> Gates:
        """What an open gate adds to the place of a state, in the shapes of the gates."""
        strides = Gates(*(torch.zeros(gates.shape[1:]) for gates in self.gates))
        for c, (site, index) in enumerate(self.chains):
            strides[site][index] = math.prod(self.sizes[c + 1 :])
        return strides

    def index(self, gates: Gates) -> int:
        """The place of one state.  z (L, T, K), g (L, R - 1), of 0 and 1."""
        return int(sum((x * stride).sum() for x, stride in zip(gates, self._strides, strict=True)))

    def one_hot(self) -> Tensor:
        """(sum of K + 1, S), float64: which depth each ladder has in each state."""
        rows = [torch.nn.functional.one_hot(self.depths[:, c], size) for c, size in enumerate(self.sizes)]
        return torch.cat(rows, -1).T.double()

    def log_q(self, components: Gates) -> Tensor:
        """Log-probability (S,) of every state under equally likely components (M, ...): float64, differentiable."""
        terms = []
        for c, (site, index) in enumerate(self.chains):
            distribution = NestedBernoulli(components[site].log_probs[(slice(None), *index)].double())
            terms.append(distribution.depth_log_probs[:, self.depths[:, c]])  # (M, S)
        return torch.stack(terms).sum(0).logsumexp(0) - math.log(len(terms[0]))


@dataclasses.dataclass(frozen=True)
class Table:
    """The log-likelihood of all the data in every state.  log_likelihood (S,), float64."""

    states: States
    log_likelihood: Tensor

    @classmethod
    def of(cls, states: States, log_likelihood: Callable[[Gates], Tensor]) -> "Table":
        """One call of `log_likelihood` for each state."""
        with torch.no_grad():
            rows = [log_likelihood(Gates(z, g)).double() for z, g in zip(*states.gates, strict=True)]
        return cls(states, torch.stack(rows))

    @property
    def log_joint(self) -> Tensor:
        return self.states.log_prior + self.log_likelihood

    @property
    def log_evidence(self) -> float:
        return self.log_joint.logsumexp(0).item()

    @property
    def posterior(self) -> Tensor:
        """(S,) exact probabilities."""
        return self.log_joint.softmax(0)

    def marginals(self, distribution: Tensor) -> Tensor:
        """P(open) of each free gate under state probabilities.  (..., S) -> (..., G)"""
        return distribution @ self.states.open

    def expected_nll(self, log_q: Tensor) -> Tensor:
        """E_q[-log-likelihood], nats over all data.  log_q (S,)"""
        return -(log_q.exp() * self.log_likelihood).sum()

    def elbo(self, log_q: Tensor) -> float:
        """E_q[log joint - log q] by enumeration.  log_q (S,)"""
        return negative_kl(log_q, self.log_joint).item()


def negative_kl(log_q: Tensor, log_joint: Tensor) -> Tensor:
    """sum of q (log joint - log q), with 0 log 0 = 0.  (..., S) -> (...)"""
    q = log_q.exp()
    return torch.where(q > 0, q * (log_joint - log_q), 0.0).sum(-1)


def best_on_table(
    states: States, log_joint: Tensor, *, components: int = 1, restarts: int = 8, steps: int = 600, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The best equally weighted mixture of mean fields: gradient ascent on the enumerated ELBO, the best of restarts.

    Shapes: log_joint (..., S) -> the log distribution (..., S) and its ELBO (...), float64.   Units: nats.
    """
    generator = torch.Generator().manual_seed(seed)
    hot, log_prior = states.one_hot(), torch.zeros(sum(states.sizes), dtype=torch.float64)
    shape = (restarts, *log_joint.shape[:-1], components, len(hot))
    spread = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    logits = (log_prior + spread).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)

    def log_q() -> Tensor:
        each = torch.cat([x.log_softmax(-1) for x in logits.split(states.sizes, -1)], -1)
        return (each @ hot).logsumexp(-2) - math.log(components)

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        (-negative_kl(log_q(), log_joint).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        distribution = log_q()
        elbo, best = negative_kl(distribution, log_joint).max(0)
        return distribution.gather(0, best[None, ..., None].expand(1, *distribution.shape[1:]))[0], elbo


def coordinate_sweep(states: States, log_joint: Tensor, log_q: Tensor) -> Tensor:
    """One sweep of exact coordinate ascent from a mean field: at its optimum nothing moves.  (S,) -> (S,)"""
    distributions = depth_distributions(states, log_q)
    for c in range(len(distributions)):
        distributions[c] = by_depth(states, log_joint, distributions, c).softmax(0)
    return sum(distribution.log()[states.depths[:, c]] for c, distribution in enumerate(distributions))


def depth_distributions(states: States, log_q: Tensor) -> list[Tensor]:
    """The marginal distribution of each ladder's depth, (K + 1,) each.  log_q (S,)"""
    return [_marginal(log_q.exp().view(states.sizes), c) for c in range(len(states.sizes))]


def by_depth(states: States, values: Tensor, distributions: list[Tensor], chain: int) -> Tensor:
    """The mean of values (S,) at each depth of one ladder, the others as distributed.  (K + 1,)"""
    mean = values.view(states.sizes)
    for other in reversed([i for i in range(len(states.sizes)) if i != chain]):  # from the last, so that places stay
        mean = torch.tensordot(mean, distributions[other], dims=([other], [0]))
    return mean


def _marginal(distribution: Tensor, chain: int) -> Tensor:
    return distribution.sum([i for i in range(distribution.dim()) if i != chain])
