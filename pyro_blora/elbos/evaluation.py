"""One evaluation of an ELBO: the guide has been run, and the model can be run at any gates.

Shapes: M components of the guide; z (L, T, K), g (L, R - 1).   Units: nats.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from ..gates import Gates

JOINT = "joint"  # the guide's auxiliary site where its gates are dependent
_GATES = ("z", "g")
Program = Callable[..., Any]  # of Pyro: a model, or a guide
Distributions = Gates[dist.TorchDistribution]
Draw = Callable[[dist.TorchDistribution], Tensor]
Sites = dict[str, Any]  # what Pyro traces of each, by name


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
        joint, apart = self.divergence(prior), [_masked(kl_divergence(q, p), mask) for q, p, mask in sites]
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


def _masked(kl: Tensor, mask: Tensor | None) -> Tensor:
    return (kl if mask is None else torch.where(mask, kl, 0.0)).sum()


class _Drawn(Messenger):
    """Gate sites get their values from `draw(distribution)`."""

    def __init__(self, draw: Draw):
        super().__init__()
        self.draw = draw

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in _GATES and msg["value"] is None:
            msg["value"] = self.draw(msg["fn"])


class Evaluation:
    """The guide has been run; the model can be run at any gates.

    args, kwargs: of both. draw: how a gate site of the guide gets its value. component: of a guide that has several,
    the first to draw from; None where the guide draws one.
    """

    def __init__(
        self, model: Program, guide: Program, args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}), *, draw: Draw, component: int | None,
    ):  # fmt: skip
        self.model, self.guide, self.args, self.kwargs, self.draw = model, guide, args, kwargs, draw
        self.drawn = self._run_guide(guide, component)
        latent = {name: site for name, site in self.drawn.items() if _is_latent(site)}
        self.shared = {name: site["value"] for name, site in latent.items() if name not in _GATES}
        self.scored: Sites = {}  # of the model's latest run

    def _run_guide(self, guide: Program, component: int | None) -> Sites:
        more = {} if component is None else {"component": component}
        return sites_of(_Drawn(self.draw)(guide), *self.args, **self.kwargs, **more)

    @property
    def joint(self) -> JointDivergence | None:
        """The auxiliary site, where gates are dependent."""
        return self.drawn[JOINT]["fn"] if JOINT in self.drawn else None

    @property
    def held(self) -> bool:
        """Whether the gates were given (`poutine.condition`)."""
        return bool(self.drawn["z"]["is_observed"])

    @property
    def distributions(self) -> Distributions:
        """The distributions that the guide's gate sites have."""
        return Gates(*(self.drawn[site]["fn"] for site in _GATES))

    @property
    def gates(self) -> Gates[Tensor]:
        """The drawn gates."""
        return Gates(*(self.drawn[site]["value"] for site in _GATES))

    def gates_of(self, component: int) -> Gates[Tensor]:
        """A draw from another component, at the same weights and settings of the prior."""
        drawn = self._run_guide(poutine.condition(self.guide, data=self.shared), component)
        return Gates(*(drawn[site]["value"] for site in _GATES))

    @property
    def components(self) -> int:
        """Of the guide, which `joint` knows where there are several."""
        return 1 if self.joint is None else self.joint.components

    def mean_over_components(self, nll: Callable[[Gates[Tensor], int], Tensor]) -> Tensor:
        """The mean of nll(gates, component) over a draw of each component of a mixture, or over the one draw."""
        total = nll(self.gates, 0)
        for component in range(1, self.components):
            total = total + nll(self.gates_of(component), component)
        return total / self.components

    def run_model(self, gates: Gates[Tensor]) -> Sites:
        """Run the model at given gates, and at the guide's draws of all other sites."""
        given = poutine.condition(self.model, data={**self.shared, **gates._asdict()})
        self.scored = sites_of(given, *self.args, **self.kwargs)
        return self.scored

    def nll(self, gates: Gates[Tensor]) -> Tensor:
        """Mean NLL of the batch at given gates, nats per example."""
        return mean_nll(self.run_model(gates))

    def divergences(self) -> dict[str, Tensor]:
        """KL(guide || prior) by site, nats, after a run of the model."""
        found: dict[str, Tensor] = {}
        if self.joint is not None:
            found |= self.joint.divergence(Gates(*(self.scored[site]["fn"] for site in _GATES)))._asdict()
        for name in (*_GATES, *self.shared):
            if name not in found:
                site = self.drawn[name]
                found[name] = _masked(closed_form_kl(name, site["fn"], self.scored[name]["fn"]), site["mask"])
        return found

    def scale(self, name: str) -> float:
        """The weight of the KL of a site of the guide; 0 for gates that were given."""
        if name in _GATES and self.held:
            return 0.0
        return float(self.drawn[name]["scale"]) if name in self.drawn else 1.0

    @property
    def examples(self) -> int:
        """N, as the model's plate of examples has it."""
        (plate,) = self.scored["label"]["cond_indep_stack"]
        return int(plate.full_size)


def sites_of(function: Program, *args: Any, **kwargs: Any) -> Sites:
    """The sites of one run of a model or a guide, by name."""
    return dict(poutine.trace(function).get_trace(*args, **kwargs).nodes)


def unused(distribution: dist.TorchDistribution) -> Tensor:
    """A placeholder value for a gate site that is not used: no random number is drawn."""
    return torch.zeros(distribution.shape())


def _is_latent(site: Any) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def mean_nll(model: Sites) -> Tensor:
    """Mean NLL of the batch in a run of the model, nats per example."""
    label = model["label"]
    nll: Tensor = -label["fn"].log_prob(label["value"]).mean()
    return nll
