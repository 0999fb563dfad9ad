"""Estimates of the gates' natural gradient compared: bias, noise, and what natural gradients reach with them.

The target of a gate is t = -N dE_q[NLL]/dm, m the marginals of its ladder: at depth k, how much larger the expected
log-likelihood is there than at k - 1, the other ladders as distributed. An estimate is what one step of
`NaturalGradient` averages; of an estimator of another gradient that is e + (F + damping I)^-1 (N gradient), F the
Fisher matrix of the ladder, so that damping draws it to the present log Bayes factor e.

    bias    of the mean of estimates from all examples without noise, root mean square over free gates
    noise   standard deviation of estimates as a step sees them, root mean square, times the root of their forwards
    gap     of the ELBO to the exact mean field, after steps of natural gradients

Shapes: N examples, G free gates.   Units: nats, of all data.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pyro_blora.elbos import ELBOS, GateELBO
from pyro_blora.elbos.gauss_newton import GaussNewton
from pyro_blora.gates import Gates
from pyro_blora.program import GateProgram
from pyro_blora.training.gate_init import sensitivity
from pyro_blora.training.natural_gradient import NaturalGradient

from . import rivals
from .gradients import place
from .noisy import best_elbo, curvature_of, gap, learned, loss
from .problems import Network, Problem, twelve_gates
from .starts import batches, ranges
from .states import by_depth, coordinate_sweep, depth_distributions
from .tabulated import tabulated

GUIDES = ("undecided", "converged")
STEPS = (100, 500, 2000)
_SWEEPS = 30  # of exact coordinate ascent, from gradient ascent: gates far from undecided converge slowly by that
_TEMPERATURE = 0.1  # of relaxed draws: where training ends


@dataclasses.dataclass(frozen=True)
class Estimate:
    """forwards: of a batch, in a step. renewals: of all examples, every `rivals.RENEWAL` steps. soft: not on a table"""

    name: str
    elbo: Callable[[], GateELBO]
    forwards: int = 1
    renewals: int = 0
    curved: bool = False
    soft: bool = False


ESTIMATES = [
    Estimate("`gauss_newton`, curvature of the start", GaussNewton, curved=True),
    Estimate("`gauss_newton` without curvature", GaussNewton),
    Estimate("`gauss_newton`, curvature anew every 100 steps", rivals.NewCurvature, renewals=1),
    Estimate("`relaxed` over the Fisher matrix", ELBOS.resolve("relaxed"), soft=True),
    Estimate("`straight_through` over the Fisher matrix", ELBOS.resolve("straight_through")),
    Estimate("`score_function` (DisARM) over the Fisher matrix", ELBOS.resolve("score_function"), forwards=2),
    Estimate("path, a quarter of the ladders at a time", rivals.Path, soft=True),
    Estimate("`gauss_newton` with a control variate (SVRG)", rivals.Anchored, forwards=2, renewals=1, curved=True),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem, and the same on a table. curvature: of the start. noise, batch: what a step sees (noisy.py)."""

    problem: Problem
    table: Problem
    curvature: Gates
    noise: float
    batch: int | None

    @classmethod
    def twelve(cls, seed: int) -> "Case":
        problem = twelve_gates(seed)
        return cls(problem, tabulated(problem), curvature_of(problem), 5.0, None)

    @classmethod
    def network(cls) -> "Case":
        """Its start is the package's: one pass of slopes with all gates open."""
        problem = Network().problem()
        program = problem.program()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            curvature = sensitivity(program, batches(problem), ranges(program)).curvature
        return cls(problem, tabulated(problem), curvature, 0.0, 16)

    def forwards(self, estimate: Estimate) -> float:
        whole = 1 if self.batch is None else len(self.problem.labels) / self.batch
        return estimate.forwards + estimate.renewals * whole / rivals.RENEWAL

    def posed(self, estimate: Estimate) -> tuple[GateProgram, Problem]:
        """A program with this estimate, and the problem that it is of."""
        problem = self.problem if estimate.soft else self.table
        program = problem.program()
        program.elbo = estimate.elbo()
        program.elbo.check(program.gate_guide)
        if estimate.curved:
            program.elbo.take_curvature(self.curvature)
        return program, problem


def exact_targets(problem: Problem, log_q: Tensor) -> Tensor:
    """(G,), by enumeration, at a mean field.  log_q (S,)"""
    table = problem.table
    distributions = depth_distributions(table.states, log_q)
    means = [by_depth(table.states, table.log_likelihood, distributions, c) for c in range(len(distributions))]
    return torch.cat([mean.diff() for mean in means])


def targets(program: GateProgram, problem: Problem, draws: int, noise: float = 0.0, batch: int | None = None) -> Tensor:
    """(draws, G) estimates at the present guide: the first average of a natural gradient is its target."""
    natural, guide, found = NaturalGradient(program), program.gate_guide, []
    parameters = [guide.z_evidence, guide.g_evidence]
    for draw in range(draws):
        if isinstance(program.elbo, rivals.Renewed) and draw % rivals.RENEWAL == 0:
            program.elbo.renew(program, problem)
        value = loss(program, problem, noise, batch)
        slopes = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope
        natural.state.clear()
        natural.step(torch.tensor(False), share=0.0)
        first = [natural.state[p]["mean"][0] if p in natural.state else None for p in parameters]
        found.append(torch.cat([first[site][index] for site, index in problem.table.states.chains]))
    return torch.stack(found).double()


def quality(case: Case, estimate: Estimate, where: str, guides: dict[str, dict], draws: int) -> dict[str, float]:
    """Bias, its Monte Carlo error, and noise at a guide, from as many draws for each."""
    program, problem = case.posed(estimate)
    program.gate_guide.load_state_dict(guides[where], strict=False)
    program.temperature = _TEMPERATURE
    exact = exact_targets(problem, problem.table.states.log_q(program.gate_guide.components()).detach())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clean = targets(program, problem, draws)
        seen = targets(program, problem, draws, case.noise, case.batch)
    return {
        "bias": (clean.mean(0) - exact).square().mean().sqrt().item(),
        "error": (clean.var(0) / draws).mean().sqrt().item(),
        "noise": (seen.var(0).mean() * case.forwards(estimate)).sqrt().item(),
    }


def compared(cases: list[Case], kept: Path, *, seeds: int, draws: int = 300) -> Iterator[tuple[str, dict]]:
    """A row for each estimate: its quality on the first case, and gaps on all.  kept: a file of finished rows."""
    rows = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    best = [best_elbo(case.problem) for case in cases]
    guides = {where: _placed(cases[0].table, where) for where in GUIDES}
    for estimate in ESTIMATES:
        if estimate.name not in rows:
            row = {where: quality(cases[0], estimate, where, guides, draws) for where in GUIDES}
            row["gaps"] = {str(steps): [
                _gap(case, estimate, value, steps, seed)
                for case, value in zip(cases, best, strict=True) for seed in range(seeds)
            ] for steps in STEPS}  # fmt: skip
            rows[estimate.name] = row
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        yield estimate.name, rows[estimate.name]


def _placed(problem: Problem, where: str) -> dict[str, Tensor]:
    """A guide's state; where it is `converged`, every log Bayes factor is its target."""
    program, states = problem.program(), problem.table.states
    place(program, problem, where)
    if where == "converged":
        log_q = states.log_q(program.gate_guide.components()).detach()
        for _ in range(_SWEEPS):
            log_q = coordinate_sweep(states, problem.table.log_joint, log_q)
        exact = exact_targets(problem, log_q).float().split([size - 1 for size in states.sizes])
        with torch.no_grad():
            for (site, index), e in zip(states.chains, exact, strict=True):
                program.gate_guide.factors(0)[site][index] = e
    return dict(program.gate_guide.state_dict())


def _gap(case: Case, estimate: Estimate, best: float, steps: int, seed: int) -> float:
    program, problem = case.posed(estimate)
    learned(program, problem, steps=steps, noise=case.noise, batch=case.batch, seed=seed)
    return gap(program, problem, best)


def table(rows: Iterator[tuple[str, dict]]) -> str:
    """Markdown; gaps are least, median and largest."""
    lines = ["| estimate | bias, undecided | bias, converged | noise, undecided | noise, converged | "
             + " | ".join(f"gap, {n:,} steps" for n in STEPS) + " |", "|---|" + "---|" * (4 + len(STEPS))]  # fmt: skip
    for name, row in rows:
        biases = [f"{row[where]['bias']:.2f} ± {row[where]['error']:.2f}" for where in GUIDES]
        noises = [f"{row[where]['noise']:.1f}" for where in GUIDES]
        gaps = [torch.tensor(row["gaps"][str(n)]) for n in STEPS]
        spans = [f"{x.min():.2f}, {x.quantile(0.5):.2f}, {x.max():.2f}" for x in gaps]
        lines.append(f"| {' | '.join([name, *biases, *noises, *spans])} |")
    return "\n".join(lines)


def twelve_table(keep: Path, *, problems: int = 3, seeds: int = 1) -> str:
    return table(compared([Case.twelve(seed) for seed in range(problems)], keep / "twelve.json", seeds=seeds))


def network_table(keep: Path, *, seeds: int = 2) -> str:
    return table(compared([Case.network()], keep / "network.json", seeds=seeds))
