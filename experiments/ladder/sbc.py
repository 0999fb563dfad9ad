"""Rung e: simulation-based calibration of the exact posterior, the exact mean field, a mixture, and shipped training.

The exact posterior must be calibrated: that validates the harness. The others are held to the same thresholds.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from .batched import trained_posteriors
from .calibration import STATISTICS, Calibration, Simulations, calibration
from .parallel import in_parallel
from .problems import Network
from .rungs import Check
from .states import best_on_table


def on_table(network: Network, simulations: Simulations, components: int, **search) -> Tensor:
    """The best distribution of each simulation by gradient ascent on its table; 0 components: exact.  (D, S)"""
    log_joint = network.states.log_prior + simulations.log_likelihood
    if components == 0:
        return log_joint.softmax(-1)
    distributions = [
        best_on_table(network.states, part, components=components, **search)[0] for part in log_joint.split(50)
    ]
    return torch.cat(distributions).exp()


def shipped(network: Network, simulations: Simulations, *, steps: int, batch: int = 50, processes: int = 1) -> Tensor:
    """`relaxed` on a mean field through the network, `batch` simulations in one forward.  (D, S)"""
    parts = enumerate(simulations.split(batch))
    jobs = [functools.partial(_as_array, network, part, steps=steps, seed=i) for i, part in parts]
    return torch.cat([torch.from_numpy(distribution) for distribution in in_parallel(jobs, processes)])


def _as_array(*args, **settings) -> np.ndarray:
    """A tensor that comes from a fork would be shared with it, and it is gone by then."""
    return trained_posteriors(*args, **settings).numpy()


def checks(name: str, found: Calibration) -> list[Check]:
    subject = f"{name}, {len(found.opened)} simulations"
    return [Check("e", subject, statistic, found.p_values[statistic]) for statistic in STATISTICS]


def calibrations(
    network: Network, simulations: Simulations, distributions: dict[str, Tensor]
) -> dict[str, Calibration]:
    return {
        name: calibration(network.states, simulations, distribution) for name, distribution in distributions.items()
    }
