"""ELBOs that the package does not ship: other gradients of the expected NLL through the gates.

    Reinforce         two independent hard draws, no baseline: unbiased
    LeaveOneOut       two independent hard draws, each the other's baseline (RLOO): unbiased
    UnmaskedDisarm    antithetic draws without leaving out the gates whose parent is closed: unbiased
    ReinMax           one hard draw with a second-order straight-through gradient: biased

The score of a nested ladder counts only the gates that were reached, which is its Rao-Blackwellised form.
Those whose gradient is natural, for a mean field:

    NewCurvature      `gauss_newton` whose curvature is of the present draw, anew every `RENEWAL` steps
    Anchored          `gauss_newton` less the batch's noise at an anchor: a control variate over steps (SVRG)
    Path              slopes at points between two depths, for some ladders at a time: exact for any curvature

Shapes: N examples; z (L, T, K), g (L, R - 1).   Units: nats an example.
"""

import abc

import torch
from torch import Tensor

from pyro_blora.elbos import Evaluation, GateELBO, ScoreFunction
from pyro_blora.elbos.gauss_newton import GaussNewton
from pyro_blora.gates import Gates
from pyro_blora.guides.base import Guide, draw_gates
from pyro_blora.program import GateProgram

from .problems import Problem

RENEWAL = 100  # steps


class Reinforce(GateELBO):
    """Source: Williams (1992)."""

    draws = "discrete"

    def draw(self, distribution) -> Tensor:
        """Two draws, (2, ..., K)."""
        return distribution.discrete.sample((2,))

    def rewards(self, scores: Tensor) -> Tensor:
        """What each draw's log-probability is multiplied by, (2,)."""
        return scores

    def expected_nll(self, at: Evaluation) -> Tensor:
        scores = torch.stack([at.nll(Gates(z, g)).detach() for z, g in zip(*at.gates, strict=True)])
        log_q = sum(
            distribution.discrete.log_prob(x).flatten(1).sum(-1)
            for distribution, x in zip(at.distributions, at.gates, strict=True)
        )
        surrogate = (self.rewards(scores) * log_q).mean()
        return scores.mean() + surrogate - surrogate.detach()


class LeaveOneOut(Reinforce):
    """Source: Kool, van Hoof and Welling, Buy 4 REINFORCE samples, get a baseline for free (2019)."""

    def rewards(self, scores: Tensor) -> Tensor:
        return scores - scores.flip(0)


class UnmaskedDisarm(ScoreFunction):
    """Source: Dong, Mnih and Tucker, DisARM (2020), over all conditional gates as if they were independent."""

    def expected_nll(self, at: Evaluation) -> Tensor:
        first, second = (at.nll(Gates(*(pair[i].cumprod(-1) for pair in at.gates))).detach() for i in range(2))
        surrogate = first.new_zeros(())
        for distribution, pair in zip(at.distributions, at.gates, strict=True):
            finite = torch.where(distribution.logits.isfinite(), distribution.logits, 0.0)
            weight = (pair[0] - pair[1]) * torch.sigmoid(finite.detach().abs())
            surrogate = surrogate + (weight * (first - second) / 2 * finite).sum()
        return (first + second) / 2 + surrogate - surrogate.detach()


class ReinMax(GateELBO):
    """At temperature 1.  Source: Liu et al., Bridging Discrete and Backpropagation (2023)."""

    def draw(self, distribution) -> Tensor:
        return _second_order(distribution.logits).cumprod(-1)

    def expected_nll(self, at: Evaluation) -> Tensor:
        return at.nll(at.gates)


def _second_order(logits: Tensor) -> Tensor:
    pinned = ~logits.isfinite()
    finite = torch.where(pinned, 0.0, logits)
    pair = torch.stack([torch.zeros_like(finite), finite], -1)  # (..., K, 2), closed and open
    probs = pair.softmax(-1)
    opened = torch.bernoulli(probs[..., 1].detach())
    hard = torch.stack([1 - opened, opened], -1)
    halfway = ((((hard + probs) / 2).log() - pair).detach() + pair).softmax(-1)
    second = (2 * halfway - probs / 2)[..., 1]
    return torch.where(pinned, (logits > 0).to(logits.dtype), opened + (second - second.detach()))


class Renewed(GaussNewton, abc.ABC):
    """With something that is computed anew from all examples, every `RENEWAL` steps."""

    @abc.abstractmethod
    def renew(self, program: GateProgram, problem: Problem) -> None: ...


class NewCurvature(Renewed):
    """The curvature is estimated at a draw of the present guide, from the slopes of each example there.

    For a `Tabulated` program, which has these slopes.
    """

    def renew(self, program: GateProgram, problem: Problem) -> None:
        self.take_curvature(program.curvature(Gates(*(x[0] for x in draw_gates(self.guide, 1)))))


class Anchored(Renewed):
    """The slope of the same batch at the anchor is taken out, and its mean over all examples put back.

    The anchor is the guide's median ladders. Two forwards; the mean is that of `gauss_newton`.
    Source: Johnson and Zhang, Accelerating stochastic gradient descent using predictive variance reduction (2013).
    """

    def renew(self, program: GateProgram, problem: Problem) -> None:
        self.anchor = Gates(*(q.mode.detach() for q in self.guide.posterior()))
        self.mean = _slopes(lambda gates: program.nll(problem.inputs, problem.labels, *gates), self.anchor)

    def _nll(self, at: Evaluation, drawn: Gates, component: int) -> Tensor:
        here = _slopes(at.nll, self.anchor)
        noise = [x - mean for x, mean in zip(here, self.mean, strict=True)]
        factors = self.guide.factors(component)
        return super()._nll(at, drawn, component) - sum(
            (x * _zero(e)).sum() for x, e in zip(noise, factors, strict=True)
        )


class Path(GaussNewton):
    """A share of the ladders, chosen at random, stands between two depths; the others are drawn.

    A chosen ladder stands between depths k - 1 and k, k uniform on 1, ..., K: the gates before k are open, gate k is
    uniform on (0, 1), those after it are closed. The NLL's slope in gate k averages to NLL(k) - NLL(k - 1), for any
    curvature. Of K gates and C ladders of which c are chosen, gate k is seen with probability p = c / (C K). A gate
    that is not seen is estimated by its present log Bayes factor e; one that is seen by e + (t - e) / p, t what was
    found, so that the mean is that of t. Unbiased if one ladder is chosen; else the slopes of one are taken where the
    other chosen ones are not as distributed.
    """

    share = 0.25

    def check(self, family: Guide) -> None:
        super().check(family)
        self.needs_curvature = False

    def _nll(self, at: Evaluation, drawn: Gates, component: int) -> Tensor:
        factors, points, seen = self.guide.factors(component), [], []
        for gates, chosen in zip(drawn, self._chosen(), strict=True):
            step = torch.randint(max(1, gates.shape[-1]), (*chosen.shape, 1))
            place = torch.arange(gates.shape[-1])
            between = torch.where(place == step, torch.rand(*chosen.shape, 1), (place < step).to(gates.dtype))
            points.append(torch.where(chosen[..., None], between, gates))
            seen.append((chosen[..., None] & (place == step)) * gates.shape[-1] / self._share)  # 1 / p or 0
        passed = (point + weight * _zero(e) for point, weight, e in zip(points, seen, factors, strict=True))
        nll = at.nll(Gates(*passed))
        present = [((weight - 1) * e.detach() * _zero(e)).sum() for weight, e in zip(seen, factors, strict=True)]
        return nll + sum(present) / at.examples

    def _chosen(self) -> Gates:
        """Which ladders: z (L, T), g (L,)."""
        free = Gates(*(pins.isnan().any(-1) for pins in (self.guide.z_pins, self.guide.g_pins)))
        places = torch.cat([x.flatten() for x in free]).nonzero()[:, 0]
        count = max(1, round(self.share * len(places)))
        self._share = count / len(places)
        flat = torch.zeros(sum(x.numel() for x in free), dtype=torch.bool)
        flat[places[torch.randperm(len(places))[:count]]] = True
        parts = flat.split([x.numel() for x in free])
        return Gates(*(part.view(x.shape) for part, x in zip(parts, free, strict=True)))


def _slopes(nll, at: Gates) -> Gates:
    """Of the NLL in the gates, at gates."""
    gates = Gates(*(x.clone().requires_grad_() for x in at))
    return Gates(*torch.autograd.grad(nll(gates), tuple(gates), allow_unused=True, materialize_grads=True))


def _zero(factors: Tensor) -> Tensor:
    """0, to the bit, with a gradient of 1."""
    return factors - factors.detach()
