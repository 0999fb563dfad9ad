"""Distributions of the adapter's weights theta, one vector of D numbers, by name.

They are chosen as `--weights NAME --weights.SETTING VALUE`.

One is made by `(weights, head, **settings)`: the parameters of adapter and task head, by key. It is an `nn.Module`. The
mean of theta is the net's own parameters, so that what trains is what is exported; the task head is a point.

    random                      the keys of theta's parts, in order; none: theta is a point
    law() and prior()           if `in_training`: the guide's law of theta and its prior, of one event dimension
    divergence()                KL(law || prior), nats; 0 where training has a point
    kl_weight                   its weight in the loss; below 1: a cold posterior of the weights
    draw(S)                     (S, D) draws of what was learned
    stored                      numbers that are kept to draw from it, the mean included
    constant_from, plateau      SWAG: from which fraction of the steps the learning rate stays, and at which of its peak
    require(steps, opening)     SWAG: called before the first step, to refuse what is too short
    collect(step, steps)        SWAG: called after each step
    finish()                    SWAG: called after the last
    curvature                   Laplace: the structure that laplace_fit.py fits when training has ended
    linearized                  predictions are those of the network linearized at the mean

`ensemble` and `dropout` are random in more than theta, and what makes them so is in the configuration (run_config.py).
Register a distribution with `@register_weights`. Shapes: D random weights, S draws, K deviations.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..registry import Registry

Parameters = Mapping[tuple[int, str], nn.Parameter]  # by (projection, "lora_A", "lora_B" or "core")
WEIGHTS = Registry("weights")
register_weights = WEIGHTS.register
Sides = Literal["lora_A", "both"]
Members = Literal["point", "gaussian", "low_rank", "swag", "laplace"]


class Point(nn.Module):
    """Nothing is random."""

    in_training = linearized = False
    constant_from, curvature, kl_weight = 1.0, None, 1.0

    def __init__(self, weights: Parameters, head: Parameters | None = None):
        super().__init__()
        self.follow(weights, head or {})
        self.size = sum(p.numel() for p in weights.values())

    def follow(self, weights: Parameters, head: Mapping) -> None:
        """Take these parameters, which are the net's, for theta's mean and the head."""
        held = self.__dict__.get("_parts", weights)  # in the dict: this module does not own them
        self.__dict__["_parts"] = {key: weights[key] for key in held}
        self.__dict__["_head"] = dict(head)

    @property
    def parameters_of_net(self) -> list[nn.Parameter]:
        """theta's mean, where its law is learned."""
        return list(self._parts.values()) if self.in_training else []

    @property
    def random(self) -> tuple:
        return ()

    @property
    def stored(self) -> int:
        return self.size

    @property
    def mean(self) -> Tensor:
        """theta's mean, (D,): differentiable in the net's parameters."""
        return torch.cat([p.flatten() for p in self._parts.values()])

    def split(self, theta: Tensor) -> dict:
        """The parts of theta (..., D), by key."""
        sizes = [p.numel() for p in self._parts.values()]
        parts = zip(self._parts.items(), theta.split(sizes, -1), strict=True)
        return {key: part.unflatten(-1, p.shape) for (key, p), part in parts}

    def divergence(self) -> Tensor | float:
        return 0.0


class RandomWeights(Point):
    """All weights that are given are random."""

    def __init__(self, weights: Parameters, head: Parameters | None = None):
        if not weights:
            raise ValueError(
                "this law of the weights needs an adapter whose weights can be random: --adapter lora or xs"
            )
        super().__init__(weights, head)

    @property
    def random(self) -> tuple:
        return tuple(self._parts)


def random_sides(weights: Parameters, sides: Sides) -> Parameters:
    chosen = {key: p for key, p in weights.items() if key[1] == "lora_A"}
    return chosen if sides == "lora_A" and chosen else weights  # an XS adapter has its core only


@register_weights("point")
def point(weights: Parameters, head: Parameters) -> Point:
    """Trained weights, nothing random but the gates."""
    return Point(weights)


@register_weights("ensemble")
def ensemble(weights: Parameters, head: Parameters, *, members: int = 3, of: Members = "point") -> Point:
    """Fits from several seeds, whose predicted probabilities are averaged; the first is exported.

    Settings: members; of, the law of each of them, with its own default settings: of laplace a mixture of Laplace
    approximations, of swag MultiSWAG; of dropout masks with --average_over dropout.
    Source: Lakshminarayanan et al., Deep ensembles (2017); Eschenhagen et al., Mixtures of Laplace approximations
    (2021); Wilson and Izmailov (2020).
    """
    if members < 2:
        raise ValueError(f"weights 'ensemble' needs at least 2 members, got {members}: one is weights 'point'")
    return build_weights(of, weights, head)


@register_weights("dropout")
def dropout(weights: Parameters, head: Parameters) -> Point:
    """Predictions average over dropout masks, the same as --average_over dropout.

    Source: Gal and Ghahramani (2016).
    """
    return Point(weights)


def build_weights(name: str, weights: Parameters, head: Parameters, settings: dict | None = None) -> Point:
    """The named law of the weights.  Errors: ValueError for an unknown name or setting, or for nothing to be random."""
    function = WEIGHTS.resolve(name)
    checked = WEIGHTS.settings(function, settings or {})
    law = function(weights, head, **checked)
    if not isinstance(law, nn.Module) or not hasattr(law, "random"):
        raise ValueError(f"weights {name!r} must return an nn.Module as in weights/base.py, got {type(law).__name__}")
    return law
