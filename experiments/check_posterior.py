"""How good is the inference? An acceptance ladder, from a prior without data to simulation-based calibration.

    python experiments/check_posterior.py --report benchmarks/posterior_ladder.md --figures benchmarks/figures

Each rung has a known answer and a threshold (experiments/ladder/rungs.py), and a miss is reported as a miss. Takes
about half an hour on two slow cores; `--rungs a b` runs some of it.
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation
os.environ.setdefault("PYRO_BLORA_COMPILE", "0")  # networks this small gain nothing from it

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import torch

from experiments.ladder import figures, report, rungs, sbc
from experiments.ladder.calibration import Simulations
from experiments.ladder.fitting import step_ratio
from experiments.ladder.gradients import GUIDES, estimators, exact_gradient, place, quality, sampled
from experiments.ladder.parallel import in_parallel
from experiments.ladder.problems import Network, Problem, twelve_gates
from experiments.ladder.starts import start_fits
from experiments.studies.scripts import run_script

SEEDS = range(4)  # of the twelve gates
STEPS = 4000  # of SVI in rungs c and d
SIZES = (2, 4)
CONSTANT_RATE = 0.02
REINMAX = str(Path(__file__).parent / "ladder" / "rivals.py") + ":ReinMax"


class Ladder:
    """What the rungs found: checks, fits by problem, gradient and mixture tables, calibrations."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.figures, self.options = folder / "figures", options
        self.checks, self.fits, self.gradients = [], [], []
        self.gaps, self.calibrations, self.ratios = {}, {}, {}
        self.network = Network() if set("defg") & set(options.rungs) else None

    def a(self):
        self.checks += rungs.rung_a()

    def b(self):
        self.checks += rungs.rung_b(processes=self.options.processes)

    def c(self):
        for seed in SEEDS:
            name = f"twelve gates, seed {seed}"
            sizes = SIZES if seed == 0 else ()
            self._fitted("c", name, twelve_gates(seed), sizes, all_estimators=seed == 0)
        self._gradients("twelve gates", twelve_gates(0), draws=2000)

    def d(self):
        problem = self.network.problem()
        self._fitted("d", "network, 400 states", problem, SIZES, all_estimators=True)
        large = Network(free=("input", "base"))
        self._fitted("d", "network, 10,000 states", large.problem(), SIZES, all_estimators=False)
        for name, network in (("400 states", self.network), ("10,000 states", large)):
            for seed in range(3):
                fits = start_fits(network, name, seed, restarts=2, steps=300)
                self.fits += [(fits[0].elbo, fit) for fit in fits[1:]]
        self.ratios = {M: step_ratio(problem, M) for M in SIZES}
        self._gradients("network", problem, draws=300)

    def _fitted(self, rung: str, name: str, problem: Problem, sizes, *, all_estimators: bool):
        exact = rungs.exact_fits(problem, name, sizes, restarts=4, steps=400)
        trained = functools.partial(rungs.trained_fit, problem, name, steps=STEPS)
        jobs = [trained]
        jobs += [functools.partial(trained, guide="mixture", label=f"relaxed, mixture, M = {M}", components=M)
                 for M in sizes]  # fmt: skip
        if all_estimators:
            jobs += [functools.partial(trained, estimator=estimator) for estimator in rungs.ESTIMATORS[1:]]
            jobs.append(functools.partial(trained, estimator=REINMAX, label="ReinMax"))
            label = f"relaxed, constant rate {CONSTANT_RATE:g}"
            jobs.append(functools.partial(trained, label=label, lr=CONSTANT_RATE))
            jobs.append(functools.partial(rungs.naive_fit, problem, name, steps=STEPS // 2))
        fits = list(in_parallel(jobs, self.options.processes))
        shipped, mixtures, others = fits[0], fits[1 : 1 + len(sizes)], fits[1 + len(sizes) :]
        for fit in (shipped, *mixtures):
            self.checks += rungs.fit_checks(rung, fit, exact)
        self.fits += [(problem.table.log_evidence, fit) for fit in (*exact, *fits)]
        if all_estimators:
            figures.marginals(
                [*exact[:2], shipped, *others], problem.names, self.figures / f"posterior_marginals_{rung}.png"
            )
        if sizes:
            evidence = problem.table.log_evidence
            best = [(M, evidence - fit.elbo) for M, fit in zip((1, *sizes), exact[1:], strict=True)]
            found = [(M, evidence - fit.elbo) for M, fit in zip((1, *sizes), (shipped, *mixtures), strict=True)]
            self.gaps[name] = {"exact optimum": best, "trained by SVI": found}
            figures.gap_closed(self.gaps, self.figures / "posterior_gap.png")

    def _gradients(self, name: str, problem: Problem, *, draws: int):
        program = problem.program()
        for estimator in estimators():
            found = []
            for where in GUIDES:
                place(program, problem, where)
                torch.manual_seed(0)
                count = draws if estimator.soft else max(draws, 2000)
                estimates = sampled(estimator, program, problem, count)
                found.append(quality(estimates, exact_gradient(program, problem), estimator.forwards))
            self.gradients.append((name, estimator, found))

    def e(self):
        simulations = Simulations.of(self.network, self.options.simulations)
        distributions = {
            "exact posterior": sbc.on_table(self.network, simulations, 0),
            "exact mean field": sbc.on_table(self.network, simulations, 1, restarts=4, steps=300),
            "exact mixture, M = 4": sbc.on_table(self.network, simulations, 4, restarts=2, steps=300),
            "trained, relaxed": sbc.shipped(
                self.network, simulations, steps=self.options.simulated_steps, processes=self.options.processes
            ),
        }
        self.calibrations = sbc.calibrations(self.network, simulations, distributions)
        for name, found in self.calibrations.items():
            self.checks += sbc.checks(name, found)
        figures.ecdf_differences(self.calibrations, self.figures / "posterior_sbc.png")
        figures.reliability(self.calibrations, self.figures / "posterior_reliability.png")

    def f(self):
        self.checks += rungs.rung_f({"twelve gates": twelve_gates(0), "network": self.network.problem()})

    def g(self):
        self.checks += rungs.rung_g(self.network.problem())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", nargs="+", choices=list("abcdefg"), default=list("abcdefg"))
    parser.add_argument("--simulations", type=int, default=500, help="of rung e")
    parser.add_argument("--simulated_steps", type=int, default=1000, help="of SVI in each simulation of rung e")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="fits at a time, one thread each")
    parser.add_argument("--output_dir", default="runs/check_posterior")
    parser.add_argument("--report", help="where the Markdown report is copied")
    parser.add_argument("--figures", help="folder that the figures are copied to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    ladder, seconds = Ladder(folder, options), {}
    for rung in options.rungs:
        began, first = time.perf_counter(), len(ladder.checks)
        getattr(ladder, rung)()
        seconds[rung] = time.perf_counter() - began
        for check in ladder.checks[first:]:
            print(report.line(check), flush=True)
        print(f"rung {rung}: {seconds[rung]:.0f} s", flush=True)
        report.write(ladder, seconds, folder, " ".join(arguments))  # after each, so that what is done is kept
    summary = [
        {
            "rung": check.rung, "subject": check.subject, "quantity": check.meaning, "bound": check.bound,
            "measured": float(check.measured), "passed": bool(check.passed),
        } for check in ladder.checks
    ]  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report.copy(folder, options.report, options.figures)


if __name__ == "__main__":
    run_script(main)
