"""How near the exact posterior the gates start, before any step of SVI: the start from data against the alternatives.

Labels are drawn with everything open, as the start takes the network for trained: it leaves the loss's slope out.
"""

import torch
from torch import Tensor

from pyro_blora.program import BayesianLoRA
from pyro_blora.training.gate_init import log_bayes_factors, sensitivity

from .problems import Network, Problem
from .rungs import Fit, exact_fits, fit_of, log_q

_BATCH = 16
OPEN = 6.0  # log-odds of gates that only wait


def open_problem(network: Network, seed: int) -> Problem:
    """Labels from the network with every gate open."""
    return network.problem(depths=tuple(size - 1 for size in network.states.sizes), seed=seed)


def ranges(program: BayesianLoRA) -> Tensor:
    """Those that the table was made with, for each width.  (L, T, 5)"""
    return program.net.log_range.detach().exp()[..., None].expand(-1, -1, len(program.layout.ladder))


def batches(problem: Problem) -> list[tuple[dict, Tensor]]:
    """All examples."""
    firsts = range(0, len(problem.labels), _BATCH)
    parts = [slice(first, first + _BATCH) for first in firsts]
    return [({name: x[rows] for name, x in problem.inputs.items()}, problem.labels[rows]) for rows in parts]


def start_from_data(problem: Problem, program: BayesianLoRA) -> BayesianLoRA:
    """As training starts the guide, from all examples and at the ranges that the table was made with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = sensitivity(program, batches(problem), ranges(program))
        program.gate_guide.start(log_bayes_factors(program, found))
    return program


def start_fits(network: Network, name: str, seed: int, **search) -> list[Fit]:
    """The exact posterior, the exact mean field, the prior, all gates nearly open, and the start from data."""
    problem = open_problem(network, seed)
    subject = f"{name}, labels of the open network, seed {seed}"
    opened = log_q(problem.program(open_logit=OPEN), problem)
    started = log_q(start_from_data(problem, problem.program()), problem)
    return [
        *exact_fits(problem, subject, **search),
        fit_of(problem, subject, "the prior", problem.table.states.log_prior, 0.0),
        fit_of(problem, subject, f"every gate at log-odds {OPEN:g}", opened, 0.0),
        fit_of(problem, subject, "start from data, not trained", started, 0.0),
    ]
