"""Mean-field guides: independent ladders, relaxed nested Bernoullis or one allocation."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..gates import Gates, NestedBernoulli, RelaxedNestedBernoulli
from ..layout import AdapterLayout
from ..registries import register_guide
from .base import LogBayesFactors


class MeanField(LogBayesFactors):
    """Independent ladders, sampled as relaxed nested Bernoullis."""

    def distributions(self, temperature: float | Tensor, hard: bool) -> Gates[dist.TorchDistribution]:
        return Gates(*(RelaxedNestedBernoulli(x[0], temperature, hard, validate_args=False) for x in self.logits()))

    def posterior(self) -> Gates[NestedBernoulli]:
        return Gates(*(RelaxedNestedBernoulli(x[0], 1.0, validate_args=False).discrete for x in self.logits()))


class Point(LogBayesFactors):
    """One state of each ladder: a gate is open where the product up to it exceeds 1/2; KL = -log prior."""

    is_natural = False

    def _deployed(self, logits: Tensor) -> Tensor:
        soft = torch.sigmoid(logits[0]).cumprod(-1)
        return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())  # in this order: exactly 0 or 1

    def distributions(self, temperature: float | Tensor, hard: bool) -> Gates[dist.TorchDistribution]:
        return Gates(*(dist.Delta(self._deployed(x), event_dim=1, validate_args=False) for x in self.logits()))

    def posterior(self) -> Gates[NestedBernoulli]:
        return Gates(*(NestedBernoulli(self._deployed(x).detach().log(), validate_args=False) for x in self.logits()))

    def components(self) -> Gates[NestedBernoulli]:
        return Gates(*(NestedBernoulli(q.log_probs[None], validate_args=False) for q in self.posterior()))


@register_guide("mean_field", proposes={"estimator": "gauss_newton"})
def mean_field(layout: AdapterLayout, prior: nn.Module, *, open_logit: float | None = None) -> MeanField:
    """Independent relaxed nested Bernoullis, one per ladder; KL in closed form.

    Settings: open_logit, the log-odds at which every gate starts (default: estimated from the data, gate_init.py).
    """
    return MeanField(layout, prior, open_logit)


@register_guide("point")
def point(layout: AdapterLayout, prior: nn.Module, *, open_logit: float | None = None) -> Point:
    """A single allocation (maximum a posteriori), learned with straight-through gradients.

    Settings: open_logit, the log-odds at which every gate starts (default: estimated from the data, gate_init.py).
    """
    return Point(layout, prior, open_logit)
