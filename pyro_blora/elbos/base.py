"""The negative ELBO of a model and a guide over gates as a `pyro.infer` ELBO, and ELBOs by name: `--estimator NAME`.

`GateELBO` is a kind of Pyro's `TraceMeanField_ELBO`, with the KL divergence of the discrete distributions in closed
form; a subclass defines how the expected NLL and its gradient are estimated. Pyro's class reads the loss on the host,
which synchronizes with the GPU, and does not return the terms of the ELBO. Register a subclass, or another class with
the methods of the protocol `Elbo`, with `@register_elbo`.
Shapes: N training examples; z (L, T, K), g (L, R - 1).   Units: nats.
"""

import dataclasses
import inspect
from typing import Any, Literal, Protocol, runtime_checkable

import pyro.distributions as dist
from pyro.infer import TraceMeanField_ELBO
from pyro.util import warn_if_nan
from torch import Tensor

from ..gates import Gates
from ..guides.base import Guide
from ..registries import ELBOS
from ..registry import undefined
from .evaluation import Evaluation, Program

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
    elbo.check(family)
    return elbo
