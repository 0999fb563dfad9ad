"""Bayesian-LoRA as a probabilistic program: the model, the guide, and the ELBO between them.

    model:  z ~ prior_z,  g ~ prior_g,  theta ~ prior_theta,
            logits = backbone(batch; z, g, theta),  label ~ likelihood(logits), scaled N / B
    guide:  z ~ q_z,      g ~ q_g,      theta ~ q_theta
    loss  = -ELBO / N  =  E_q[-log p(label | z, g, theta)] an example  +  (KL_z + KL_g + KL_theta) / N

theta are the adapter's weights, where their law (weights.py) is learned with the gates; else there is no such site.

All gates of a network are two sites, drawn once at the top and handed to the layers. The KL is that of the discrete
laws, in closed form (of a mixture: `Mixture.divergence`); a relaxation lives in the guide's sample only. Pyro's own
`SVI(program.model, program.guide, optim, TraceMeanField_ELBO())` trains the same posterior: what learns is shown to its
optimizer and never enters the global parameter store.
Shapes: B batch, N training examples, D random weights; z (L, T, K), g (L, R - 1), theta (D,).   Units: nats.
"""

import abc
import contextlib
import copy
import functools
import math
import warnings
import weakref
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK, effectful
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import kl_divergence

from . import adapters
from .estimators import build_estimator
from .gates import Gates
from .layout import AdapterLayout
from .tasks.likelihoods import Likelihood
from .weights.base import Point


class Elbo(NamedTuple):
    """One-sample estimate of the negative ELBO's parts: nll a batch mean (nats an example), KLs in nats."""

    nll: Tensor
    kl_z: Tensor
    kl_g: Tensor
    kl_theta: Tensor | float = 0.0

    def loss(self, n_train: int, kl_weight: float = 1.0, theta_weight: float | None = None) -> Tensor:
        """-ELBO / N, in nats an example; below weights of 1, that of a cold posterior. None: the gates' weight."""
        of_theta = (kl_weight if theta_weight is None else theta_weight) * self.kl_theta
        return self.nll + (kl_weight * (self.kl_z + self.kl_g) + of_theta) / n_train


class GateProgram(nn.Module, abc.ABC):
    """A model/guide pair over the gates of a layout; a subclass says what the labels' logits are at given gates.

    prior: a module whose call returns Gates; what else it may have: see adaptive.py. guide: see guides.py. likelihood:
    a tasks.likelihoods.Likelihood, called with logits and a learned standard deviation. n_train: N.
    estimator: a name of estimators.py. weights: see weights.py; None for weights that are not random.
    """

    def __init__(
        self, layout: AdapterLayout, prior: nn.Module, guide: nn.Module, likelihood: Likelihood, *, n_train: int,
        estimator: str = "relaxed", weights: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        self.weights = Point({}) if weights is None else weights
        self.layout, self.prior, self.gate_guide, self.likelihood = layout, prior, guide, likelihood
        self.n_train, self.estimator, self.temperature = n_train, build_estimator(estimator, guide), 1.0
        self.hard = estimator != "relaxed"
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("z_mask", layout.z_mask.clone(), persistent=False)
        self.register_buffer("g_mask", layout.g_mask.clone(), persistent=False)
        require_kl(guide.laws(self.temperature, self.hard), prior())

    @abc.abstractmethod
    def logits(self, inputs: dict, gates: Gates, theta: Tensor | None = None) -> Tensor:
        """What the likelihood takes, (B, classes), at given gates and weights.

        theta: (D,), or (B, D) for each example its own; None for their mean, which is all that a program without random
        weights gets.
        """

    def each_logits(self, batches: list[dict], gates: Gates, theta: Tensor | None = None) -> list[Tensor]:
        """The same for several batches at the same gates and weights."""
        return [self.logits(inputs, gates, theta) for inputs in batches]

    @property
    def gates_are_random(self) -> bool:
        """Whether the prior leaves any gate to chance."""
        return any(bool((x.isfinite() & (x < 0)).any()) for x in self._log_probs())

    @property
    def gates_close(self) -> bool:
        """Whether any gate can be closed, by chance or for sure: then the network changes when gates start."""
        return any(bool((x < 0).any()) for x in self._log_probs())

    def _log_probs(self) -> list[Tensor]:
        return [law.log_probs[mask] for law, mask in zip(self.prior(), (self.z_mask, self.g_mask), strict=True)]

    # --- the program ------------------------------------------------------------------------------------------------

    def model(self, inputs: dict, labels: Tensor | None = None) -> Tensor:
        self._show_parameters()
        laws = self.prior()
        gates = self._gate_sites(laws if self.hard else _of_soft_chains(laws))
        theta = pyro.sample("theta", self.weights.prior()) if self.weights.in_training else None  # (D,)
        logits = self.logits(inputs, gates, theta)  # (B, classes)
        with pyro.plate("example", self.n_train, subsample=torch.arange(len(logits), device=logits.device)):
            pyro.sample("label", self.likelihood(logits, scale=self.log_scale.exp()), obs=labels)
        return logits

    def guide(self, inputs: dict, labels: Tensor | None = None) -> Gates:
        self._show_parameters()
        gates = self._gate_sites(self.gate_guide.laws(self.temperature, self.hard))
        if self.weights.in_training:
            pyro.sample("theta", self.weights.law())
        return gates

    def _show_parameters(self) -> None:
        """Where Pyro collects parameters for an optimizer, as SVI.step does: all that learn, as `param` sites.

        Errors: ValueError where Pyro's ELBO is not the program's.
        """
        if not any(isinstance(handler, TraceMessenger) and handler.param_only for handler in _PYRO_STACK):
            return
        self._require_an_elbo_of_pyro()
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                shown = parameter.detach()  # as Pyro's module-local parameters: a view that knows what is optimized
                shown.unconstrained = weakref.ref(parameter)
                effectful(lambda shown=shown: shown, type="param")(name=f"program.{name}")

    def _require_an_elbo_of_pyro(self) -> None:
        for what, part in (("guide", self.gate_guide), ("prior", self.prior)):
            if hasattr(part, "divergence") or hasattr(part, "allocate"):
                raise ValueError(
                    f"the {what} {type(part).__name__} cannot be trained by pyro.infer.SVI: it has a KL divergence, or "
                    "an allocator, that Pyro's ELBOs do not see. Use pyro_blora.fit, or minimize program.elbo(inputs, "
                    "labels).loss(program.n_train)"
                )
        if hasattr(self.prior, "adapt"):
            warnings.warn(
                f"the prior {type(self.prior).__name__} adapts after every step: call program.prior.adapt(pyro_blora."
                "posterior.component_marginals(program)) after svi.step, or it stays as it is",
                stacklevel=2,
            )

    def _gate_sites(self, laws: Gates) -> Gates:
        L, T, _ = self.layout.z_shape
        with pyro.plate("z_projection", L, dim=-2), pyro.plate("z_tensor", T, dim=-1), poutine.mask(mask=self.z_mask):
            z = pyro.sample("z", laws.z)  # (L, T, K)
        with pyro.plate("g_projection", L, dim=-1), poutine.mask(mask=self.g_mask):
            g = pyro.sample("g", laws.g)  # (L, R - 1)
        return Gates(_without_singletons(z, self.layout.z_shape), _without_singletons(g, self.layout.g_shape))

    # --- the ELBO ---------------------------------------------------------------------------------------------------

    def elbo(self, inputs: dict, labels: Tensor) -> Elbo:
        """NLL by the estimator, KL in closed form: of a reparametrised mean field, Pyro's TraceMeanField_ELBO."""
        theta = self.draw_theta()
        with getattr(self.gate_guide, "computed_once", contextlib.nullcontext)():
            nll = self.estimator(
                lambda gates: self.nll(inputs, labels, *gates, theta), self.gate_guide, self.temperature
            )
            return Elbo(nll, *self.kl(), self.weights.divergence())

    def draw_theta(self) -> Tensor | None:
        """A reparametrised draw of the weights, (D,), where their law is learned."""
        return self.weights.law().rsample() if self.weights.in_training else None

    def nll(self, inputs: dict, labels: Tensor, z: Tensor, g: Tensor, theta: Tensor | None = None) -> Tensor:
        """Mean NLL of a batch at given gates (and weights), nats an example: the model, conditioned on them."""
        data = {"z": z, "g": g} if theta is None else {"z": z, "g": g, "theta": theta}
        conditioned = poutine.condition(self.model, data=data)
        label = poutine.trace(conditioned).get_trace(inputs, labels).nodes["label"]
        return -label["fn"].log_prob(label["value"]).mean()

    def kl(self) -> Gates:
        """KL(guide || prior) of all chains that exist, nats."""
        return kl_of(self.gate_guide, self.prior, self.z_mask, self.g_mask, self.temperature, self.hard)


class BayesianLoRA(GateProgram):
    """The program of a gated network: `net` is what `attach` returned."""

    _opened: Gates | None = None
    _at_32: list[bool] | None = None  # of a training step: which tensors stay at 32 bit for sure

    def __init__(
        self, net: adapters.GatedModel, prior: nn.Module, guide: nn.Module, likelihood: Likelihood, **settings
    ):
        super().__init__(net.layout, prior, guide, likelihood, **settings)
        self.net = net

    @property
    def opened(self) -> Gates:
        """Everything open, on the program's device: the same tensors at every call."""
        device = self.log_scale.device
        if self._opened is None or self._opened.z.device != device:
            self._opened = Gates(*adapters.open_gates(self.layout, device))
        return self._opened

    def logits(self, inputs: dict, gates: Gates, theta: Tensor | None = None) -> Tensor:
        return self.each_logits([inputs], gates, theta)[0]

    def each_logits(self, batches: list[dict], gates: Gates, theta: Tensor | None = None) -> list[Tensor]:
        """Without gradients, weights are rounded once for all batches."""
        weights = None if theta is None else self.weights.split(theta)
        with adapters.gates(self.net, *gates, weights, opened=gates.z is self.opened.z, at_32=self._at_32):
            return [self.net(**inputs).logits.float() for inputs in batches]

    @functools.cached_property
    def pinned_at_32(self) -> list[bool] | None:
        """Which tensors every draw leaves at 32 bit, where the prior leaves no gate to chance: asked once."""
        return None if self.gates_are_random else adapters.exact_tensors(self.gate_guide.posterior().z.mode)

    def forward(
        self,
        inputs: dict,
        labels: Tensor,
        temperature: float,
        kl_weight: float = 1.0,
        theta_weight: float | None = None,
    ) -> tuple[Tensor, Elbo]:
        """The training loss and its parts, at a temperature of the relaxation.

        At kl_weight 0, before the gates start, they are held open: the loss is that of LoRA, with its weights' law.
        """
        self.temperature = temperature
        if kl_weight == 0:
            nll = self.nll(inputs, labels, *self.opened, self.draw_theta())
            elbo = Elbo(nll, *self.kl(), self.weights.divergence())
        else:
            self._at_32 = self.pinned_at_32
            try:
                elbo = self.elbo(inputs, labels)
            finally:
                self._at_32 = None
        theta_weight = (kl_weight if theta_weight is None else theta_weight) * self.weights.kl_weight
        return elbo.loss(self.n_train, kl_weight, theta_weight) + self.net.penalty(), elbo


def _without_singletons(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What Predictive replays has a dimension of 1 for every plate of the model that a site is not in."""
    return x.reshape(shape) if x.dim() > len(shape) and x.numel() == math.prod(shape) else x


def _of_soft_chains(laws: Gates) -> Gates:
    """The same laws, which take a soft chain: Pyro asks for its log-probability, and then uses the KL instead."""
    unchecked = Gates(*map(copy.copy, laws))
    for law in unchecked:
        law._validate_args = False
    return unchecked


def kl_of(guide: nn.Module, prior: nn.Module, z_mask: Tensor, g_mask: Tensor, temperature: float, hard: bool) -> Gates:
    """KL(guide || prior) of the chains in the masks, nats; that of the prior's own settings counts with z."""
    p = prior.sample() if hasattr(prior, "sample") else prior()
    if hasattr(guide, "divergence"):
        kl_z, kl_g = guide.divergence(p, z_mask, g_mask)
    else:
        q = guide.laws(temperature, hard)
        kl_z = torch.where(z_mask, kl_divergence(q.z, p.z), 0.0).sum()
        kl_g = torch.where(g_mask, kl_divergence(q.g, p.g), 0.0).sum()
    return Gates(kl_z + prior.divergence() if hasattr(prior, "divergence") else kl_z, kl_g)


def require_kl(q: Gates, p: Gates) -> None:
    """Refuse laws without a closed-form KL: a Monte Carlo estimate of a relaxed law's divergence is not an ELBO.

    Errors: ValueError naming the pair.
    """
    for site in ("z", "g"):
        guide_law, prior_law = getattr(q, site), getattr(p, site)
        try:
            kl_divergence(guide_law, prior_law)
        except NotImplementedError:
            raise ValueError(
                f"site {site!r}: no KL divergence is registered for a guide law {type(guide_law).__name__} against a "
                f"prior law {type(prior_law).__name__}. Use a guide whose laws are RelaxedNestedBernoulli, or register "
                "the closed form over the discrete laws with torch.distributions.register_kl"
            ) from None
