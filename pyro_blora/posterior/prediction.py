"""Predictions averaged over draws of the gates and weights.

Shapes: S draws, E examples; `*` further dimensions of an example's outcome, see tasks/likelihoods.py.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gates import Gates
from ..program import GateProgram
from ..tasks.likelihoods import IGNORED, Likelihood
from .calibration import BINS, brier, ece
from .draws import deployed, seeded
from .jacobians import jacobians

ECE_BINS = BINS[0]
_TOGETHER = 16  # batches that are predicted at the same gates, one after the other


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predictions for E examples under S draws of the gates (or under the deployed allocation, S = 1).

    outputs (S, E, *): what the likelihood averages over draws, probabilities or means; log_likelihood (S, E) in nats;
    labels (E, *), as the likelihood scores them.
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
        outputs, log_likelihood = (_joined([getattr(p, x) for p in parts], 1) for x in ("outputs", "log_likelihood"))
        return cls(outputs, log_likelihood, _joined([p.labels for p in parts], 0, IGNORED), parts[0].likelihood)

    def of_draws(self, which: slice) -> "Prediction":
        """The same for some of the draws only."""
        return dataclasses.replace(self, outputs=self.outputs[which], log_likelihood=self.log_likelihood[which])

    @property
    def mean(self) -> Tensor:
        """(E, *) averaged over draws."""
        return self.likelihood.mean(self.outputs)

    @property
    def decision(self) -> Tensor:
        """The answers, (E, *) as the labels are."""
        return self.likelihood.decision(self.mean)

    @property
    def log_score(self) -> Tensor:
        """(E,) log posterior-predictive density: of the mean over draws, nats."""
        return self.log_likelihood.logsumexp(0) - math.log(len(self.log_likelihood))

    @property
    def nll(self) -> float:
        """Mean negative log score, nats per example."""
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
    with the draws but for what is returned. Where the weights' distribution is `linearized`, one
    backward pass per class replaces one forward pass per draw.
    batches: (inputs, labels). gates: draws with a leading S, from `draw`; None for the deployed allocation, in the
    exact arithmetic of a packed model (`use_gates`). weights:
    (S, D), from `draw_weights`; None for their mean. dropout_seed: None for no dropout, when identical draws are run
    once; else every draw has its own dropout masks, from this seed.
    """
    exact = gates is None
    if gates is None:
        gates = Gates(*(x[None] for x in deployed(program)))
    which = _distinct(gates.z, gates.g, *(() if weights is None else (weights,)))
    if dropout_seed is not None:
        which = torch.arange(len(gates.z))
    firsts = [int((which == i).nonzero()[0]) for i in range(int(which.max()) + 1)]
    first, theta = Gates(gates.z[firsts], gates.g[firsts]), None if weights is None else weights[firsts]
    training, batches = program.training, iter(batches)
    kind, scale = program.likelihood, program.log_scale.exp()
    is_linearized = weights is not None and program.weights.linearized
    logits_of: Callable[..., Iterator[Iterable[Tensor]]] = (
        _linearized if is_linearized else functools.partial(_logits, exact=exact)
    )
    parts = []
    program.train(dropout_seed is not None)
    with seeded(program, dropout_seed or 0):
        while chunk := list(itertools.islice(batches, _TOGETHER)):
            inputs, labels = zip(*chunk, strict=True)
            outputs, log_likelihood = _answers(kind, scale, logits_of(program, inputs, first, theta), labels)
            scored = _joined([kind.scored(y) for y in labels], 0, IGNORED)
            parts.append(Prediction(outputs[which].cpu(), log_likelihood[which].cpu(), scored.cpu(), kind))
    program.train(training)
    if not parts:
        raise ValueError("there are no examples to predict")
    return Prediction.joined(parts)


def _answers(
    kind: Likelihood, scale: Tensor, logits: Iterator[Iterable[Tensor]], labels: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(what is averaged (S, E, *), log-likelihood (S, E)) of the logits of each batch at each draw."""

    def of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        distribution = kind(x, scale=scale)
        return kind.averaged(distribution, y), distribution.log_prob(y)

    if kind.one_row:
        return of(torch.stack([torch.cat([*each]) for each in logits]), torch.cat([*labels]))
    found = []  # batch by batch: those of a vocabulary are large
    for each in logits:
        outputs, scores = zip(*(of(x, y) for x, y in zip(each, labels, strict=True)), strict=True)
        found.append((_joined(outputs, 0), torch.cat(scores)))
    averaged, log_likelihoods = (torch.stack(x) for x in zip(*found, strict=True))
    return averaged, log_likelihoods


def _joined(parts: Sequence[Tensor], dim: int, fill: float = 0.0) -> Tensor:
    """One after the other along a dimension, the others filled up to the longest."""
    shape = [max(sizes) for sizes in zip(*(x.shape for x in parts), strict=True)]
    missing = [[(0, n - m) for n, m in zip(shape, x.shape, strict=True)] for x in parts]
    for pairs in missing:
        pairs[dim] = (0, 0)
    pads = ([end for pair in reversed(pairs) for end in pair] for pairs in missing)
    return torch.cat([F.pad(x, pad, value=fill) if any(pad) else x for x, pad in zip(parts, pads, strict=True)], dim)


def _distinct(*draws: Tensor) -> Tensor:
    """(S,) equal numbers for equal draws."""
    return torch.unique(torch.cat([x.flatten(1).float() for x in draws], -1), dim=0, return_inverse=True)[1]


def _logits(
    program: GateProgram, batches: Sequence[dict], gates: Gates, weights: Tensor | None, *, exact: bool
) -> Iterator[Iterable[Tensor]]:
    """At each draw those of each batch, (B, *)."""
    for z, g, theta in zip(*gates, [None] * len(gates.z) if weights is None else weights, strict=True):
        yield program.each_logits(batches, Gates(z, g), theta, exact=exact)


def _linearized(
    program: GateProgram, batches: Sequence[dict], gates: Gates, weights: Tensor
) -> Iterator[Iterable[Tensor]]:
    """The same of the network linearized in its weights at their mean, at each draw's gates."""
    shift, which = weights - program.weights.mean, _distinct(*gates)
    found: list[list[Tensor]] = [[] for _ in which]
    for i in range(int(which.max()) + 1):
        mine = (which == i).nonzero().squeeze(-1)
        at = Gates(gates.z[mine[0]], gates.g[mine[0]])
        for inputs in batches:
            J, logits = jacobians(program, inputs, at)
            moved = torch.einsum("bcd,sd->sbc", J.flatten(1, -2), shift[mine])
            for draw, change in zip(mine.tolist(), moved, strict=True):
                found[draw].append(logits + change.view_as(logits))
    yield from found
