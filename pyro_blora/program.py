"""Bayesian-LoRA as a probabilistic program: the model, the guide, and the ELBO between them.

    model:  theta ~ prior_theta,  z ~ prior_z,  g ~ prior_g,
            logits = backbone(batch; z, g, theta),  label ~ likelihood(logits), scaled N / B
    guide:  theta ~ q_theta,      z ~ q_z,      g ~ q_g
    loss  = -ELBO / N  =  E_q[-log p(label | z, g, theta)] per example  +  (KL_z + KL_g + KL_theta) / N

theta are the adapter's weights, where their distribution (weights/) is learned with the gates; else there is no such
site. A prior with random settings has sites of its own for them, in the model and in the guide (priors/base.py).

All gates of a network are two sites, drawn once at the top of the program and passed to the layers. The KL is that of
the discrete distributions, in closed form; at most the guide's sample is relaxed. The pair is plain Pyro: training
minimizes `program.elbo.differentiable_loss(program.model, program.guide, inputs, labels) / N`, and so does
`pyro.infer.SVI` with `program.elbo` (elbos/) or Pyro's `TraceMeanField_ELBO`. Nothing is in the global parameter store.
Shapes: B batch, N training examples, D random weights; z (L, T, K), g (L, R - 1), theta (D,).   Units: nats.
"""

import abc
import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import extract_provenance, track_provenance
from torch import Tensor, nn

from . import adapters
from .adapters.example_axis import leads_with_examples
from .distillation import Distilled, Teacher
from .elbos import JOINT, Evaluation, JointDivergence, Terms, build_elbo
from .elbos.base import Program, mean_nll, sites_of, unused
from .elbos.divergences import Distributions, closed_form_kl, masked
from .gates import Gates
from .guides.base import Guide
from .layout import AdapterLayout
from .priors.base import Prior
from .pyro_compat import show_parameters, taking_soft_draws, without_singletons
from .registry import adopted
from .tasks.likelihoods import Likelihood
from .weights.base import Point, Weights

Inputs = dict[str, Tensor]  # what the network is called with, by name
Held = Literal["open", "deployed"]  # where all gates can be held in training


class GateProgram(nn.Module, abc.ABC):
    """A model/guide pair over the gates of a layout; a subclass defines the logits at given gates.

    prior: a Prior, or a plain nn.Module with its methods; guide: a Guide, likewise. likelihood: a
    tasks.likelihoods.Likelihood, called with logits and a learned standard deviation. n_train: N.
    estimator: a name of elbos/, with its settings. weights: None for weights that are not random.
    temperature: of the guide's relaxed draws. kl_weight: scales the KL of all latent sites; below 1: a cold posterior.
    """

    z_mask: torch.BoolTensor  # (L, T), the bit ladders that exist
    g_mask: torch.BoolTensor  # (L,), the rank ladders
    temperature: float | Tensor = 1.0
    kl_weight: float = 1.0

    def __init__(
        self, layout: AdapterLayout, prior: nn.Module, guide: nn.Module, likelihood: Likelihood, *, n_train: int,
        estimator: str = "relaxed", estimator_settings: dict[str, Any] | None = None, weights: Weights | None = None,
    ):  # fmt: skip
        super().__init__()
        self.weights = Point({}) if weights is None else weights
        self.layout, self.likelihood, self.n_train = layout, likelihood, n_train
        self.prior, self.gate_guide = adopted(prior, Prior), adopted(guide, Guide)
        self.elbo = build_elbo(estimator, self.gate_guide, estimator_settings)
        self.starting_log_scale = math.log(getattr(likelihood, "starting_std", 1.0))  # a plain function starts at 1
        self.log_scale = nn.Parameter(torch.tensor(self.starting_log_scale))
        self.register_buffer("z_mask", layout.z_mask.clone(), persistent=False)
        self.register_buffer("g_mask", layout.g_mask.clone(), persistent=False)
        masks, guides = (self.z_mask, self.g_mask), self.gate_guide.distributions(self.temperature, self.hard)
        for site, q, p, mask in zip("zg", guides, self.prior(), masks, strict=True):
            kl = closed_form_kl(site, q, p)  # which refuses a pair without one
            if bool(masked(kl.detach(), mask).isposinf()):
                raise ValueError(
                    f"the guide {type(guide).__name__} moves gates of site {site!r} that the prior keeps open or closed"
                    ", so its KL divergence is infinite: leave them where prior() has them, at 0 and 1"
                )

    @abc.abstractmethod
    def logits(self, inputs: Inputs, gates: Gates[Tensor], theta: Tensor | None = None) -> Tensor:
        """The logits that parametrize the likelihood, (B, *, C), at given gates and weights.

        theta: (D,), or (B, D) with one draw per example; None for the mean, always so where weights are not random.
        """

    def each_logits(
        self, batches: Sequence[Inputs], gates: Gates[Tensor], theta: Tensor | None = None, *, exact: bool = False
    ) -> Iterator[Tensor]:
        """The same for several batches at the same gates and weights.

        exact: in an arithmetic whose answer for a row depends on that row alone, where a program has one.
        """
        return (self.logits(inputs, gates, theta) for inputs in batches)

    def leads_with_examples(self, inputs: Inputs) -> bool:
        """Whether the examples of a batch may have different weights in one call of `logits`."""
        return True

    @property
    def gates_are_random(self) -> bool:
        """Whether the prior leaves any gate random."""
        return any(bool((x.isfinite() & (x < 0)).any()) for x in self._log_probs())

    @property
    def gates_close(self) -> bool:
        """Whether any gate can be closed, at random or always: then the network changes when gates start."""
        return any(bool((x < 0).any()) for x in self._log_probs())

    def _log_probs(self) -> list[Tensor]:
        return [q.log_probs[mask] for q, mask in zip(self.prior(), (self.z_mask, self.g_mask), strict=True)]

    @property
    def hard(self) -> bool:
        """Whether the guide's draws are 0 or 1, as the posterior's are, and not relaxed."""
        return self.elbo.draws != "soft"

    # --- the program ------------------------------------------------------------------------------------------------

    def model(self, inputs: Inputs, labels: Tensor | None = None) -> Tensor:
        show_parameters(self)
        with poutine.scale(scale=self.kl_weight):
            theta = self._theta_site("prior")
            gates = self._model_gates()
        drawn: Any  # a tensor that tracks its provenance would cut the gradient
        drawn, sources = extract_provenance((gates, theta))
        logits: Tensor = track_provenance(self.logits(inputs, *drawn), sources)  # (B, *, C)
        with pyro.plate("example", self.n_train, subsample=torch.arange(len(logits), device=logits.device)):
            outcome: Any = self.likelihood(logits, scale=self.log_scale.exp())  # of Pyro's distributions
            pyro.sample("label", outcome, obs=labels)
        return logits

    def guide(self, inputs: Inputs, labels: Tensor | None = None, component: int | None = None) -> Gates[Tensor]:
        """component: of a guide that has several (`each_component`), the one to draw from; None draws one."""
        show_parameters(self)
        with poutine.scale(scale=self.kl_weight):
            self._theta_site("distribution")
            return self._guide_gates(component)

    def _model_gates(self) -> Gates[Tensor]:
        distributions = self.prior.pyro_model()
        return self._gate_sites(distributions if self.hard else taking_soft_draws(distributions))

    def _guide_gates(self, component: int | None = None) -> Gates[Tensor]:
        settings = self.prior.pyro_guide()
        distributions, components = self._guide_distributions(component)
        gates = self._gate_sites(distributions)
        if self.gate_guide.has_divergence:
            prior = poutine.block(poutine.condition(self.prior.pyro_model, data=settings))
            masks = Gates(self.z_mask, self.g_mask)
            joint = JointDivergence(self.gate_guide, distributions, prior, masks, components=components)
            pyro.sample(JOINT, joint, obs=joint.sample(), infer={"is_auxiliary": True})
        return gates

    def _guide_distributions(self, component: int | None) -> tuple[Distributions, int]:
        """The distributions of the gates, and the number of components that each ELBO draws from."""
        if component is None:
            distributions, components = self.gate_guide.distributions(self.temperature, self.hard), 1
        else:
            each = self.gate_guide.each_component(self.temperature, self.hard)
            distributions, components = each[component], len(each)
        if self.elbo.draws == "discrete":
            distributions = Gates(*(q.has_rsample_(False) for q in distributions))
        return distributions, components

    def _theta_site(self, distribution: str) -> Tensor | None:
        if not self.weights.in_training:
            return None
        with poutine.scale(scale=self.weights.kl_weight):
            theta = pyro.sample("theta", getattr(self.weights, distribution)())
        return without_singletons(theta, (self.weights.size,))  # (D,)

    def _gate_sites(self, distributions: Distributions) -> Gates[Tensor]:
        L, T, _ = self.layout.z_shape
        with pyro.plate("z_projection", L, dim=-2), pyro.plate("z_tensor", T, dim=-1), poutine.mask(mask=self.z_mask):
            z = pyro.sample("z", distributions.z)  # (L, T, K)
        with pyro.plate("g_projection", L, dim=-1), poutine.mask(mask=self.g_mask):
            g = pyro.sample("g", distributions.g)  # (L, R - 1)
        return Gates(without_singletons(z, self.layout.z_shape), without_singletons(g, self.layout.g_shape))

    # --- the ELBO ---------------------------------------------------------------------------------------------------

    def terms(self, inputs: Inputs, labels: Tensor) -> Terms:
        """The terms of -ELBO / N at one draw; their `loss` is what training minimizes."""
        return self._terms(self.model, self.guide, inputs, labels)

    def _terms(self, model: Program, guide: Program, inputs: Inputs, labels: Tensor) -> Terms:
        with self.gate_guide.computed_once():
            return self.elbo.terms(model, guide, inputs, labels)

    def nll(self, inputs: Inputs, labels: Tensor, z: Tensor, g: Tensor, theta: Tensor | None = None) -> Tensor:
        """Mean NLL of a batch at given gates (and weights), nats per example: the model, conditioned on them."""
        data = {"z": z, "g": g} if theta is None else {"z": z, "g": g, "theta": theta}
        return mean_nll(sites_of(poutine.condition(self.model, data=data), inputs, labels))

    def kl(self) -> Gates[Tensor]:
        """KL(guide || prior) of all ladders that exist, nats; that of a prior's random settings counts with z."""
        at = Evaluation(self._model_gates, self._guide_gates, draw=unused, component=0)
        at.run_model(at.gates)
        found = at.divergences()
        kl_z, kl_g = found.pop("z"), found.pop("g")
        return Gates(kl_z + sum(found.values()), kl_g)


class BayesianLoRA(GateProgram):
    """The program of a gated network: `net` is what `attach` returned."""

    text_columns: tuple[str, ...] = ()  # of its task: what one example's texts are called
    _opened: Gates[Tensor] | None = None
    settled: Gates[Tensor] | None = None  # what is deployed, while the gates rest
    _settled_at_32: list[bool] | None = None
    _at_32: list[bool] | None = None  # in a training step: which tensors always stay at 32 bit

    def __init__(
        self, net: adapters.GatedModel, prior: nn.Module, guide: nn.Module, likelihood: Likelihood, **settings: Any
    ):
        super().__init__(net.layout, prior, guide, likelihood, **settings)
        self.net = net
        self.teacher: Teacher | None = None  # of a training with distillation

    @property
    def opened(self) -> Gates[Tensor]:
        """Everything open, on the program's device: the same tensors at every call."""
        device = self.log_scale.device
        if self._opened is None or self._opened.z.device != device:
            self._opened = Gates(*adapters.open_gates(self.layout, device))
        return self._opened

    def settle(self, gates: Gates[Tensor]) -> None:
        """Take the allocation that is deployed, at which `held` gates are."""
        self.settled, self._settled_at_32 = gates, adapters.exact_tensors(gates.z)

    def logits(self, inputs: Inputs, gates: Gates[Tensor], theta: Tensor | None = None) -> Tensor:
        with self._gated(gates, theta):
            return self.net.logits(**inputs)

    def leads_with_examples(self, inputs: Inputs) -> bool:
        return leads_with_examples(self.net, inputs)

    def each_logits(
        self, batches: Sequence[Inputs], gates: Gates[Tensor], theta: Tensor | None = None, *, exact: bool = False
    ) -> Iterator[Tensor]:
        """Without gradients, weights are rounded once for all batches. Read it to the end: gates are set until then."""
        with self._gated(gates, theta, exact):
            for inputs in batches:
                yield self.net.logits(**inputs)

    def _gated(
        self, gates: Gates[Tensor], theta: Tensor | None, exact: bool = False
    ) -> contextlib.AbstractContextManager[adapters.GatedModel]:
        weights = None if theta is None else self.weights.split(theta)
        return adapters.use_gates(
            self.net, *gates, weights, opened=gates.z is self.opened.z, at_32=self._at_32, exact=exact
        )

    @functools.cached_property
    def pinned_at_32(self) -> list[bool] | None:
        """Which tensors every draw leaves at 32 bit, where the prior pins all gates; computed once."""
        return None if self.gates_are_random else adapters.exact_tensors(self.gate_guide.posterior().z.mode)

    def forward(
        self, inputs: Inputs, labels: Tensor, temperature: float, kl_weight: float = 1.0, held: Held | None = None
    ) -> tuple[Tensor, Terms]:
        """The training loss and its terms, at a temperature of the relaxation.

        held: where the gates are, if they are not drawn; their KL is not in the loss then. `open`, before they start:
        the loss is that of LoRA, with its weights' distribution. `deployed`, after `settle`. From their start on with a
        teacher, the NLL in the loss is mixed with the divergence from its answers; the terms have both.
        """
        self.temperature, self.kl_weight = temperature, kl_weight
        model: Program = self.model
        guide: Program = self.guide
        distilled: Distilled | None = None
        if held is not None:
            gates = self.opened if held == "open" else self.settled
            assert gates is not None, "settle() comes first"
            model, guide = (poutine.condition(part, data=gates._asdict()) for part in (model, guide))
        if held != "open" and self.teacher is not None:
            answers = self.teacher.answers(self.net, self.likelihood, self.opened, inputs)
            distilled = Distilled(self.likelihood, answers, self.teacher.weight)
            model = distilled(model)
        self._at_32 = {"open": None, "deployed": self._settled_at_32}[held] if held else self.pinned_at_32
        try:
            terms = self._terms(model, guide, inputs, labels)
        finally:
            self._at_32 = None
        return terms.loss + self.net.penalty(), terms if distilled is None else distilled.told(terms)
