"""Distributions of the adapter's weights theta, one vector of D numbers, by name.

They are chosen as `--weights NAME --weights.SETTING VALUE`. One is made by a function `(weights, head, **settings)`, of
the parameters of adapter and task head by key, which returns a `Weights`. The mean of theta is the net's own
parameters, so that the trained weights are the exported ones; the task head is a point. Register the function with
`@register_weights("name")`, or name it as `--weights file.py:function`. The decorator may also declare other
fields of the configuration that it sets or excludes (`registry_entries.Entry`).

`ensemble` and `dropout` are random in more than theta, and what makes them so is in the configuration (run_config.py).
Shapes: D random weights, S draws, K deviations.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..registries import WEIGHTS, register_weights
from ..registry import undefined

Key = tuple[int, str]  # (projection, "lora_A", "lora_B" or "core")
Parameters = Mapping[Key, nn.Parameter]
Head = Mapping[Any, nn.Parameter]  # by whatever
Sides = Literal["lora_A", "both"]


def whole_steps(fraction: float, steps: int) -> int:
    """So many of the steps, rounded down; .7 of 90 is 63, though a little less in floating point."""
    return math.floor(fraction * steps + 1e-6)


class Weights(nn.Module):
    """theta and its distribution; the defaults are those of a point.

    Where theta is random (`RandomWeights`): `draw` and `stored`. Where its distribution is learned by SVI
    (`in_training`): `distribution`, `prior` and `divergence`, too. Where it is fitted to the training's path:
    `collect` and `finish`. What is learned or fitted is in parameters and buffers, so that it is in checkpoints.

    Units: KLs in nats.
    """

    in_training = False
    """Whether theta is a site of the program: drawn in every step, from `distribution`."""
    linearized = False
    """Whether predictions are those of the network linearized at theta's mean."""
    curvature: str | None = None
    """Laplace: the structure that laplace_fit.py fits when training has ended."""
    kl_weight = 1.0
    """Of the divergence in the loss; below 1: a cold posterior of the weights."""
    constant_from = 1.0
    """The fraction of the steps from which the learning rate stays."""
    plateau = 1.0
    """The fraction of its peak at which it then stays."""
    _parts: dict[Key, nn.Parameter]
    _head: dict[Any, nn.Parameter]

    def __init__(self, weights: Parameters, head: Head | None = None):
        super().__init__()
        self.follow(weights, head or {})
        self.size = sum(p.numel() for p in weights.values())

    # --- theta --------------------------------------------------------------------------------------------------------

    def follow(self, weights: Parameters, head: Head) -> None:
        """Take these parameters, which are the net's, for theta's mean and the head."""
        held = self.__dict__.get("_parts", weights)  # in the dict: this module does not own them
        self.__dict__["_parts"] = {key: weights[key] for key in held}
        self.__dict__["_head"] = dict(head)

    @property
    def parameters_of_net(self) -> list[nn.Parameter]:
        """theta's mean, where its distribution is learned."""
        return list(self._parts.values()) if self.in_training else []

    @property
    def random(self) -> tuple[Key, ...]:
        """The keys of theta's parts, in order; none: theta is a point."""
        return ()

    @property
    def mean(self) -> Tensor:
        """theta's mean, (D,): differentiable in the net's parameters."""
        return torch.cat([p.flatten() for p in self._parts.values()])

    def split(self, theta: Tensor) -> dict[Key, Tensor]:
        """The parts of theta (..., D), by key."""
        sizes = [p.numel() for p in self._parts.values()]
        parts = zip(self._parts.items(), theta.split(sizes, -1), strict=True)
        return {key: part.unflatten(-1, p.shape) for (key, p), part in parts}

    # --- its distribution ---------------------------------------------------------------------------------------------

    def distribution(self) -> torch.distributions.Distribution:
        """The guide's distribution of theta, of one event dimension (D,), reparametrized."""
        raise undefined(self, "distribution")

    def prior(self) -> torch.distributions.Distribution:
        """The prior of theta, as `distribution`."""
        raise undefined(self, "prior")

    def divergence(self) -> Tensor | float:
        """KL(q || prior) of theta's distribution q, nats; 0 where training has a point."""
        return 0.0

    def draw(self, draws: int) -> Tensor:
        """(S, D) draws of what was learned or fitted."""
        raise undefined(self, "draw")

    @property
    def stored(self) -> int:
        """Numbers that are kept to draw from it, the mean included."""
        return self.size

    # --- training -----------------------------------------------------------------------------------------------------

    def require(self, steps: int, opening: int) -> None:
        """Called before the first step, to refuse a training of `steps` steps, whose gates start at `opening`."""

    def collect(self, step: int, steps: int) -> None:
        """Called after each step, from 1 to `steps`."""

    def finish(self) -> None:
        """Called after the last one, and again where a finished training is taken up."""


class Point(Weights):
    """Nothing is random."""


class RandomWeights(Weights):
    """All weights that are given are random."""

    def __init__(self, weights: Parameters, head: Head | None = None):
        if not weights:
            raise ValueError(
                "this distribution of the weights needs an adapter whose weights can be random: --adapter lora or xs"
            )
        super().__init__(weights, head)

    @property
    def random(self) -> tuple[Key, ...]:
        return tuple(self._parts)


def random_sides(weights: Parameters, sides: Sides) -> Parameters:
    chosen = {key: p for key, p in weights.items() if key[1] == "lora_A"}
    return chosen if sides == "lora_A" and chosen else weights  # an XS adapter has its core only


@register_weights("point")
def point(weights: Parameters, head: Head) -> Point:
    """Trained weights, nothing random but the gates."""
    return Point(weights)


@register_weights(
    "ensemble", fits="members", each="of",
    excludes={"restarts": "the members of --weights ensemble are restarts already: drop --restarts"},
)  # fmt: skip
def ensemble(weights: Parameters, head: Head, *, members: int = 3, of: str = "point") -> Weights:
    """Fits from several seeds, whose predicted probabilities are averaged; the first is exported.

    Settings: members; of, the distribution of each of them, with its own default settings: of laplace a mixture of
    Laplace approximations, of swag MultiSWAG; of dropout masks with --average_over dropout.
    Source: Lakshminarayanan et al., Deep ensembles (2017); Eschenhagen et al., Mixtures of Laplace approximations
    (2021); Wilson and Izmailov (2020).
    """
    if members < 2:
        raise ValueError(f"weights 'ensemble' needs at least 2 members, got {members}: one is weights 'point'")
    return build_weights(of, weights, head)


@register_weights("dropout", sets={"average_over": "dropout"})
def dropout(weights: Parameters, head: Head) -> Point:
    """Predictions average over dropout masks, the same as --average_over dropout.

    Source: Gal and Ghahramani (2016).
    """
    return Point(weights)


def build_weights(
    name: str | Callable[..., Weights], weights: Parameters, head: Head, settings: dict | None = None
) -> Weights:
    """The named distribution.  Errors: ValueError for an unknown name or setting, or for nothing to be random."""
    function = WEIGHTS.resolve(name)
    found = function(weights, head, **WEIGHTS.settings(function, settings or {}))
    if not isinstance(found, Weights):
        raise ValueError(
            f"weights {WEIGHTS.called(name)!r} must return a pyro_blora.weights.Weights, got {type(found).__name__}: "
            "subclass it, or RandomWeights"
        )
    return found
