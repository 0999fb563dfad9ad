"""A mixture of mean fields, which represents dependence between gates."""

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ..gates import Gates, NestedBernoulli, RelaxedNestedBernoulli
from ..layout import AdapterLayout
from ..registries import register_guide
from .base import IMPOSSIBLE, LogBayesFactors

_MOST = 1000  # components
_SPREAD = 0.5  # nats between the components of a mixture at its start: equal ones would stay equal
_INFORMATION_DRAWS = 64  # of the gates, for their mutual information with the component; no forward of the backbone


class Mixture(LogBayesFactors):
    """M mean fields, equally likely: ladders are independent given the component, correlated without it.

    KL(q || p) = mean_m KL(q_m || p) - I, where I <= log M nats is the mutual information of gates and component. The
    first part is in closed form, I is averaged over draws of the gates, which need no forward. Pyro's own ELBO would
    take the KL of the one component that `distributions` draws.
    """

    def distributions(self, temperature: float | Tensor, hard: bool) -> Gates[TorchDistribution]:
        each = self.each_component(temperature, hard)
        return each[int(torch.randint(len(each), ()))]  # drawn on the host: no transfer

    def each_component(self, temperature: float | Tensor, hard: bool) -> list[Gates[TorchDistribution]]:
        pairs = zip(*self.logits(), strict=True)  # (z, g) of each component
        return [Gates(*(RelaxedNestedBernoulli(x, temperature, hard, validate_args=False) for x in p)) for p in pairs]

    def posterior(self) -> Gates[NestedBernoulli]:
        mixed = (q.depth_log_probs.logsumexp(0) - math.log(len(q.log_probs)) for q in self.components())
        return Gates(*(NestedBernoulli.from_depth_logits(x, validate_args=False) for x in mixed))

    @torch.no_grad()
    def start(self, log_bayes_factors: Gates[Tensor]) -> None:
        super().start(log_bayes_factors)
        for parameter in (self.z_evidence, self.g_evidence):
            parameter.add_(_SPREAD * torch.randn_like(parameter))

    def divergence(self, prior: Gates[NestedBernoulli], z_mask: Tensor, g_mask: Tensor) -> Gates[Tensor]:
        components = self.components()
        kl_z = torch.where(z_mask, kl_divergence(components.z, prior.z), 0.0).sum((-1, -2)).mean()
        kl_g = torch.where(g_mask, kl_divergence(components.g, prior.g), 0.0).sum(-1).mean()
        return Gates(kl_z - self._information(components, z_mask, g_mask), kl_g)

    def _information(self, components: Gates[NestedBernoulli], z_mask: Tensor, g_mask: Tensor) -> Tensor:
        """I(component; gates), with the score-function gradient and each component's own mean as its baseline."""
        M = len(components.z.log_probs)
        S = max(2, _INFORMATION_DRAWS // M)
        z, g = (q.sample((S,)).flatten(0, 1)[:, None] for q in components)  # (S M, 1, ...), component i % M
        log_q = torch.where(z_mask, components.z.log_prob(z), 0.0).sum((-1, -2))
        log_q = log_q + torch.where(g_mask, components.g.log_prob(g), 0.0).sum(-1)  # (S M, M)
        own = log_q.view(S, M, M).diagonal(dim1=1, dim2=2)  # (S, M)
        information = own - (log_q.logsumexp(-1).view(S, M) - math.log(M))
        reward = information.detach()
        others = (reward.sum(0) - reward) / (S - 1)
        score = ((reward - others) * own).mean()
        return reward.mean() + score - score.detach()

    @torch.no_grad()
    def kl_slopes(self, z_mask: Tensor, g_mask: Tensor) -> Gates[Tensor]:
        """The factors less M times the slopes of I in a component's marginals, averaged over draws of the gates.

        The slope of E_qm[f] from one depth to the next is E_qm[f at the one - f at the other], all other ladders as
        drawn, with f = log q_m - log q; the slopes of f itself average to zero.
        Source: Titsias and Lazaro-Gredilla, Local expectation gradients (2015).
        """
        components = self.components()
        M = len(components.z.log_probs)
        S = max(2, _INFORMATION_DRAWS // M)
        depths = [q.sample((S,)).sum(-1).long() for q in components]  # (S, M, ...), of each component
        tables = [torch.where(mask[..., None], q.depth_log_probs.clamp(min=IMPOSSIBLE), 0.0)
                  for q, mask in zip(components, (z_mask, g_mask), strict=True)]  # fmt: skip
        drawn = [_picked(table, depth) for table, depth in zip(tables, depths, strict=True)]
        log_q = sum((x.flatten(3).sum(-1) for x in drawn), start=drawn[0].new_zeros(()))  # (S, M, M)
        slopes = []
        for factors, table, own in zip((self.z_evidence, self.g_evidence), tables, drawn, strict=True):
            others = log_q.view(S, M, M, *[1] * (own.dim() - 3)) - own
            moved = others[..., None] + table  # log q_j with this ladder at every depth, (S, M, j, ..., K + 1)
            of_own = moved.diagonal(dim1=1, dim2=2).movedim(-1, 1)
            f = of_own - (moved.logsumexp(2) - math.log(M))
            slopes.append(factors - f.mean(0).diff(dim=-1))
        return Gates(*slopes)


def _picked(table: Tensor, depths: Tensor) -> Tensor:
    """Log-probabilities under every component j of the depths drawn from each.  (M, ..., K + 1) -> (S, M, j, ...)"""
    S, M = depths.shape[:2]
    index = depths[:, :, None, ..., None].expand(S, M, *table.shape[:-1], 1)
    return table.expand(S, M, *table.shape).gather(-1, index)[..., 0]


@register_guide("mixture", proposes={"estimator": "gauss_newton"})
def mixture(
    layout: AdapterLayout, prior: nn.Module, *, components: int = 4, open_logit: float | None = None
) -> Mixture:
    """A mixture of mean fields, for gates that trade off; gains at most log(components) nats of ELBO.

    A step takes `components` forward and backward passes in place of one.
    Settings: components, M; open_logit, the log-odds at which every gate starts (default: estimated from the data).
    Source: Jaakkola and Jordan, Improving the mean field approximation via the use of mixture distributions (1998).
    """
    if components < 2:
        raise ValueError(f"guide 'mixture' needs at least 2 components, got {components}: one is guide 'mean_field'")
    if components > _MOST:
        raise ValueError(f"guide 'mixture' takes at most {_MOST} components, a forward each, got {components:,}")
    guide = Mixture(layout, prior, open_logit, components)
    with torch.no_grad():
        for parameter in (guide.z_evidence, guide.g_evidence):
            parameter.add_(_SPREAD * torch.randn_like(parameter))
    return guide
