"""What was learned: exact marginals, draws of the gates, predictions averaged over draws, and their calibration.

Reported posteriors are those of the discrete law. Draws and the deployed allocation come from the same law that was
trained; a gate is deployed open where its marginal exceeds one half.
Shapes: S draws, E examples, C classes; z (S, L, T, K), g (S, L, R - 1).
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from .bops import BOPs, expected_bops
from .calibration import BINS, brier, ece
from .gates import Gates, NestedBernoulli
from .guides import components, draw_gates, log_prob
from .jacobians import jacobians
from .program import BayesianLoRA, GateProgram
from .tasks.likelihoods import Likelihood

ECE_BINS = BINS[0]
_KL_DRAWS = 100
_OTHER_STREAM = 0x5EED_0F_7E7A  # of the weights' draws, whose seed differs from the gates' in these bits
_TOGETHER = 16  # batches that are asked for at the same gates, one after the other


@torch.no_grad()
def marginals(program: BayesianLoRA) -> Gates:
    """Exact probabilities that each gate is open.  z (L, T, K), g (L, R - 1)."""
    return Gates(*(law.mean for law in program.gate_guide.posterior()))


@torch.no_grad()
def bops(program: BayesianLoRA) -> BOPs:
    """E[BOPs] under the guide, exact: chains are independent given the component."""
    each = expected_bops(program.layout, *component_marginals(program))  # fields (M,)
    return BOPs(*(x.mean(0) for x in each))


@torch.no_grad()
def component_marginals(program: BayesianLoRA) -> Gates:
    """The same as `marginals` for each equally likely component.  z (M, L, T, K), g (M, L, R - 1)."""
    return Gates(*(law.mean for law in components(program.gate_guide)))


@torch.no_grad()
def deployed(program: BayesianLoRA) -> Gates:
    """The one allocation that is exported: open where the marginal exceeds one half.  z (L, T, K), g (L, R - 1).

    Under a mixture, where of two gates that stand in for each other both may have marginals below one half, the most
    probable of this rule's allocations for the whole law and for each component.
    """
    guide = program.gate_guide
    if hasattr(guide, "deployed"):
        return guide.deployed()
    whole = Gates(*(law.mode for law in guide.posterior()))
    each = Gates(*(law.mode for law in components(guide)))
    if len(each.z) == 1:
        return whole
    candidates = Gates(*(torch.cat([x[None], y]) for x, y in zip(whole, each, strict=True)))
    best = log_prob(guide, candidates, program.z_mask, program.g_mask).argmax()
    return Gates(*(x[best] for x in candidates))


@torch.no_grad()
def draw(program: BayesianLoRA, draws: int, *, seed: int = 0, law: str = "posterior") -> Gates:
    """Discrete draws of all gates, from the guide's `posterior` or from the `prior`.

    The same seed gives the same draws on every process, and leaves the global generator as it was.
    Errors: ValueError for fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    with seeded(program, seed):
        if law == "posterior":
            return draw_gates(program.gate_guide, draws)
        if hasattr(program.prior, "sample_prior"):
            return Gates(*(x.sample() for x in program.prior.sample_prior(draws)))
        return Gates(*(x.sample((draws,)) for x in program.prior()))


@torch.no_grad()
def draw_weights(program: GateProgram, draws: int, *, seed: int = 0) -> Tensor | None:
    """(S, D) draws of the adapter's weights, independent of those of the gates; None where they are not random."""
    if not program.weights.random:
        return None
    with seeded(program, seed ^ _OTHER_STREAM):
        return program.weights.draw(draws)


class Rates(NamedTuple):
    """Draws of a prior's own rates: names (n), posterior and prior (S, n), log_ratio (S,) as in `rates`."""

    names: tuple[str, ...]
    posterior: Tensor
    prior: Tensor
    log_ratio: Tensor


@torch.no_grad()
def rates(program: BayesianLoRA, draws: int, *, seed: int = 0) -> Rates | None:
    """Draws of the prior's random rates, from their guide and from their law; None where no rate is random.

    log_ratio: log of p(rates) exp(-KL(guide of the gates || prior at these rates)) over the rates' guide, nats: it
    would be constant if the guide were the best law of the rates. The Pareto k of its tail says how far it is off.
    Source: Yao, Vehtari, Simpson and Gelman, Yes, but did it work? (2018).
    """
    prior, q = program.prior, components(program.gate_guide)
    parts = {site: part for site, part in prior.named_children() if hasattr(part, "draw_rates")}
    parts = {"zg": prior} if hasattr(prior, "draw_rates") else parts
    if not parts:
        return None
    names, drawn, log_ratio = [], {"posterior": [], "prior": []}, torch.zeros(draws)
    with seeded(program, seed):
        for site, part in parts.items():
            names += part.rate_names
            for law, columns in drawn.items():
                columns.append(part.draw_rates(draws, law))
            here = drawn["posterior"][-1]
            log_ratio = log_ratio.to(here) + part.log_ratio(here)
            for each, laws, own, mask in zip(
                "zg", q, part.gates_at(here), (program.z_mask, program.g_mask), strict=True
            ):
                if each in site:
                    q_each = NestedBernoulli(
                        laws.log_probs[:, None], validate_args=False
                    )  # (M, 1, ...) against (S, ...)
                    kl = torch.where(mask, kl_divergence(q_each, own), 0.0)
                    log_ratio = log_ratio - kl.flatten(2).sum(-1).mean(0)
    return Rates(tuple(names), *(torch.cat(columns, -1) for columns in drawn.values()), log_ratio)


@contextlib.contextmanager
def seeded(program: GateProgram, seed: int):
    """Random numbers on the program's device from this seed, and then as if nothing had been drawn."""
    device = program.log_scale.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def mean_kl(program: BayesianLoRA, *, seed: int = 0) -> tuple[float, float]:
    """KL(guide || prior) of the bit gates and of the rank gates, in nats: the mean of 100 estimates.

    They are all the same but for a guide or a prior whose KL is sampled. Seeded as `draw` is.
    """
    with seeded(program, seed):
        estimates = torch.stack([torch.stack(program.kl()) for _ in range(_KL_DRAWS)])  # (draws, 2)
    kl_z, kl_g = estimates.double().mean(0).tolist()
    return kl_z, kl_g


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predictions for E examples under S draws of the gates (or under the deployed allocation, S = 1).

    outputs (S, E, C): what the likelihood averages over draws, probabilities or means; log_likelihood (S, E) in nats;
    labels (E,), or as the likelihood has them.
    """

    outputs: Tensor
    log_likelihood: Tensor
    labels: Tensor
    likelihood: Likelihood

    def restored(self, order: Tensor) -> "Prediction":
        """The same with example i at place order[i]: undoes an evaluation order, in which some may come twice."""
        back = torch.empty(int(order.max()) + 1, dtype=torch.long)
        back[order] = torch.arange(len(order))
        return dataclasses.replace(
            self, outputs=self.outputs[:, back], log_likelihood=self.log_likelihood[:, back], labels=self.labels[back]
        )

    @classmethod
    def joined(cls, parts: list["Prediction"]) -> "Prediction":
        """Examples of several predictions under the same draws, one after the other."""
        outputs, log_likelihood = (torch.cat([getattr(p, x) for p in parts], 1) for x in ("outputs", "log_likelihood"))
        return cls(outputs, log_likelihood, torch.cat([p.labels for p in parts]), parts[0].likelihood)

    def of_draws(self, which: slice) -> "Prediction":
        """The same for some of the draws only."""
        return dataclasses.replace(self, outputs=self.outputs[which], log_likelihood=self.log_likelihood[which])

    @property
    def mean(self) -> Tensor:
        """(E, C) averaged over draws."""
        return self.outputs.mean(0)

    @property
    def decision(self) -> Tensor:
        """The answers, (E,) or as a label is."""
        return self.likelihood.decision(self.mean)

    @property
    def log_score(self) -> Tensor:
        """(E,) log posterior-predictive density: of the mean over draws, nats."""
        return self.log_likelihood.logsumexp(0) - math.log(len(self.log_likelihood))

    @property
    def nll(self) -> float:
        """Mean negative log score, nats an example."""
        return -self.log_score.mean().item()

    def calibration(self) -> dict[str, float | None]:
        """Expected calibration error (15 equal bins of confidence) and Brier score; None without a confidence."""
        if not self.likelihood.has_confidence:
            return {"ece": None, "brier": None}
        mean = self.mean
        return {"ece": ece(mean, self.labels, ECE_BINS), "brier": brier(mean, self.labels)}


@torch.no_grad()
def predict(
    program: GateProgram, batches: Iterable[tuple[dict, Tensor]], *, gates: Gates | None = None,
    weights: Tensor | None = None, dropout_seed: int | None = None,
) -> Prediction:  # fmt: skip
    """Outputs and pointwise log-likelihood of every example under each draw: a forward for each distinct one.

    Draws take turns with a few batches at a time, so that weights are rounded once for them, and memory does not grow
    with the draws but for what is returned. Where the weights' law is `linearized`, a backward pass a class in place of
    a forward a draw.
    batches: (inputs, labels). gates: draws with a leading S, from `draw`; None for the deployed allocation. weights:
    (S, D), from `draw_weights`; None for their mean. dropout_seed: None for no dropout, when identical draws are run
    once; else every draw has dropout masks of its own, from this seed.
    """
    if gates is None:
        gates = Gates(*(x[None] for x in deployed(program)))
    which = _distinct(gates.z, gates.g, *(() if weights is None else (weights,)))
    if dropout_seed is not None:
        which = torch.arange(len(gates.z))
    firsts = [(which == i).nonzero()[0].item() for i in range(int(which.max()) + 1)]
    first = Gates(gates.z[firsts], gates.g[firsts]), None if weights is None else weights[firsts]
    training, batches = program.training, iter(batches)
    parts, logits_of = [], _linearized if weights is not None and program.weights.linearized else _logits
    program.train(dropout_seed is not None)
    with seeded(program, dropout_seed or 0):
        while chunk := list(itertools.islice(batches, _TOGETHER)):
            inputs, labels = [x for x, _ in chunk], torch.cat([y for _, y in chunk])
            law = program.likelihood(logits_of(program, inputs, *first), scale=program.log_scale.exp())
            outputs = program.likelihood.averaged(law)  # (distinct, E, C)
            outputs, log_likelihood = outputs[which].cpu(), law.log_prob(labels)[which].cpu()
            parts.append(Prediction(outputs, log_likelihood, labels.cpu(), program.likelihood))
    program.train(training)
    if not parts:
        raise ValueError("there are no examples to predict")
    return Prediction.joined(parts)


def _distinct(*draws: Tensor) -> Tensor:
    """(S,) equal numbers for equal draws."""
    return torch.unique(torch.cat([x.flatten(1).float() for x in draws], -1), dim=0, return_inverse=True)[1]


def _logits(program: GateProgram, batches: list[dict], gates: Gates, weights: Tensor | None) -> Tensor:
    """(S, E, C) at each draw."""
    each = zip(*gates, [None] * len(gates.z) if weights is None else weights, strict=True)
    return torch.stack([torch.cat(program.each_logits(batches, Gates(z, g), w)) for z, g, w in each])


def _linearized(program: GateProgram, batches: list[dict], gates: Gates, weights: Tensor) -> Tensor:
    """(S, E, C) of the network linearized in its weights at their mean, at each draw's gates."""
    shift, which, found = weights - program.weights.mean, _distinct(*gates), []
    for i in range(int(which.max()) + 1):
        mine = (which == i).nonzero().squeeze(-1)
        at = Gates(gates.z[mine[0]], gates.g[mine[0]])
        pairs = (jacobians(program, inputs, at) for inputs in batches)
        found.append((mine, torch.cat([f + torch.einsum("bcd,sd->sbc", J, shift[mine]) for J, f in pairs], 1)))
    order = torch.cat([mine for mine, _ in found]).argsort()
    return torch.cat([logits for _, logits in found])[order]


@torch.no_grad()
def divergences(program: BayesianLoRA) -> Gates:
    """KL(posterior || prior) of each chain in nats; 0 where a tensor does not exist.  z (L, T), g (L,)."""
    q, p = program.gate_guide.posterior(), program.prior()
    return Gates(
        torch.where(program.z_mask, kl_divergence(q.z, p.z), 0.0),
        torch.where(program.g_mask, kl_divergence(q.g, p.g), 0.0),
    )
