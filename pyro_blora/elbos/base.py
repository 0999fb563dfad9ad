"""The negative ELBO of a model and a guide over gates as a `pyro.infer` ELBO, and ELBOs by name: `--estimator NAME`.

`GateELBO` is a kind of Pyro's `TraceMeanField_ELBO`, with the KL divergence of the discrete distributions in closed
form; a subclass defines how the expected NLL and its gradient are estimated, from an `Evaluation`, in which the guide
has been run and the model can be run at any gates. Pyro's class reads the loss on the host, which synchronizes with
the GPU, and does not return the terms of the ELBO. Register a subclass, or another class with the methods of the
protocol `Elbo`, with `@register_elbo`.
Shapes: N training examples, M components of the guide; z (L, T, K), g (L, R - 1).   Units: nats.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import warn_if_nan
from torch import Tensor, nn

from ..gates import Gates
from ..guides.base import Guide
from ..registries import ELBOS
from ..registry import undefined
from .divergences import JOINT, Distributions, JointDivergence, closed_form_kl, masked

_GATES = Gates._fields
Program = Callable[..., Any]  # of Pyro: a model, or a guide
Draw = Callable[[dist.TorchDistribution], Tensor]
Sites = dict[str, Any]  # what Pyro traces of each, by name
Draws = Literal["soft", "hard", "discrete"]  # of the guide: relaxed, straight-through, or without a gradient


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of one estimate of the negative ELBO.

    nll: the batch's mean, nats per example. kl_*: nats; a prior's random settings count with kl_z. n_train: N.
    *_weight: of the KLs; below 1 the posterior is cold, at 0 the gates are fixed. teacher_kl: of distillation,
    nats per example, for the log: `loss` is without it.
    """

    nll: Tensor
    kl_z: Tensor
    kl_g: Tensor
    kl_theta: Tensor | float
    n_train: int
    gate_weight: float = 1.0
    theta_weight: float = 1.0
    teacher_kl: Tensor | float = 0.0

    @property
    def loss(self) -> Tensor:
        """-ELBO / N, nats per example."""
        kl = self.gate_weight * (self.kl_z + self.kl_g) + self.theta_weight * self.kl_theta
        return self.nll + kl / self.n_train


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
                found[name] = masked(closed_form_kl(name, site["fn"], self.scored[name]["fn"]), site["mask"])
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


@runtime_checkable
class Elbo(Protocol):
    """The protocol of an ELBO; `pyro.infer.SVI` calls the last three methods."""

    draws: Draws

    def check(self, family: Guide) -> None:
        """Refuse a guide that it cannot serve, before anything is trained.  Errors: ValueError."""

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """The terms at one draw, differentiable; no value is read on the host."""

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """-ELBO, nats: N times the terms' loss."""

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float: ...

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float: ...


class GateELBO(TraceMeanField_ELBO):
    """-ELBO with the KL in closed form; a subclass defines how the NLL is averaged over the gates.

    For the model and the guide of a `GateProgram`. No value is read on the host before the loss itself.
    """

    draws: Draws = "hard"
    needs_curvature = False  # whether `take_curvature` is called when the gates start
    natural = False  # whether the gradient that reaches the guide's log Bayes factors is the natural one
    first: int | None = None  # the first component to draw from; None: the guide draws one

    def __init__(self) -> None:
        super().__init__()

    def check(self, family: Guide) -> None:
        """Refuse a guide that it cannot serve.  Errors: ValueError."""

    def take_curvature(self, curvature: Gates[Tensor]) -> None:
        """Take the mean products of examples' changes of NLL at two depths.  z (L, T, K + 1, K + 1), g (L, R, R)"""
        raise undefined(self, "take_curvature")

    def draw(self, distribution: dist.TorchDistribution) -> Tensor:
        """The value of a gate site of the guide."""
        value: Tensor = distribution()
        return value

    def expected_nll(self, at: Evaluation) -> Tensor:
        """E_q[NLL], nats per example, whose gradient reaches the guide and all that the NLL depends on."""
        raise undefined(self, "expected_nll")

    def divergences(self, at: Evaluation) -> dict[str, Tensor]:
        """KL(guide || prior) by site, nats, after a run of the model."""
        return at.divergences()

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """See `Elbo`. Where the gates are given (`poutine.condition` of model and guide), their KL has weight 0."""
        at = Evaluation(model, guide, args, kwargs, draw=self.draw, component=self.first)
        nll = at.nll(at.gates) if at.held else self.expected_nll(at)
        kl = self.divergences(at)
        kl_z, kl_g, kl_theta = kl.pop("z"), kl.pop("g"), kl.pop("theta", 0.0)
        kl_z = kl_z + sum(kl.values())  # of the prior's random settings
        return Terms(nll, kl_z, kl_g, kl_theta, at.examples, at.scale("z"), at.scale("theta"))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """-ELBO, nats, in double precision: divided by N it is the terms' loss to the bit, and so is its gradient."""
        terms = self.terms(model, guide, *args, **kwargs)
        return terms.loss.double() * terms.n_train

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        return float(self.differentiable_loss(model, guide, *args, **kwargs).item())

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        warn_if_nan(loss, "loss")
        return float(loss.item())


def build_elbo(name: str, family: Guide, settings: dict[str, Any] | None = None) -> Elbo:
    """The named ELBO.

    Errors: ValueError for an unknown name or setting, for another object than an ELBO, and for a guide that it cannot
    serve.
    """
    make = ELBOS.resolve(name)
    name = ELBOS.called(name)
    wanted = "it must be a subclass of pyro_blora.elbos.GateELBO, or a function of settings alone that makes one"
    parameters = inspect.signature(make).parameters.values()
    if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise ValueError(f"estimator {name!r} takes arguments: {wanted}")
    elbo = make(**ELBOS.settings(make, settings or {}))
    if not isinstance(elbo, Elbo):
        raise ValueError(f"estimator {name!r} makes a {type(elbo).__name__}, which is no ELBO of gates: {wanted}")
    if isinstance(elbo, nn.Module) and next(elbo.parameters(), next(elbo.buffers(), None)) is not None:
        raise ValueError(
            f"estimator {name!r} has parameters or buffers, which nothing trains and no checkpoint holds: put what is "
            "learned into a guide or a prior"
        )
    elbo.check(family)
    return elbo
