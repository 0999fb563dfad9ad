"""Bayesian-LoRA as a probabilistic program: the model, the guide, and the ELBO between them.

    model:  z ~ prior_z,  g ~ prior_g,  logits = backbone(batch; z, g),  label ~ likelihood(logits), scaled N / B
    guide:  z ~ q_z,      g ~ q_g
    loss  = -ELBO / N  =  E_q[-log p(label | z, g)] an example  +  (KL_z + KL_g) / N

All gates of a network are two sites, drawn once at the top and handed to the layers. The KL is the closed form between
the discrete laws; a relaxation lives in the guide's sample only. A pair of laws without a registered KL is refused.
Shapes: B batch, N training examples; z (L, T, K), g (L, R - 1).   Units: nats.
"""

from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from . import adapters
from .gates import Gates


class Elbo(NamedTuple):
    """One-sample estimate of the negative ELBO's parts: nll a batch mean (nats an example), kl_z and kl_g in nats."""

    nll: Tensor
    kl_z: Tensor
    kl_g: Tensor

    def loss(self, n_train: int, kl_weight: float = 1.0) -> Tensor:
        """-ELBO / N, in nats an example; kl_weight < 1 during warm-up."""
        return self.nll + kl_weight * (self.kl_z + self.kl_g) / n_train


class BayesianLoRA(nn.Module):
    """A gated network with a prior and a guide over its gates.

    net: what `attach` returned. prior: a module whose call returns Gates. guide: see guides.py.
    likelihood: (logits, scale) -> law of the labels; scale is a learned standard deviation, used by regression.
    n_train: N. hard: straight-through instead of soft relaxed samples.
    """

    def __init__(
        self, net: adapters.GatedModel, prior: nn.Module, guide: nn.Module, likelihood: Callable, *, n_train: int,
        hard: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.net, self.prior, self.gate_guide, self.likelihood = net, prior, guide, likelihood
        self.n_train, self.hard, self.temperature = n_train, hard, 1.0
        self.log_scale = nn.Parameter(torch.zeros(()))
        layout = net.layout
        self.register_buffer("z_mask", layout.z_mask.clone(), persistent=False)
        self.register_buffer("g_mask", layout.g_mask.clone(), persistent=False)
        require_kl(guide.laws(self.temperature, hard), prior())

    # --- the program ------------------------------------------------------------------------------------------------

    def model(self, inputs: dict, labels: Tensor | None = None) -> Tensor:
        z, g = self._gate_sites(self.prior())
        with adapters.gates(self.net, z, g):
            logits = self.net(**inputs).logits.float()  # (B, classes)
        with pyro.plate("example", self.n_train, subsample=torch.arange(len(logits), device=logits.device)):
            pyro.sample("label", self.likelihood(logits, scale=self.log_scale.exp()), obs=labels)
        return logits

    def guide(self, inputs: dict, labels: Tensor | None = None) -> Gates:
        return self._gate_sites(self.gate_guide.laws(self.temperature, self.hard))

    def _gate_sites(self, laws: Gates) -> Gates:
        L, T, _ = self.net.layout.z_shape
        with pyro.plate("z_projection", L, dim=-2), pyro.plate("z_tensor", T, dim=-1), poutine.mask(mask=self.z_mask):
            z = pyro.sample("z", laws.z)  # (L, T, K)
        with pyro.plate("g_projection", L, dim=-1), poutine.mask(mask=self.g_mask):
            g = pyro.sample("g", laws.g)  # (L, R - 1)
        return Gates(z, g)

    # --- the ELBO ---------------------------------------------------------------------------------------------------

    def elbo(self, inputs: dict, labels: Tensor) -> Elbo:
        """A reparametrised one-sample estimate, differentiable in everything; equals Pyro's TraceMeanField_ELBO."""
        q = poutine.trace(self.guide).get_trace(inputs, labels)
        p = poutine.trace(poutine.replay(self.model, trace=q)).get_trace(inputs, labels)
        label = p.nodes["label"]
        nll = -label["fn"].log_prob(label["value"]).mean()
        laws = (Gates(*(trace.nodes[site]["fn"] for site in ("z", "g"))) for trace in (q, p))
        return Elbo(nll, *self.kl(*laws))

    def nll(self, inputs: dict, labels: Tensor, z: Tensor, g: Tensor) -> Tensor:
        """Mean negative log-likelihood of a batch at given gates, nats an example."""
        with adapters.gates(self.net, z, g):
            logits = self.net(**inputs).logits.float()
        return -self.likelihood(logits, scale=self.log_scale.exp()).log_prob(labels).mean()

    def kl(self, q: Gates, p: Gates) -> Gates:
        """KL(q || p) of all chains that exist, nats."""
        kl_z = torch.where(self.z_mask, kl_divergence(q.z, p.z), 0.0).sum()
        return Gates(kl_z, torch.where(self.g_mask, kl_divergence(q.g, p.g), 0.0).sum())

    def forward(self, inputs: dict, labels: Tensor, temperature: float, kl_weight: float = 1.0) -> tuple[Tensor, Elbo]:
        """The training loss and its parts, at a temperature of the relaxation.

        At kl_weight 0, before the gates start, they are held open: the loss is the NLL of plain LoRA.
        """
        self.temperature = temperature
        if kl_weight == 0:
            opened = adapters.open_gates(self.net.layout, labels.device)
            laws = self.gate_guide.laws(temperature, self.hard)
            elbo = Elbo(self.nll(inputs, labels, *opened), *self.kl(laws, self.prior()))
        else:
            elbo = self.elbo(inputs, labels)
        return elbo.loss(self.n_train, kl_weight), elbo


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
