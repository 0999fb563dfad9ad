"""Rung e: simulation-based calibration of the exact posterior, the exact mean field, a mixture, and shipped training.

The exact posterior must be calibrated: that validates the harness. The others are held to the same thresholds.
"""

import functools

import torch
from torch import Tensor

from .calibration import STATISTICS, Calibration, Simulations, calibration
from .fitting import svi
from .parallel import in_parallel
from .problems import Network, Problem
from .rungs import Check, log_law
from .states import best_on_table


def on_table(network: Network, simulations: Simulations, components: int, **search) -> Tensor:
    """The best law of each simulation by gradient ascent on its table; 0 components: the exact posterior.  (D, S)"""
    log_joint = network.states.log_prior + simulations.log_likelihood
    if components == 0:
        return log_joint.softmax(-1)
    laws = [best_on_table(network.states, part, components=components, **search)[0] for part in log_joint.split(50)]
    return torch.cat(laws).exp()


def shipped(network: Network, simulations: Simulations, count: int, *, steps: int, processes: int = 1) -> Tensor:
    """`relaxed` on a mean field through the network, for the first `count` simulations.  (count, S)"""
    problem = network.problem()
    here = (problem.with_labels(simulations.labels[i], simulations.log_likelihood[i]) for i in range(count))
    jobs = [functools.partial(_trained, x, steps=steps, seed=i) for i, x in enumerate(here)]
    return torch.tensor(list(in_parallel(jobs, processes)), dtype=torch.float64)


def _trained(problem: Problem, **settings) -> list[float]:
    return log_law(svi(problem.program(), problem, **settings), problem).exp().tolist()


def checks(name: str, found: Calibration) -> list[Check]:
    subject = f"{name}, {len(found.opened)} simulations"
    return [Check("e", subject, statistic, found.p_values[statistic]) for statistic in STATISTICS]


def calibrations(network: Network, simulations: Simulations, laws: dict[str, Tensor]) -> dict[str, Calibration]:
    return {name: calibration(network.states, simulations, law) for name, law in laws.items()}
