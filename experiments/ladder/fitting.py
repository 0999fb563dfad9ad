"""Stochastic variational inference of the gates as it is shipped, and Pyro's naive pairing for contrast."""

import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_blora.config import RunConfig
from pyro_blora.gates import Gates
from pyro_blora.program import GateProgram
from pyro_blora.training import Schedule

from .problems import Problem


def svi(
    program: GateProgram, problem: Problem, *, steps: int, lr: float | None = None, temperature: float | None = None,
    seed: int = 0,
) -> GateProgram:  # fmt: skip
    """Fit the guide with Adam on the program's own ELBO, with the package's schedules of its rate and temperature.

    lr, temperature: constants in place of the schedules.
    """
    schedule = Schedule(RunConfig(kl_warmup=0.0), steps, steps)
    optimizer = torch.optim.Adam(program.gate_guide.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = schedule.learning_rate("gates", step) if lr is None else lr
            program.temperature = schedule.temperature(step) if temperature is None else temperature
            optimizer.zero_grad()
            program.terms(problem.inputs, problem.labels).loss.backward()
            optimizer.step()
    return program


def naive_pairing(problem: Problem, *, steps: int, temperature: float, seed: int = 0) -> Tensor:
    """What Pyro makes of a RelaxedBernoulliStraightThrough guide against a Bernoulli model: no ELBO.

    A ladder is the running product of its own independent Bernoulli gates, so that model and prior are unchanged.
    Shapes: returns the fitted P(open) of each free gate, (G,).
    """
    states, prior = problem.table.states, problem.prior()
    program = problem.program(estimator="straight_through", open_logit=0.0)
    log_probs = torch.cat([prior[site].log_probs[index] for site, index in states.chains])
    sizes = [size - 1 for size in states.sizes]
    logits = torch.full_like(log_probs, 2.0).requires_grad_()
    optimizer, schedule = torch.optim.Adam([logits]), Schedule(RunConfig(kl_warmup=0.0), steps, steps)

    def model():
        gates = pyro.sample("gates", dist.Bernoulli(log_probs.exp(), validate_args=False).to_event(1))
        full = [distribution.mode.clone() for distribution in prior]
        for (site, index), chain in zip(states.chains, gates.split(sizes), strict=True):
            full[site][index] = chain.cumprod(-1)
        log_likelihood = -len(problem.labels) * problem.score(program, Gates(*full))
        pyro.factor("data", log_likelihood)

    def guide():
        distribution = dist.RelaxedBernoulliStraightThrough(torch.tensor(temperature), logits=logits)
        pyro.sample("gates", distribution.to_event(1))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = schedule.learning_rate("gates", step)
            optimizer.zero_grad()
            (Trace_ELBO().differentiable_loss(model, guide) / len(problem.labels)).backward()
            optimizer.step()
    return torch.cat([chain.cumprod(-1) for chain in logits.detach().sigmoid().split(sizes)]).double()


def step_ratio(problem: Problem, components: int, *, steps: int = 60) -> float:
    """Median time of a training step with a mixture, over that with a mean field, measured in turn."""
    programs = [problem.program(), problem.program("mixture", components=components)]
    seconds = [[], []]
    for _ in range(steps):
        for program, found in zip(programs, seconds, strict=True):
            began = time.perf_counter()
            program.terms(problem.inputs, problem.labels).loss.backward()
            found.append(time.perf_counter() - began)
    plain, mixture = (torch.tensor(found).median().item() for found in seconds)
    return mixture / plain
