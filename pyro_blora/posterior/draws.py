"""Results of a trained program: exact marginals, the deployed allocation, draws of gates, weights and rates, and KLs.

Reported posteriors are those of the discrete distribution. Draws and the deployed allocation come from the distribution
that was trained; a gate is deployed open where its marginal exceeds one half.
Shapes: S draws; z (S, L, T, K), g (S, L, R - 1).
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ..bops import BOPs, expected_bops
from ..gates import Gates, NestedBernoulli
from ..guides.base import components, draw_gates, log_prob
from ..program import BayesianLoRA, GateProgram
from ..user_values import suggest

P = ParamSpec("P")
T = TypeVar("T")
_ALONE = threading.RLock()
_KL_DRAWS = 100
_OTHER_STREAM = 0x5EED_0F_7E7A  # of the weights' draws, whose seed differs from the gates' in these bits


@torch.no_grad()
def marginals(program: BayesianLoRA) -> Gates:
    """Exact probabilities that each gate is open.  z (L, T, K), g (L, R - 1)."""
    return Gates(*(q.mean for q in program.gate_guide.posterior()))


@torch.no_grad()
def bops(program: BayesianLoRA) -> BOPs:
    """E[BOPs] under the guide, exact: ladders are independent given the component."""
    each = expected_bops(program.layout, *component_marginals(program))  # fields (M,)
    return BOPs(*(x.mean(0) for x in each))


@torch.no_grad()
def component_marginals(program: BayesianLoRA) -> Gates:
    """The same as `marginals` for each equally likely component.  z (M, L, T, K), g (M, L, R - 1)."""
    return Gates(*(q.mean for q in components(program.gate_guide)))


@torch.no_grad()
def draws_vary(program: GateProgram) -> bool:
    """Whether draws of the gates can differ: not under a guide of one allocation, however random the prior is."""
    for q, mask in zip(components(program.gate_guide), (program.z_mask, program.g_mask), strict=True):
        log_probs, means = q.log_probs[:, mask], q.mean[:, mask]  # (M, ladders, gates)
        if bool((log_probs.isfinite() & (log_probs < 0)).any()) or bool((means != means[:1]).any()):
            return True
    return False


@torch.no_grad()
def deployed(program: GateProgram) -> Gates:
    """The one allocation that is exported: open where the marginal exceeds one half.  z (L, T, K), g (L, R - 1).

    Under a mixture, where of two gates that stand in for each other both may have marginals below one half, the most
    probable of this rule's allocations for the whole distribution and for each component.
    """
    guide = program.gate_guide
    chosen = guide.deployed()
    if chosen is not None:
        return chosen
    whole = Gates(*(q.mode for q in guide.posterior()))
    each = Gates(*(q.mode for q in components(guide)))
    if len(each.z) == 1:
        return whole
    candidates = Gates(*(torch.cat([x[None], y]) for x, y in zip(whole, each, strict=True)))
    best = log_prob(guide, candidates, program.z_mask, program.g_mask).argmax()
    return Gates(*(x[best] for x in candidates))


@torch.no_grad()
def draw(program: BayesianLoRA, draws: int, *, seed: int = 0, distribution: str = "posterior") -> Gates:
    """Discrete draws of all gates, from the guide's `posterior` or from the `prior`.

    The same seed gives the same draws on every process, and leaves the global generator as it was.
    Errors: ValueError for fewer than one draw, and for another distribution.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if distribution not in (known := ("posterior", "prior")):
        raise ValueError(f"unknown distribution {distribution!r}: {suggest(distribution, known)}")
    with seeded(program, seed):
        if distribution == "posterior":
            return draw_gates(program.gate_guide, draws)
        return Gates(*(q.sample() for q in program.prior.sample_prior(draws)))


@torch.no_grad()
def draw_weights(program: GateProgram, draws: int, *, seed: int = 0) -> Tensor | None:
    """(S, D) draws of the adapter's weights, independent of those of the gates; None where they are not random."""
    if not program.weights.random:
        return None
    with seeded(program, seed ^ _OTHER_STREAM):
        return program.weights.draw(draws)


class Rates(NamedTuple):
    """Draws of a prior's own rates: names (n), posterior and prior (S, n), log_ratio (S,) as in `rates`.

    prior_gates: by site, gates drawn at the prior's rates, z (S, L, T, K), g (S, L, R - 1).
    """

    names: tuple[str, ...]
    posterior: Tensor
    prior: Tensor
    log_ratio: Tensor
    prior_gates: dict[str, Tensor]


@torch.no_grad()
def rates(program: BayesianLoRA, draws: int, *, seed: int = 0) -> Rates | None:
    """Draws of the prior's random rates, from their guide and from their distribution; None where no rate is random.

    log_ratio: log of p(rates) exp(-KL(guide of the gates || prior at these rates)) over the rates' guide, nats: it
    would be constant if the guide of the rates were exact. The Pareto k of its tail measures how far it is off.
    Source: Yao, Vehtari, Simpson and Gelman, Yes, but did it work? (2018).
    """
    prior, q = program.prior, components(program.gate_guide)
    parts = prior.rate_parts()
    if not parts:
        return None
    names: list[str] = []
    posterior: list[Tensor] = []
    before: list[Tensor] = []
    log_ratio = torch.zeros(draws)
    with seeded(program, seed):
        for site, part in parts.items():
            names += part.rate_names
            here = part.draw_rates(draws, "posterior")
            posterior.append(here)
            before.append(part.draw_rates(draws, "prior"))
            log_ratio = log_ratio.to(here) + part.log_ratio(here)
            for each, distributions, own, mask in zip(
                "zg", q, part.gates_at(here), (program.z_mask, program.g_mask), strict=True
            ):
                if each in site:
                    q_each = NestedBernoulli(
                        distributions.log_probs[:, None], validate_args=False
                    )  # (M, 1, ...) against (S, ...)
                    kl = torch.where(mask, kl_divergence(q_each, own), 0.0)
                    log_ratio = log_ratio - kl.flatten(2).sum(-1).mean(0)
        gates = {
            each: getattr(part.gates_at(own), each).sample()
            for (site, part), own in zip(parts.items(), before, strict=True) for each in site
        }  # fmt: skip
    return Rates(tuple(names), torch.cat(posterior, -1), torch.cat(before, -1), log_ratio, gates)


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """Called by one thread at a time: gates are set in the network, and seeds in the whole process."""

    @functools.wraps(function)
    def called(*arguments: P.args, **settings: P.kwargs) -> T:
        with _ALONE:
            return function(*arguments, **settings)

    return called


@contextlib.contextmanager
def seeded(program: GateProgram, seed: int):
    """Random numbers on the program's device from this seed, and then as if nothing had been drawn."""
    device = program.log_scale.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _random_state(program: GateProgram) -> Tensor:
    """Of the generators that `seeded` seeds, as bytes."""
    device = program.log_scale.device
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states)


@torch.no_grad()
def mean_kl(program: BayesianLoRA, *, seed: int = 0) -> tuple[float, float]:
    """KL(guide || prior) of the bit gates and of the rank gates, in nats: the mean of 100 estimates.

    Of one estimate where no random number is drawn, as all are the same then: only the KL of some guides and priors is
    sampled. Seeded as `draw` is.
    """
    with seeded(program, seed):
        before = _random_state(program)
        estimates = [torch.stack(program.kl())]
        if not torch.equal(before, _random_state(program)):
            estimates += [torch.stack(program.kl()) for _ in range(_KL_DRAWS - 1)]
    kl_z, kl_g = torch.stack(estimates).double().mean(0).tolist()
    return kl_z, kl_g


@torch.no_grad()
def divergences(program: BayesianLoRA) -> Gates:
    """KL(posterior || prior) of each ladder in nats; 0 where a tensor does not exist.  z (L, T), g (L,)."""
    q, p = program.gate_guide.posterior(), program.prior()
    return Gates(
        torch.where(program.z_mask, kl_divergence(q.z, p.z), 0.0),
        torch.where(program.g_mask, kl_divergence(q.g, p.g), 0.0),
    )
