"""What a prior must keep."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from ..gates import Gates
from ..guides.base import build_guide
from ..layout import AdapterLayout
from ..priors.base import Prior
from ..priors.per_site import build_prior
from ..program import GateProgram
from ..registries import PRIORS
from ..tasks import get_task
from .promises import MOVES, REGISTER, Refuse, example_layout, refusing, when_moved


def check_prior(prior: str | Callable, layout: AdapterLayout | None = None, settings: dict | None = None) -> Prior:
    """Refuse a prior that breaks a promise, with a sentence that names it; returns the built module.

    prior: a registered name, `file.py:function`, or the function itself. layout: what to build it on (default:
    `example_layout()`).
    Errors: ValueError naming the prior, what is wrong and the remedy.
    """
    layout = example_layout() if layout is None else layout
    built = build_prior(prior, layout, settings)  # refuses wrong kinds, shapes and positive log-probabilities
    refuse = refusing(PRIORS, prior)
    distributions = built()
    for site, distribution, again in zip("zg", distributions, built(), strict=True):
        if not torch.equal(distribution.log_probs, again.log_probs):
            refuse(
                f"two calls gave different distributions of {site}: draw in pyro_model() and pyro_guide(), or "
                "once with a seed"
            )
    for site, distribution, twin in zip("zg", distributions, build_prior(prior, layout, settings)(), strict=True):
        if not torch.equal(distribution.log_probs, twin.log_probs):
            refuse(f"built twice, it gave different distributions of {site}: no run could be repeated; use a seed")
    _check_moves(built, refuse)
    _check_gradients(built, layout, refuse)
    _check_adapts(built, lambda: build_prior(prior, layout, settings), refuse)
    return built


class GatesAlone(GateProgram):
    """The model and the guide of the gates without a network: of use where only their KL is asked for."""

    def __init__(self, layout: AdapterLayout, prior: nn.Module, guide: nn.Module, *, n_train: int, **settings):
        outcome = get_task("sst2").likelihood  # of which nothing is asked
        super().__init__(layout, prior, guide, outcome, n_train=n_train, **settings)

    def logits(self, inputs, gates, theta=None):
        raise NotImplementedError("there is no network here: ask for the KL alone")


def _check_moves(prior: Prior, refuse: Refuse) -> None:
    for move in MOVES:
        (to,) = move.values()
        distributions = when_moved(prior, move, lambda prior: prior(), refuse)
        for site, distribution in zip("zg", distributions, strict=True):
            found = distribution.log_probs.device.type if "device" in move else distribution.log_probs.dtype
            if found != to:
                refuse(f"{site} stays on {found} when the module moves to {to}: {REGISTER}")


def _check_gradients(prior: Prior, layout: AdapterLayout, refuse: Refuse) -> None:
    """The KL of a guide reaches whatever the prior learns."""
    guide = build_guide("mean_field", layout, prior, {"open_logit": 1.0})
    try:
        kl = GatesAlone(layout, prior, guide, n_train=1, estimator="straight_through").kl()
    except KeyError as error:
        refuse(f"pyro_guide() samples the site {error}, which pyro_model() does not: sample the same sites in both")
    divergence = kl.z + kl.g
    if not bool(divergence.isfinite()):
        refuse("the KL of a guide from it is not finite: keep log-probabilities at 0 or above -1e30, or pin with -inf")
    learned = {name: parameter for name, parameter in prior.named_parameters() if parameter.requires_grad}
    if not learned:
        return
    slopes = torch.autograd.grad(divergence, [*learned.values()], allow_unused=True) if divergence.requires_grad else ()
    for name, slope in zip(learned, slopes or [None] * len(learned), strict=True):
        if slope is None:
            refuse(f"its parameter {name!r} gets no gradient from the KL: use it in forward(), without .detach()")
        if not bool(slope.isfinite().all()):
            refuse(f"the gradient of its parameter {name!r} is not finite: compute with logarithms")


def _check_adapts(prior: Prior, rebuilt: Callable[[], Prior], refuse: Refuse) -> None:
    """What `adapt` and `explain` change is in the state_dict, or a run that is resumed would forget it."""
    with torch.no_grad():
        moved = copy.deepcopy(prior)
        means = Gates(*(distribution.mean[None] for distribution in moved()))
        moved.adapt(means)
        L, ranks = means.g.shape[1:]
        moved.explain(torch.linspace(0.5, 0.1, ranks + 1).expand(L, -1))
        for site, distribution in zip("zg", moved(), strict=True):
            if not bool((distribution.log_probs <= 0).all()):
                refuse(f"after adapt() or explain() the log-probabilities of {site} must be <= 0 and not nan")
        fresh = rebuilt()
        fresh.load_state_dict(moved.state_dict())
        for site, distribution, restored in zip("zg", moved(), fresh(), strict=True):
            if not torch.equal(distribution.log_probs, restored.log_probs):
                refuse(f"what it changes in {site} is not in its state_dict: hold it with self.register_buffer")
    for name, value in moved.report().items():
        if not isinstance(value, int | float):
            refuse(f"report()[{name!r}] must be a number, got {type(value).__name__}: use .item()")
