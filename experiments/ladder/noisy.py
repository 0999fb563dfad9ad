"""How fast the gates learn where every step's log-likelihood is noisy, by optimizer and estimate of the gradient.

A step sees the log-likelihood plus a random linear function of the gates, sum of noise * epsilon * z with epsilon
standard normal: what a small batch adds to the data's slopes; or it sees a batch. Every estimator meets the same noise.
Shapes: N examples; z (L, T, K), g (L, R - 1).   Units: nats, of all data.
"""

import contextlib

import torch
from torch import Tensor

from pyro_blora.config import RunConfig
from pyro_blora.elbos import Evaluation, GateELBO
from pyro_blora.gates import Gates
from pyro_blora.guides import components
from pyro_blora.program import GateProgram
from pyro_blora.training import Schedule
from pyro_blora.training.natural_gradient import NaturalGradient

from .problems import Problem, twelve_gates
from .rivals import RENEWAL, Renewed
from .states import best_on_table

RIVALS = {  # estimator, and Adam's first rate or None for natural gradients
    "natural gradients, `gauss_newton`": ("gauss_newton", None),
    "natural gradients, `relaxed` over the Fisher matrix": ("relaxed", None),
    "natural gradients, `straight_through` over the Fisher matrix": ("straight_through", None),
    "natural gradients, `score_function` (DisARM) over the Fisher matrix": ("score_function", None),
    "Adam at .1 (as shipped), `relaxed`": ("relaxed", 0.1),
    "Adam at .02, `relaxed`": ("relaxed", 0.02),
}


class _Noisy(Evaluation):
    def __init__(self, problem: Problem, noise: float, *arguments, **more):
        super().__init__(*arguments, **more)
        self.slopes = [noise / len(problem.labels) * torch.randn(x.shape[-3 + i :]) for i, x in enumerate(self.gates)]

    def nll(self, gates: Gates) -> Tensor:
        return super().nll(gates) + sum((slope * x).sum() for slope, x in zip(self.slopes, gates, strict=True))


def loss(program: GateProgram, problem: Problem, noise: float, batch: int | None = None) -> Tensor:
    """-ELBO / N at one draw, with noise.  batch: how many examples it sees, of all; None: all."""
    elbo: GateELBO = program.elbo
    held = program.gate_guide.held() if elbo.natural else contextlib.nullcontext()
    with held:
        rows = slice(None) if batch is None else torch.randperm(len(problem.labels))[:batch]
        seen = {name: x[rows] for name, x in problem.inputs.items()}, problem.labels[rows]
        at = _Noisy(problem, noise, program.model, program.guide, seen, draw=elbo.draw, component=elbo.first)
        nll = elbo.expected_nll(at)
        return nll + sum(elbo.divergences(at).values()) / len(problem.labels)


def learned(
    program: GateProgram, problem: Problem, *, steps: int, noise: float = 5.0, batch: int | None = None,
    adam: float | None = None, seed: int = 0,
) -> GateProgram:  # fmt: skip
    """Fit the guide by natural gradients, or by Adam with the package's schedule from the rate `adam` on."""
    schedule = Schedule(RunConfig(kl_warmup=0.0, lr_gates=adam or 0.1), steps, steps)
    parameters = list(program.gate_guide.parameters())
    optimizer = torch.optim.Adam(parameters) if adam else None
    natural = None if adam else NaturalGradient(program)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            program.temperature = schedule.temperature(step)
            if isinstance(program.elbo, Renewed) and step % RENEWAL == 0:
                program.elbo.renew(program, problem)
            slopes = torch.autograd.grad(loss(program, problem, noise, batch), parameters, allow_unused=True)
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            if natural:
                natural.step(torch.tensor(False))
            else:
                optimizer.param_groups[0]["lr"] = schedule.learning_rate("gates", step)
                optimizer.step()
    return program


def curvature_of(problem: Problem) -> Gates:
    """Of a linear Gaussian problem: mean products of the changes by which closing a gate moves the mean of the data."""
    changes = problem.inputs["x"] * problem.program().weight  # (N, gates)
    z = torch.zeros(changes.shape[1], 1, 2, 2)
    z[:, 0, 0, 0] = changes.square().mean(0)
    return Gates(z, torch.zeros(len(z), 1, 1))


def table(*, problems: int = 3, seeds: int = 2, steps: tuple[int, ...] = (500, 2000), noise: float = 5.0) -> str:
    """Gaps of the ELBO to the exact mean field by optimizer and estimator, least, median and largest; markdown."""
    lines = [f"| gates by | {' | '.join(f'{n:,} steps' for n in steps)} |", "|---|" + "---|" * len(steps)]
    known = [(twelve_gates(seed), best_elbo(twelve_gates(seed))) for seed in range(problems)]
    for name, (estimator, adam) in RIVALS.items():
        gaps = torch.tensor([
            [_gap(problem, best, estimator, adam, n, noise, seed) for n in steps]
            for problem, best in known for seed in range(seeds)
        ])  # fmt: skip
        cells = [f"{x.min():.2f}, {x.median():.2f}, {x.max():.2f}" for x in gaps.T]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def best_elbo(problem: Problem) -> float:
    """Of the exact mean field."""
    return problem.table.elbo(best_on_table(problem.table.states, problem.table.log_joint, restarts=4, steps=300)[0])


def _gap(problem, best: float, estimator: str, adam: float | None, steps: int, noise: float, seed: int) -> float:
    program = problem.program(estimator=estimator)
    if program.elbo.needs_curvature:
        program.elbo.take_curvature(curvature_of(problem))
    return gap(learned(program, problem, steps=steps, noise=noise, adam=adam, seed=seed), problem, best)


def gap(program: GateProgram, problem: Problem, best: float) -> float:
    """Of the ELBO to the exact mean field's, nats."""
    return best - problem.table.elbo(problem.table.states.log_q(components(program.gate_guide)))
