"""The contract of a guide, for the ladders that exist: its values for the others are neither reported nor charged."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ..gates import Gates, NestedBernoulli, pinned_logits
from ..guides.base import Guide, build_guide, draw_gates, log_prob
from ..layout import AdapterLayout
from ..priors.per_site import build_prior
from ..registries import GUIDES
from .promises import MOVES, REGISTER, Refuse, example_layout, refusing, tried, when_moved

_TEMPERATURE = 0.5
_CLOSE = 1e-4  # of probabilities, which are sums of float32
_FLAT = 1e-5  # nats between depths of a flat prior: the KL of a point has no slope there


def check_guide(
    guide: str | Callable, layout: AdapterLayout | None = None, settings: dict | None = None, *,
    prior: str | Callable = "nested", prior_settings: dict | None = None,
) -> Guide:  # fmt: skip
    """Refuse a guide that breaks a promise, with a sentence that names it; returns the built module.

    guide: a registered name, `file.py:function`, or the function itself. layout: what to build it on (default:
    `example_layout()`). prior: what it is a guide for.
    Errors: ValueError naming the guide, what is wrong and the remedy.
    """
    layout = example_layout() if layout is None else layout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_prior(prior, layout, prior_settings)
        built = build_guide(guide, layout, module, settings)  # refuses what has no distributions() or no posterior()
        _Check(refusing(GUIDES, guide), layout, module()).everything(built)
    return built


class _Check:
    """All promises of one guide under one prior."""

    def __init__(self, refuse: Refuse, layout: AdapterLayout, prior: Gates):
        self.refuse, self.layout, self.prior = refuse, layout, prior
        self.masks, self.shapes = Gates(layout.z_mask, layout.g_mask), Gates(layout.z_shape, layout.g_shape)
        self.pins = Gates(*(torch.where(mask[..., None], pinned_logits(distribution.log_probs), torch.nan)
                            for distribution, mask in zip(prior, self.masks, strict=True)))  # fmt: skip

    def everything(self, guide: Guide) -> None:
        for hard in (True, False):
            self.distributions(guide, hard)
        self.gradient(guide)
        self.posterior(guide)
        self.joint(guide)
        self.moves(guide)
        for nats in (0.0, 30.0):  # nothing, and much, learned from the data
            evidence = Gates(*(nats * torch.randn(distribution.depth_log_probs.shape) for distribution in self.prior))
            tried(functools.partial(guide.start, evidence), "start(log_bayes_factors)", self.refuse)
            if not all(bool(parameter.isfinite().all()) for parameter in guide.parameters()):
                self.refuse("after start() its parameters are not finite: clamp infinite log Bayes factors")
            self.gradient(guide, sure=True)
            self.posterior(guide)
            self.joint(guide)

    def distributions(self, guide: Guide, hard: bool) -> None:
        call = f"distributions({_TEMPERATURE}, hard={hard})"
        distributions = tried(lambda: Gates(*guide.distributions(_TEMPERATURE, hard)), call, self.refuse)
        for site, distribution, shape, mask, prior in zip(
            "zg", distributions, self.shapes, self.masks, self.prior, strict=True
        ):
            if not getattr(distribution, "has_rsample", False):
                self.refuse(
                    f"{site} of {call} is a {type(distribution).__name__}, which has no reparametrized draw "
                    "(rsample): return RelaxedNestedBernoulli, or a Delta of a differentiable point"
                )
            value = distribution.rsample()
            if tuple(value.shape) != shape:
                self.refuse(f"a draw of {site} from {call} has shape {tuple(value.shape)}, expected {shape}")
            if not bool(((value >= 0) & (value <= 1)).all()):
                self.refuse(f"a draw of {site} from {call} leaves [0, 1]: a gate is open, closed, or in between")
            if not bool((value[..., 1:] <= value[..., :-1] + 1e-6).all()):
                self.refuse(
                    f"a draw of {site} from {call} opens a gate above a closed one: multiply the gates along the "
                    "ladder (cumprod), as RelaxedNestedBernoulli does"
                )
            if hard and not bool(((value == 0) | (value == 1)).all()):
                self.refuse(f"a draw of {site} from {call} is not 0 or 1: threshold it, straight through")
            if hard:
                self._possible(site, value.detach(), f"a draw from {call}")
            try:
                kl = torch.where(mask, kl_divergence(distribution, prior), 0.0)
            except NotImplementedError:
                self.refuse(
                    f"no KL divergence is registered for {site}, a {type(distribution).__name__} against a "
                    f"{type(prior).__name__}: register its closed form with torch.distributions.register_kl"
                )
            if not bool(kl.isfinite().all()):
                self.refuse(f"the KL of {site} of {call} is not finite: hold pinned gates where the prior has them")

    def _possible(self, site: str, value: Tensor, what: str) -> None:
        """No existing gate is in a state of prior probability 0."""
        prior, mask = getattr(self.prior, site), getattr(self.masks, site)
        if not bool((prior.log_prob(value)[..., mask] > -torch.inf).all()):
            self.refuse(
                f"{what} has a gate of {site} where the prior gives it probability 0: hold gates that the prior pins "
                "(log p = 0 or -inf), as guides.base.LogBayesFactors does"
            )

    def gradient(self, guide: Guide, sure: bool = False) -> None:
        """KL and draw reach the parameters wherever something is free, with finite slopes; 0 where all is certain."""
        parameters = [parameter for parameter in guide.parameters() if parameter.requires_grad]
        if not parameters:
            return
        distributions = guide.distributions(_TEMPERATURE, True)
        for site, distribution, prior, mask, pins in zip(
            "zg", distributions, self.prior, self.masks, self.pins, strict=True
        ):
            is_free = bool((pins.isnan() & mask[..., None]).any())
            # a point costs the same anywhere under a flat prior; a guide that starts as its prior is at its optimum
            is_flat = bool((prior.depth_log_probs.diff().abs() < _FLAT).all())
            kl = torch.where(mask, kl_divergence(distribution, prior), 0.0).sum()
            for what, value, may_be_flat in (("KL", kl, is_flat), ("draw", distribution.rsample().sum(), False)):
                if is_free and not value.requires_grad:
                    self.refuse(
                        f"the {what} of {site} has no gradient: compute distributions() from its parameters, undetached"
                    )
                if not value.requires_grad:
                    continue
                slopes = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
                if not all(bool(slope.isfinite().all()) for slope in slopes):
                    self.refuse(f"the gradient of the {what} of {site} is not finite: compute with logarithms")
                moves = any(bool((slope != 0).any()) for slope in slopes) or bool(value.abs() < 1e-4)
                if is_free and not (moves or sure or may_be_flat):
                    self.refuse(
                        f"the {what} of {site} does not depend on its parameters: nothing would be learned there"
                    )

    def posterior(self, guide: Guide) -> None:
        posterior = tried(guide.posterior, "posterior()", self.refuse)
        if not isinstance(posterior, Gates):
            self.refuse(f"posterior() must return Gates(z, g), got {type(posterior).__name__}")
        for site, distribution, prior, shape, mask, pins in zip(
            "zg", posterior, self.prior, self.shapes, self.masks, self.pins, strict=True
        ):
            if not isinstance(distribution, NestedBernoulli):
                self.refuse(
                    f"{site} of posterior() must be a NestedBernoulli, got {type(distribution).__name__}: it is the "
                    "exact discrete distribution (of a relaxed one, its .discrete)"
                )
            if tuple(distribution.log_probs.shape) != shape:
                self.refuse(f"{site} of posterior() has shape {tuple(distribution.log_probs.shape)}, expected {shape}")
            if not bool((distribution.log_probs <= 0).all()):
                self.refuse(f"the log-probabilities of {site} of posterior() must be <= 0 and not nan")
            held = bool((distribution.log_probs[pins == torch.inf] == 0).all())
            if not held or not bool((distribution.log_probs[pins == -torch.inf] == -torch.inf).all()):
                self.refuse(
                    f"posterior() moves gates of {site} that the prior pins: give them log p = 0 or -inf as it does"
                )
            if not bool(torch.where(mask, kl_divergence(distribution, prior), 0.0).isfinite().all()):
                self.refuse(f"the KL of {site} of posterior() is not finite: give no depth a probability that has none")
            self._possible(site, distribution.mode, "the deployed allocation")

    def joint(self, guide: Guide) -> None:
        """The posterior is the marginal of the components, whose draws are possible and whose KL is finite."""
        components = tried(guide.components, "components()", self.refuse)
        for site, distribution, marginal, shape in zip("zg", components, guide.posterior(), self.shapes, strict=True):
            if not isinstance(distribution, NestedBernoulli) or distribution.log_probs.shape != (
                len(distribution.log_probs),
                *shape,
            ):
                self.refuse(
                    f"{site} of components() must be a NestedBernoulli of shape (M, {', '.join(map(str, shape))})"
                )
            if not torch.allclose(distribution.depth_probs.mean(0), marginal.depth_probs, atol=_CLOSE, rtol=0.0):
                self.refuse(f"{site} of posterior() is not the mean of its components(): mix their depth probabilities")
        draws = draw_gates(guide, 3)
        for site, value in zip("zg", draws, strict=True):
            self._possible(site, value, "a draw from components()")
        if not bool(log_prob(guide, draws, *self.masks).isfinite().all()):
            self.refuse("a draw from components() has probability 0 under them: keep log-probabilities above -1e30")
        if guide.has_divergence:
            divergence = tried(lambda: sum(guide.divergence(self.prior, *self.masks)), "divergence()", self.refuse)
            if divergence.shape != () or not bool(divergence.isfinite()):
                self.refuse("divergence() must return Gates of two finite numbers (), the KLs of all z and of all g")

    def moves(self, guide: Guide) -> None:
        for move in MOVES:
            (to,) = move.values()

            def both(guide: Guide) -> list[Tensor]:
                distributions = guide.distributions(_TEMPERATURE, True)
                return [
                    *(distribution.log_probs for distribution in guide.posterior()),
                    *(distribution.rsample() for distribution in distributions),
                ]

            for name, x in zip(("z", "g") * 2, when_moved(guide, move, both, self.refuse), strict=True):
                found = x.device.type if "device" in move else x.dtype
                if found != to:
                    self.refuse(f"{name} stays on {found} when the module moves to {to}: {REGISTER}")
        twin = copy.deepcopy(guide)
        for parameter in twin.parameters():
            parameter.data.fill_(-1.0)
        twin.load_state_dict(guide.state_dict())
        for site, distribution, same in zip("zg", guide.posterior(), twin.posterior(), strict=True):
            if not torch.equal(distribution.log_probs, same.log_probs):
                self.refuse(f"{site} is not restored by its state_dict: hold what it learns in parameters or buffers")
