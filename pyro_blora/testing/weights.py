"""What a distribution of the adapter's weights must keep."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..registries import WEIGHTS
from ..weights.base import Parameters, Weights, build_weights
from .promises import Refuse, refusing, tried

_STEPS = 100  # of the path that is passed through
_SHAPES = {(0, "lora_A"): (2, 5), (0, "lora_B"): (4, 2), (1, "lora_A"): (2, 4), (1, "lora_B"): (3, 2)}


def check_weights(weights: str | Callable, settings: dict | None = None) -> Weights:
    """Refuse a distribution of the weights that breaks a promise, with a sentence that names it; returns it, built.

    weights: a registered name, `file.py:function`, or the function itself. What Laplace fits when a training has ended
    (`curvature`) is not tried.
    Errors: ValueError naming it, what is wrong and the remedy.
    """
    refuse = refusing(WEIGHTS, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters, head = _parameters(), {0: nn.Parameter(torch.randn(2, 3))}
        built = build_weights(weights, parameters, head, settings)  # refuses what is no Weights
        _check_theta(built, parameters, refuse)
        if built.in_training:
            _check_distribution(built, parameters, refuse)
        tried(lambda: built.require(_STEPS, 0), "require(steps, opening)", refuse)
        for step in range(1, _STEPS + 1):
            for parameter in parameters.values():
                parameter.data.add_(0.01 * torch.randn_like(parameter))
            tried(functools.partial(built.collect, step, _STEPS), "collect(step, steps)", refuse)
        tried(built.finish, "finish()", refuse)
        if built.random and not built.curvature:
            _check_draws(built, refuse)
            _check_state(built, parameters, lambda other: build_weights(weights, other, head, settings), refuse)
    return built


def _parameters() -> Parameters:
    return {key: nn.Parameter(torch.randn(shape)) for key, shape in _SHAPES.items()}


def _check_theta(built: Weights, parameters: Parameters, refuse: Refuse) -> None:
    if not set(built.random) <= parameters.keys():
        refuse(f"random has keys that it was not given: choose among {sorted(parameters)}")
    if built.stored < built.size:
        refuse(f"stored is {built.stored}, less than the {built.size} numbers of the mean: count those, too")
    parts = built.split(built.mean)
    if not all(torch.equal(part, parameters[key]) for key, part in parts.items()):
        refuse("split(mean) are not the parameters that it was given: their values are the mean of theta")
    if built.random and type(built).draw is Weights.draw:
        refuse(f"it is random in {len(built.random)} parts and has no draw(S): return (S, {built.size}) draws of theta")
    if built.in_training and not built.random:
        refuse("it is in_training and nothing is random: subclass RandomWeights")


def _check_distribution(built: Weights, parameters: Parameters, refuse: Refuse) -> None:
    """Check what SVI needs of a learned distribution."""
    for name in ("distribution", "prior"):
        found = tried(built.distribution if name == "distribution" else built.prior, f"{name}()", refuse)
        if tuple(found.event_shape) != (built.size,) or tuple(found.batch_shape) != ():
            refuse(
                f"{name}() has batch shape {tuple(found.batch_shape)} and event shape {tuple(found.event_shape)}, "
                f"expected () and ({built.size},): end with .to_event(1)"
            )
    distribution, divergence = built.distribution(), tried(built.divergence, "divergence()", refuse)
    if not distribution.has_rsample:
        refuse(
            f"distribution() is a {type(distribution).__name__}, which has no reparametrized draw (rsample): SVI "
            "needs its gradient"
        )
    if not isinstance(divergence, Tensor) or divergence.shape != () or not bool(divergence.isfinite()):
        refuse("divergence() must be KL(distribution() || prior()), one finite number () in nats, as a tensor")
    learning = [*built.parameters(), *(parameters[key] for key in built.random)]
    for what, value in (("KL", divergence), ("draw", distribution.rsample().square().sum())):
        slopes = torch.autograd.grad(value, learning, allow_unused=True) if value.requires_grad else [None]
        if any(slope is None or not bool(slope.isfinite().all()) for slope in slopes):
            refuse(f"the {what} has no finite gradient in some of its parameters or of the mean: use them, undetached")
    if not built.kl_weight > 0:
        refuse(f"kl_weight is {built.kl_weight}, expected a positive number: 1 is the ELBO")


def _check_draws(built: Weights, refuse: Refuse) -> None:
    drawn = tried(lambda: _drawn(built), "draw(4)", refuse)
    if tuple(drawn.shape) != (4, built.size) or drawn.dtype != torch.float32:
        refuse(
            f"draw(4) has shape {tuple(drawn.shape)} and {drawn.dtype}, expected (4, {built.size}) and torch.float32"
        )
    if not bool(drawn.isfinite().all()):
        refuse("draw(4) is not finite: keep variances positive, and wait with divisions until there are enough numbers")
    if torch.equal(drawn[0], drawn[1]):
        refuse("two draws are the same: a distribution without any spread is a Point")
    if not torch.equal(drawn, _drawn(built)):
        refuse("draws differ from the same seed: draw with torch's global generator, so that a run can be repeated")


def _check_state(built: Weights, parameters: Parameters, rebuilt: Callable, refuse: Refuse) -> None:
    twin = rebuilt({key: nn.Parameter(p.detach().clone()) for key, p in parameters.items()})
    twin.load_state_dict(built.state_dict())
    if not torch.equal(_drawn(built), _drawn(twin)):
        refuse("draws are others after load_state_dict: hold what is learned or collected in parameters or buffers")


@torch.no_grad()
def _drawn(built: Weights) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return built.draw(4)
