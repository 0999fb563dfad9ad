"""One reparametrized draw of the gates: Pyro's `TraceMeanField_ELBO` where the guide is a mean field.

Of a mixture every component is drawn from, as one alone would be M times noisier.
"""

from torch import Tensor

from ..registries import register_elbo
from .base import Draws, Evaluation, GateELBO


@register_elbo("relaxed")
class Relaxed(GateELBO):
    """One soft draw of each component. Source: Maddison et al., Jang et al. (2017)."""

    draws: Draws = "soft"
    first = 0

    def expected_nll(self, at: Evaluation) -> Tensor:
        return at.mean_over_components(lambda gates, component: at.nll(gates))


@register_elbo("straight_through")
class StraightThrough(Relaxed):
    """One hard draw of each component with the gradient of the soft one. Source: Bengio et al. (2013)."""

    draws = "hard"
