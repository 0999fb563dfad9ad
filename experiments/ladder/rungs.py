"""The rungs: what each measures, against thresholds that are never loosened. A miss is reported as a miss.

    a  without data, the guide returns the prior        e  simulation-based calibration (sbc.py)
    b  one gate with a closed-form posterior            f  the reported ELBO bounds the evidence from below
    c  twelve gates, 4,096 states                       g  training and evaluation use one distribution
    d  the real adapter layers in a tiny BERT

Every function takes its sizes, so that the same code runs in the report and, in small, in the tests.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor

from pyro_blora import posterior
from pyro_blora.gates import NestedBernoulli
from pyro_blora.guides import components, draw_gates
from pyro_blora.program import GateProgram

from .fitting import naive_pairing, svi
from .parallel import in_parallel
from .problems import Problem, one_gate, prior_only
from .states import best_on_table

# rung: {quantity: (what is measured, its bound)}; every quantity is at most its bound, a p-value at least
THRESHOLDS = {
    "a": {"probability": ("largest error of an open probability without data", 0.01)},
    "b": {"probability": ("largest error of P(open)", 0.02)},
    "c": {"marginal": ("largest error of a marginal against the exact posterior", 0.05),
          "elbo": ("ELBO below the exact mean field's, nats", 0.1),
          "mixture": ("a trained mixture's ELBO above the exact mean field's, nats, at least", 0.0)},
    "d": {"marginal": ("largest error of a marginal against the exact posterior", 0.05),
          "elbo": ("ELBO below the exact mean field's, nats", 0.1),
          "mixture": ("a trained mixture's ELBO above the exact mean field's, nats, at least", 0.0)},
    "e": {"gates": ("gate probabilities: p-value, Bonferroni over the gates, at least", 0.05 / 3),
          "effective rank": ("effective rank: p-value of the ECDF, at least", 0.05 / 3),
          "log-likelihood": ("log-likelihood: p-value of the ECDF, at least", 0.05 / 3)},
    "f": {"bound": ("largest ELBO minus log evidence over the guides, nats", 0.0),
          "reported": ("largest reported ELBO minus log evidence, standard errors of the former", 4.0),
          "monte_carlo": ("largest distance of the reported ELBO from the exact one, standard errors", 4.0)},
    "g": {"mode": ("gates deployed otherwise than by the rule, from the enumerated distribution", 0.0),
          "frequency": ("hard training draws against marginals: binomial p-value, Bonferroni, at least", 0.05)},
}  # fmt: skip
ESTIMATORS = ("relaxed", "straight_through", "score_function")
TEMPERATURES = (1.0, 0.5, 0.1)
FINAL_TEMPERATURE = 0.1
ONE_GATE = (  # estimators of rung b and their steps; soft draws at temperature 0.1 are noisy, so also with more of them
    ("relaxed", 4000), ("relaxed", 16_000), ("straight_through", 4000), ("straight_through", 16_000),
    ("score_function", 4000), ("enumerate", 1000),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report: `subject` is what was measured on, `quantity` a key of THRESHOLDS[rung]."""

    rung: str
    subject: str
    quantity: str
    measured: float

    @property
    def meaning(self) -> str:
        return THRESHOLDS[self.rung][self.quantity][0]

    @property
    def bound(self) -> float:
        return THRESHOLDS[self.rung][self.quantity][1]

    @property
    def passed(self) -> bool:
        return self.measured >= self.bound if self.meaning.endswith("at least") else self.measured <= self.bound


@dataclasses.dataclass(frozen=True)
class Fit:
    """A distribution of the free gates against the exact one: marginals (G,), ELBO by enumeration (None if none)."""

    problem: str
    name: str
    marginals: Tensor
    error: float
    elbo: float | None
    seconds: float


def fit_of(problem: Problem, subject: str, name: str, log_q: Tensor, seconds: float) -> Fit:
    """Against the exact answer, of a distribution over the states, (S,)."""
    table = problem.table
    marginals = table.marginals(log_q.exp())
    error = (marginals - table.marginals(table.posterior)).abs().max().item()
    return Fit(subject, name, marginals, error, table.elbo(log_q), seconds)


@torch.no_grad()
def log_q(program: GateProgram, problem: Problem) -> Tensor:
    """Exact log-probability of every state under the fitted guide, (S,)."""
    return problem.table.states.log_q(components(program.gate_guide))


# --- a, b -------------------------------------------------------------------------------------------------------------


def rung_a(*, steps: int = 400) -> list[Check]:
    """From a guide away from the prior.

    The KL of a mean field is exact, so that nothing is random and all its rows agree, whatever estimator and
    temperature: no sample leaks into the KL. A mixture's KL is estimated, so it takes more steps, at a falling rate.
    """
    cases = [("mean_field", estimator, temperature) for estimator in ESTIMATORS for temperature in TEMPERATURES]
    cases += [("mixture", "relaxed", temperature) for temperature in TEMPERATURES]
    problem, checks = prior_only(), []
    for guide, estimator, temperature in cases:
        torch.manual_seed(0)
        program = problem.program(guide, estimator, open_logit=2.0)
        start = _distance_to_prior(program)
        if start < 0.1:
            raise RuntimeError(f"the guide starts at the prior ({start:.3f}): nothing would be tested")
        own = {"steps": steps, "lr": 0.1} if guide == "mean_field" else {"steps": 3 * steps}
        svi(program, problem, temperature=temperature, **own)
        subject = f"`{guide}`, {estimator}, τ = {temperature:g}"
        checks.append(Check("a", subject, "probability", _distance_to_prior(program)))
    return checks


def _distance_to_prior(program: GateProgram) -> float:
    pairs = zip(program.gate_guide.posterior(), program.prior(), strict=True)
    return max((q.mean - p.mean).abs().max().item() for q, p in pairs if q.mean.numel())


def rung_b(
    *, runs: Sequence[tuple[str, int]] = ONE_GATE, ratios: tuple[float, ...] = (-1.0, 1.0, 3.0), processes: int = 1
) -> list[Check]:
    """Data against the gate, for it, and strongly for it; every estimator in its numbers of steps."""
    cases = [(ratio, estimator, steps) for ratio in ratios for estimator, steps in runs]
    jobs = [functools.partial(_fitted_gate, *case) for case in cases]
    checks = []
    for (ratio, estimator, steps), opened in zip(cases, in_parallel(jobs, processes), strict=True):
        closed_form = torch.sigmoid(torch.tensor(ratio) + torch.logit(torch.tensor(0.25))).item()
        subject = f"{estimator}, {steps} steps, log-likelihood ratio {ratio:+g} (exact {closed_form:.3f})"
        checks.append(Check("b", subject, "probability", abs(opened - closed_form)))
    return checks


def _fitted_gate(ratio: float, estimator: str, steps: int) -> float:
    problem = one_gate(ratio)
    return posterior.marginals(svi(problem.program(estimator=estimator), problem, steps=steps)).z.item()


# --- c, d -------------------------------------------------------------------------------------------------------------


def exact_fits(problem: Problem, subject: str, sizes: tuple[int, ...] = (), **search) -> list[Fit]:
    """The exact posterior, the exact mean field and the best mixtures of `sizes` components."""
    fits = [fit_of(problem, subject, "exact posterior", problem.table.posterior.log(), 0.0)]
    for M in (1, *sizes):
        began = time.perf_counter()
        distribution, _ = best_on_table(problem.table.states, problem.table.log_joint, components=M, **search)
        name = "exact mean field" if M == 1 else f"exact mixture, M = {M}"
        fits.append(fit_of(problem, subject, name, distribution, time.perf_counter() - began))
    return fits


def trained_fit(
    problem: Problem, subject: str, *, estimator: str = "relaxed", guide: str = "mean_field", steps: int,
    label: str | None = None, lr: float | None = None, **settings,
) -> Fit:  # fmt: skip
    """A guide with `settings`, fitted by SVI with an estimator and the package's schedules, or at a constant `lr`."""
    began = time.perf_counter()
    torch.manual_seed(0)
    program = svi(problem.program(guide, estimator, **settings), problem, steps=steps, lr=lr)
    return fit_of(problem, subject, label or estimator, log_q(program, problem), time.perf_counter() - began)


def naive_fit(problem: Problem, subject: str, *, steps: int) -> Fit:
    """Pyro's relaxed guide against a Bernoulli model; not an ELBO, so it has none."""
    began = time.perf_counter()
    marginals = naive_pairing(problem, steps=steps, temperature=FINAL_TEMPERATURE)
    error = (marginals - problem.table.marginals(problem.table.posterior)).abs().max().item()
    return Fit(subject, "Pyro's naive pairing", marginals, error, None, time.perf_counter() - began)


def fit_checks(rung: str, fit: Fit, exact: list[Fit]) -> list[Check]:
    """The thresholds of rungs c and d for a trained fit: a mean field comes near the best one, a mixture beats it."""
    mean_field = next(f for f in exact if f.name == "exact mean field")
    subject = f"{fit.problem}: {fit.name} (exact mean field errs by {mean_field.error:.3f})"
    ahead = fit.elbo - mean_field.elbo
    elbo = Check(rung, subject, "mixture", ahead) if "mixture" in fit.name else Check(rung, subject, "elbo", -ahead)
    return [Check(rung, subject, "marginal", fit.error), elbo]


# --- f, g -------------------------------------------------------------------------------------------------------------


def random_program(problem: Problem, guide: str, *, spread: float, seed: int) -> GateProgram:
    """A guide whose log Bayes factors are drawn from a normal distribution of `spread` nats."""
    generator = torch.Generator().manual_seed(seed)
    program = problem.program(guide, "straight_through")
    with torch.no_grad():
        for parameter in program.gate_guide.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return program


def bound_excess(program: GateProgram, problem: Problem) -> float:
    """Exact ELBO minus log evidence, nats: never positive."""
    return problem.table.elbo(log_q(program, problem)) - problem.table.log_evidence


@torch.no_grad()
def reported_elbo(program: GateProgram, problem: Problem, *, repeats: int = 100, draws: int = 4) -> tuple[float, float]:
    """Mean and standard error of ELBOs as run.py reports them: over draws of the gates, minus the KL.  Nats."""
    reported = []
    for _ in range(repeats):
        gates = draw_gates(program.gate_guide, draws)
        places = [problem.table.states.index(type(gates)(z, g)) for z, g in zip(*gates, strict=True)]
        reported.append(problem.table.log_likelihood[places].mean() - sum(program.kl()).double())
    all_reported = torch.stack(reported)
    error = (all_reported.std() / repeats**0.5).clamp(min=1e-3)  # float32 of a KL of hundreds of nats
    return all_reported.mean().item(), error.item()


def rung_f(problems: dict[str, Problem], *, guides: int = 40, steps: int = 1000) -> list[Check]:
    """Guides of random log Bayes factors, from undecided to certain, and trained ones, for which the bound is tight."""
    checks = []
    for name, problem in problems.items():
        for guide in ("mean_field", "mixture"):
            programs = [random_program(problem, guide, spread=0.5 + seed % 8, seed=seed) for seed in range(guides)]
            torch.manual_seed(0)
            programs.append(svi(problem.program(guide), problem, steps=steps))
            subject = f"{name}: {guides} random guides `{guide}` and a trained one"
            found = [reported_elbo(program, problem) for program in programs]
            exact = [problem.table.elbo(log_q(program, problem)) for program in programs]
            above = max((mean - problem.table.log_evidence) / error for mean, error in found)
            away = max(abs(mean - elbo) / error for (mean, error), elbo in zip(found, exact, strict=True))
            checks.append(Check("f", subject, "bound", max(exact) - problem.table.log_evidence))
            checks += [Check("f", subject, "reported", above), Check("f", subject, "monte_carlo", away)]
    return checks


@torch.no_grad()
def frequency_p_values(program: GateProgram, problem: Problem, *, temperature: float, draws: int) -> list[float]:
    """Exact two-sided binomial p-value of each free gate: hard draws as in training against reported marginals."""
    chains = problem.table.states.chains
    totals = [torch.zeros_like(distribution.mean) for distribution in program.gate_guide.posterior()]
    for _ in range(draws):
        for total, distribution in zip(totals, program.gate_guide.distributions(temperature, True), strict=True):
            total += distribution.rsample()
    marginals = posterior.marginals(program)
    opened, p = (torch.cat([site_of[site][index] for site, index in chains]) for site_of in (totals, marginals))
    return [stats.binomtest(int(k), draws, min(1.0, float(q))).pvalue for k, q in zip(opened, p, strict=True)]


@torch.no_grad()
def deployed_otherwise(program: GateProgram, problem: Problem) -> int:
    """Gates whose deployed value is not that of the rule, from the enumerated distributions.

    The rule: P(open) > 1/2; of a mixture, the most probable of the allocations that this gives for the whole and
    for each component.
    """
    states, deployed = problem.table.states, posterior.deployed(program)
    distributions = [log_q(program, problem)]
    parts = components(program.gate_guide)
    if len(parts.z.log_probs) > 1:
        each = zip(*(distribution.log_probs for distribution in parts), strict=True)
        distributions += [states.log_q(type(parts)(*(NestedBernoulli(x[None]) for x in part))) for part in each]
    candidates = [problem.table.marginals(distribution.exp()) > 0.5 for distribution in distributions]  # each (G,)
    places = [(states.open == opened).all(-1).nonzero()[0].item() for opened in candidates]
    expected = candidates[int(distributions[0][places].argmax())]
    found = torch.cat([deployed[site][index] for site, index in states.chains]) > 0
    return int((found != expected).sum())


def rung_g(problem: Problem, *, guides: int = 3, draws: int = 2000) -> list[Check]:
    """For each family, on random guides and at every temperature."""
    checks = []
    for guide in ("mean_field", "mixture"):
        programs = [random_program(problem, guide, spread=1.5, seed=seed) for seed in range(guides)]
        wrong = sum(deployed_otherwise(program, problem) for program in programs)
        torch.manual_seed(0)
        p = [p for program in programs for temperature in TEMPERATURES
             for p in frequency_p_values(program, problem, temperature=temperature, draws=draws)]  # fmt: skip
        subject = f"{guides} guides `{guide}`, {len(p)} frequencies of {draws} draws"
        checks.append(Check("g", f"{guides} guides `{guide}`", "mode", wrong))
        checks.append(Check("g", subject, "frequency", min(1.0, min(p) * len(p))))
    return checks
