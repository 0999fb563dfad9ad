"""Bias and variance of gradient estimators of E_q[NLL] in the guide's parameters, against enumeration.

    relative bias   ||mean g - g*|| / ||g*||, and the same norm of its Monte Carlo error, which is its noise floor
    variance        E ||g - mean g||^2 / ||g*||^2, times the forwards of one estimate: at equal cost

Shapes: P parameters of the guide, S estimates.   Units: nats an example.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from pyro_blora.elbos import ELBOS, Evaluation, GateELBO
from pyro_blora.gates import Gates
from pyro_blora.guides import components
from pyro_blora.program import GateProgram

from . import rivals
from .problems import Problem
from .states import best_on_table

TEMPERATURES = (1.0, 0.5, 0.1)
GUIDES = ("prior", "undecided", "converged")


@dataclasses.dataclass(frozen=True)
class Estimator:
    """forwards: of the network in one estimate; soft: whether the gradient goes through the network."""

    name: str
    elbo: GateELBO
    temperature: float
    forwards: int
    soft: bool


def estimators() -> list[Estimator]:
    """Those of the package, at every temperature used, and the rivals."""
    found = [Estimator(f"{name}, τ = {t:g}", ELBOS.resolve(name)(), t, 1, True)
             for name in ("relaxed", "straight_through") for t in TEMPERATURES]  # fmt: skip
    found.append(Estimator("ReinMax", rivals.ReinMax(), 1.0, 1, True))
    found.append(Estimator("score_function (DisARM)", ELBOS.resolve("score_function")(), 1.0, 2, False))
    found.append(Estimator("DisARM, no parent mask", rivals.UnmaskedDisarm(), 1.0, 2, False))
    found.append(Estimator("RLOO, 2 draws", rivals.LeaveOneOut(), 1.0, 2, False))
    found.append(Estimator("REINFORCE, 2 draws", rivals.Reinforce(), 1.0, 2, False))
    return found


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of one estimator at one guide; see the module."""

    bias: float
    bias_error: float
    variance: float


def place(program: GateProgram, problem: Problem, where: str) -> None:
    """Put a mean-field guide at the `prior`, at log-odds 0 (`undecided`), or at the exact optimum (`converged`)."""
    states, prior, guide = problem.table.states, problem.prior(), program.gate_guide
    distribution = states.log_prior.exp()
    if where == "converged":
        distribution = best_on_table(states, problem.table.log_joint, restarts=4, steps=300)[0].exp()
    with torch.no_grad():
        for c, (site, index) in enumerate(states.chains):
            wanted = (
                torch.zeros(states.sizes[c], dtype=distribution.dtype)
                .index_add(0, states.depths[:, c], distribution)
                .log()
            )
            if where == "undecided":
                gates = states.sizes[c] - 1
                wanted = -torch.log(torch.tensor(2.0)) * torch.tensor([*range(1, gates + 1), gates])
            evidence = (wanted - prior[site].depth_log_probs[index]).diff()
            (guide.z_evidence, guide.g_evidence)[site][(0, *index)] = evidence.float()


def gradient(program: GateProgram, value: Tensor) -> Tensor:
    """(P,)"""
    parameters = list(program.gate_guide.parameters())
    slopes = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([slope.flatten() for slope in slopes])


def exact_gradient(program: GateProgram, problem: Problem) -> Tensor:
    """Of the mean NLL an example, by enumeration, (P,)."""
    log_q = problem.table.states.log_q(components(program.gate_guide))
    return gradient(program, problem.table.expected_nll(log_q) / len(problem.labels))


class _LookedUp(Evaluation):
    """An evaluation whose NLL is found in the problem's table."""

    def __init__(self, problem: Problem, *arguments, **more):
        super().__init__(*arguments, **more)
        self.problem = problem

    def nll(self, gates: Gates) -> Tensor:
        return self.problem.looked_up(gates)


def sampled(estimator: Estimator, program: GateProgram, problem: Problem, draws: int) -> Tensor:
    """(S, P) estimates. Where no gradient goes through the network, an NLL is looked up in the table."""
    elbo, evaluation = estimator.elbo, Evaluation if estimator.soft else functools.partial(_LookedUp, problem)
    program.elbo, program.temperature = elbo, estimator.temperature
    pair, batch = (program.model, program.guide), (problem.inputs, problem.labels)
    return torch.stack([
        gradient(program, elbo.expected_nll(evaluation(*pair, batch, draw=elbo.draw, component=elbo.first)))
        for _ in range(draws)
    ])  # fmt: skip


def quality(estimates: Tensor, exact: Tensor, forwards: int) -> Quality:
    """From (S, P) estimates and the exact (P,)."""
    scale, mean = exact.norm(), estimates.mean(0)
    spread = estimates.var(0).sum()
    error = (spread / len(estimates)).sqrt()
    return Quality(
        bias=((mean - exact).norm() / scale).item(), bias_error=(error / scale).item(),
        variance=(spread / scale**2 * forwards).item(),
    )  # fmt: skip
