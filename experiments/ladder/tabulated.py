"""The same posterior without the network: every example's log-likelihood and its slopes, in a table of all states.

At ladders of 0 and 1 a program of the table has the value and the gradient in the gates that the network has, for any
batch, so that all estimates but those at soft gates can be compared in milliseconds a step.
Shapes: S states, N examples; z (L, T, K), g (L, R - 1).   Units: nats an example.
"""

import dataclasses
import functools

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_blora.adapters import observed
from pyro_blora.gates import Gates
from pyro_blora.program import GateProgram
from pyro_blora.quantizer import quantize_mixture
from pyro_blora.training.gate_init import Sensitivity

from .batched import EachItsOwn
from .problems import LinearGaussian, Problem
from .states import States


@dataclasses.dataclass(frozen=True)
class Examples:
    """value (S, N): log-likelihoods. slopes: theirs. directions: slopes of the log-likelihood of an outcome that is
    drawn at the state, whose mean products are the Fisher information; both z (S, N, L, T, K), g (S, N, L, R - 1).
    """

    states: States
    value: Tensor
    slopes: Gates
    directions: Gates

    @classmethod
    def of(cls, problem: Problem) -> "Examples":
        """One forward and two backward passes for each state, in which every example has gates of its own."""
        program, states, rows = problem.program(), problem.table.states, []
        free = program.gate_guide.z_pins.isnan().any(-1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for state in zip(*states.gates, strict=True):
                gates = Gates(*(x.expand(len(problem.labels), *x.shape).clone().requires_grad_() for x in state))
                outcome = program.likelihood(_logits(program, problem.inputs, gates, free), scale=torch.ones(()))
                value = outcome.log_prob(problem.labels)
                slopes, directions = (
                    torch.autograd.grad(x.sum(), tuple(gates), retain_graph=True, materialize_grads=True,
                                        allow_unused=True)
                    for x in (value, outcome.log_prob(outcome.sample().detach()))
                )  # fmt: skip
                rows.append((value.detach(), *slopes, *directions))
        value, *slopes = (torch.stack(x) for x in zip(*rows, strict=True))
        return cls(states, value, Gates(*slopes[:2]), Gates(*slopes[2:]))


def _logits(program: GateProgram, inputs: dict, gates: Gates, free: Tensor) -> Tensor:
    """At gates of each example's own.  z (N, L, T, K), g (N, L, R - 1); free (L, T)"""
    if isinstance(program, LinearGaussian):
        return (inputs["x"] * program.weight * gates.z.flatten(1)).sum(-1)
    with observed(program.net, _EachExample(program.net, gates, free)):
        return program.net.logits(**inputs)


class _EachExample(EachItsOwn):
    """Rounds a weight once to each width, rather than once for each example."""

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.exact[projection][tensor]:
            return F.linear(x, weight, bias)
        mixture = self.weights[:, projection, tensor]  # (N, 5)
        widths = [quantize_mixture(weight, self.ranges[projection, tensor], one) for one in torch.eye(mixture.shape[1])]
        maps = torch.einsum("nb,bij->nij", mixture, torch.stack(widths))
        y = (x.reshape(len(maps), -1, x.shape[-1]) @ maps.mT).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


class Tabulated(GateProgram):
    """A program whose batches are numbers of examples, and whose `logits` are their log-likelihoods."""

    def __init__(self, examples: Examples, layout, prior, guide, **settings):
        super().__init__(layout, prior, guide, lambda value, scale: dist.Unit(value), **settings)
        self.examples = examples

    def logits(self, inputs: dict, gates: Gates, theta: Tensor | None = None) -> Tensor:
        at = self.examples.states.index(gates), inputs["example"]
        value = self.examples.value[at]
        for slopes, x in zip(self.examples.slopes, gates, strict=True):
            value = value + slopes[at].flatten(1) @ (x - x.detach()).flatten()
        return value

    def curvature(self, gates: Gates) -> Gates:
        """As the package estimates it when the gates start (training/gate_init.py), but from slopes at these gates.

        z (L, T, K + 1, K + 1), g (L, R, R)
        """
        at = self.examples.states.index(gates)
        z, g = (F.pad(-x[at].flip(-1).cumsum(-1).flip(-1), (0, 1)) for x in self.examples.directions)
        types = [p.type for p in self.layout.projections]
        return Sensitivity.of(z, g, torch.tensor([types.index(kind) for kind in types])).curvature


def tabulated(problem: Problem) -> Problem:
    """The same problem on the table of its examples."""
    examples, rows = Examples.of(problem), torch.arange(len(problem.labels))
    return dataclasses.replace(
        problem,
        make=functools.partial(Tabulated, examples, problem.layout),
        inputs={"example": rows},
        labels=torch.empty(len(rows), 0),
    )
