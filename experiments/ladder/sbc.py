"""Rung e: simulation-based calibration of the exact posterior, the exact mean field, a mixture, and shipped training.

The exact posterior must be calibrated: that validates the harness. The others are held to the same thresholds.
"""

import torch
from torch import Tensor

from .calibration import STATISTICS, Calibration, Simulations, calibration
from .fitting import svi
from .problems import Network
from .rungs import Check, log_law
from .states import best_on_table


def on_table(network: Network, simulations: Simulations, components: int, **search) -> Tensor:
    """The best law of each simulation by gradient ascent on its table; 0 components: the exact posterior.  (D, S)"""
    log_joint = network.states.log_prior + simulations.log_likelihood
    if components == 0:
        return log_joint.softmax(-1)
    laws = [best_on_table(network.states, part, components=components, **search)[0] for part in log_joint.split(50)]
    return torch.cat(laws).exp()


def shipped(network: Network, simulations: Simulations, count: int, *, steps: int, lr: float = 0.1) -> Tensor:
    """`relaxed` on a mean field through the network, for the first `count` simulations.  (count, S)"""
    problem, laws = network.problem(), []
    for i in range(count):
        here = problem.with_labels(simulations.labels[i], simulations.log_likelihood[i])
        laws.append(log_law(svi(here.program(), here, steps=steps, lr=lr, seed=i), here).exp())
    return torch.stack(laws)


def checks(name: str, found: Calibration) -> list[Check]:
    subject = f"{name}, {len(found.opened)} simulations"
    return [Check("e", subject, statistic, found.p_values[statistic]) for statistic in STATISTICS]


def calibrations(network: Network, simulations: Simulations, laws: dict[str, Tensor]) -> dict[str, Calibration]:
    return {name: calibration(network.states, simulations, law) for name, law in laws.items()}
