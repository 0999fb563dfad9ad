"""Predictions averaged over draws of the gates and weights. Shapes: S draws, E examples, C classes."""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..gates import Gates
from ..program import GateProgram
from ..tasks.likelihoods import Likelihood
from .calibration import BINS, brier, ece
from .draws import deployed, seeded
from .jacobians import jacobians

ECE_BINS = BINS[0]
_TOGETHER = 16  # batches that are asked for at the same gates, one after the other


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
