"""KL divergences of the guide from the prior, in closed form: of a site, and of a guide whose gates are dependent.

Shapes: z (L, T, K), g (L, R - 1).   Units: nats.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from ..gates import Gates

JOINT = "joint"  # the guide's auxiliary site where its gates are dependent
Distributions = Gates[dist.TorchDistribution]


class JointDivergence(dist.TorchDistribution):
    """The auxiliary site by which ELBOs take the KL of a guide whose gates are dependent.

    The sites have the distributions that were drawn, of a mixture those of one component. This one has no value; its
    log-density is the guide's KL less the sites', so that any ELBO of Pyro ends up with the guide's.
    family: the guide, with a `divergence`. distributions: of the sites. components: how many each ELBO draws
    from.
    """

    has_rsample = True
    arg_constraints = {}  # noqa: RUF012 (torch's own spelling of a class attribute)

    def __init__(
        self,
        family: Any,
        distributions: Distributions,
        prior: Callable[[], Distributions],
        masks: Gates[Tensor],
        *,
        components: int = 1,
    ):
        self.family, self.distributions, self.prior, self.masks, self.components = (
            family,
            distributions,
            prior,
            masks,
            components,
        )
        super().__init__(event_shape=torch.Size((0,)), validate_args=False)

    def divergence(self, prior: Distributions) -> Gates[Tensor]:
        """KL(guide || prior) of each site, nats; their sum is that of all gates."""
        found: Gates[Tensor] = self.family.divergence(prior, *self.masks)
        return found

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        return torch.empty(torch.Size(sample_shape) + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        prior = self.prior()
        sites = zip(self.distributions, prior, self.masks, strict=True)
        joint, apart = self.divergence(prior), [masked(kl_divergence(q, p), mask) for q, p, mask in sites]
        return joint.z + joint.g - apart[0] - apart[1]


def closed_form_kl(site: str, guide: Distribution, prior: Distribution) -> Tensor:
    """KL(guide || prior), nats.

    Errors: ValueError where none is registered: an estimate of it from relaxed draws would not make an ELBO.
    """
    try:
        return kl_divergence(guide, prior)
    except NotImplementedError:
        raise ValueError(
            f"site {site!r}: no KL divergence is registered for a guide's {type(guide).__name__} against a prior's "
            f"{type(prior).__name__}. Register the closed form with torch.distributions.register_kl (of relaxed gates "
            "that of the discrete ones), or use a guide whose gates are RelaxedNestedBernoulli"
        ) from None


def masked(kl: Tensor, mask: Tensor | None) -> Tensor:
    """The sum over the ladders that exist."""
    return (kl if mask is None else torch.where(mask, kl, 0.0)).sum()
