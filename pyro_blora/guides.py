"""Variational families of the gates, by name.

A guide is an `nn.Module`, made by `(layout, prior, **settings)` where `prior` is the prior's Gates, with

    laws(temperature, hard) -> Gates    what is sampled in training: reparametrised, with a KL against NestedBernoulli
    posterior() -> Gates                the discrete laws, the only ones that are reported or deployed
    start(depth_logits)                 optional, called if `starts_from_data`: set the laws from an estimate of what
                                        the data say about each chain (starting.py)

Gates that the prior pins (probability 0 or 1) are held there: the posterior cannot differ. Register a guide with
`@register_guide`, or name it as `--guide file.py:function`.
"""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .gates import Gates, NestedBernoulli, RelaxedNestedBernoulli, pinned_logits
from .layout import AdapterLayout
from .registry import Registry

GUIDES = Registry("guide")
register_guide = GUIDES.register
_LARGEST_LOGIT = 6.0  # q(1 - q) = 0.0025: still enough gradient for a gate to come back


class _Logits(nn.Module):
    """Free conditional log-odds for each gate, with the prior's pins laid over them."""

    def __init__(self, layout: AdapterLayout, prior: Gates, open_logit: float | None):
        super().__init__()
        logit = _LARGEST_LOGIT if open_logit is None else float(open_logit)
        self.z_logits = nn.Parameter(torch.full(layout.z_shape, logit))  # (L, T, K)
        self.g_logits = nn.Parameter(torch.full(layout.g_shape, logit))  # (L, R - 1)
        self.register_buffer("z_pins", pinned_logits(prior.z.log_probs.detach()), persistent=False)
        self.register_buffer("g_pins", pinned_logits(prior.g.log_probs.detach()), persistent=False)
        self.free = Gates(bool(self.z_pins.isnan().any()), bool(self.g_pins.isnan().any()))  # is anything random?
        self.starts_from_data = any(self.free) and open_logit is None

    def logits(self) -> Gates:
        z = torch.where(self.z_pins.isnan(), self.z_logits, self.z_pins) if self.free.z else self.z_pins
        g = torch.where(self.g_pins.isnan(), self.g_logits, self.g_pins) if self.free.g else self.g_pins
        return Gates(z, g)

    def start(self, depth_logits: Gates) -> None:
        """Set each chain's law to softmax(depth_logits) over its depth.  z (L, T, K + 1), g (L, R)."""
        for parameter, logits in zip((self.z_logits, self.g_logits), depth_logits, strict=True):
            law = NestedBernoulli.from_depth_logits(logits.double())
            log_odds = (law.log_probs - law.log_probs_closed).nan_to_num(0.0)
            with torch.no_grad():
                parameter.copy_(log_odds.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT))


class MeanField(_Logits):
    """Every gate has log-odds of its own given its parent; sampled as relaxed nested Bernoullis."""

    def laws(self, temperature: float, hard: bool) -> Gates:
        z, g = self.logits()
        law = RelaxedNestedBernoulli
        return Gates(law(z, temperature, hard, validate_args=False), law(g, temperature, hard, validate_args=False))

    def posterior(self) -> Gates:
        return Gates(*(RelaxedNestedBernoulli(x, 1.0, validate_args=False).discrete for x in self.logits()))


class Point(_Logits):
    """One chain for each tensor and adapter, gates open where their product exceeds 1/2; KL = -log prior."""

    def _chain(self, logits: Tensor) -> Tensor:
        soft = torch.sigmoid(logits).cumprod(-1)
        return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())  # in this order: exactly 0 or 1

    def laws(self, temperature: float, hard: bool) -> Gates:
        return Gates(*(dist.Delta(self._chain(x), event_dim=1, validate_args=False) for x in self.logits()))

    def posterior(self) -> Gates:
        return Gates(*(NestedBernoulli(self._chain(x).detach().log(), validate_args=False) for x in self.logits()))


@register_guide("mean_field")
def mean_field(layout: AdapterLayout, prior: Gates, *, open_logit: float | None = None) -> MeanField:
    """Independent relaxed nested Bernoullis, one log-odds a gate; KL in closed form.

    Settings: open_logit, the log-odds at which every gate starts (default: estimated from the data, starting.py).
    """
    return MeanField(layout, prior, open_logit)


@register_guide("point")
def point(layout: AdapterLayout, prior: Gates, *, open_logit: float | None = None) -> Point:
    """A single allocation (maximum a posteriori), learned with straight-through gradients.

    Settings: open_logit, the log-odds at which every gate starts (default: estimated from the data, starting.py).
    """
    return Point(layout, prior, open_logit)


def build_guide(name: str, layout: AdapterLayout, prior: Gates, settings: dict | None = None) -> nn.Module:
    """The named guide on a layout and a prior.  Errors: ValueError for an unknown name, setting or a wrong kind."""
    function = GUIDES.resolve(name)
    guide = function(layout, prior, **GUIDES.settings(function, settings or {}))
    missing = [method for method in ("laws", "posterior") if not hasattr(guide, method)]
    if not isinstance(guide, nn.Module) or missing:
        raise ValueError(f"guide {name!r} must return an nn.Module with laws() and posterior(); missing: {missing}")
    return guide
