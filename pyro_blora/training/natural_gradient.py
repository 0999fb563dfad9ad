"""Gates learned by natural gradients, without a step size: averages of noisy estimates of each log Bayes factor.

A guide of log Bayes factors is prior x exp(e), so e is the site term of conjugate-computation variational inference,
and the ELBO is stationary where e = -N dE_q[NLL] / dm, m the marginals of the ladder. A natural-gradient step of rate
r is e <- (1 - r) e + r target, with `target` an estimate of the right-hand side at the current e: the gates are an
average of targets. It weighs the t-th of them by t, r = 2 / (t + 1), as the first ones are of other gates than those
that are reached. How far the average can be trusted is measured: the targets' variance gives its standard error. By
James and Stein's rule, gates of one role (a rung of one tensor of one type of projection) share what they deviate from
their start by, in standard errors, and each adds as much of its own as exceeds what noise alone would make. So a gate
whose deviations are noise stays where it started, and one that has been seen clearly moves all the way. Nothing is
tuned. The first half of the gated steps only measures (`Schedule.gates_move`): gates that move on few targets take the
adapter with them, which then fits gates that do not stay. In the second half gates are led from their start to the
average step by step: all at once, each by targets that know nothing of the others' moves, they lost what the adapter
had learned. With a KL weight beta, a cold posterior has N / beta for N.

Estimators whose gradient is not the natural one already are divided by the Fisher matrix of the ladder's statistics.
Shapes: M components; z (M, L, T, K), g (M, L, R - 1).   Units: nats.
Source: Khan and Lin, Conjugate-computation variational inference (2017); Shamir and Zhang (2013), the average;
Efron and Morris, Stein's estimation rule and its competitors (1973), the shrinkage.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.run_config import RunConfig
from ..elbos import GateELBO
from ..gates import Gates
from ..guides.base import LogBayesFactors, require_natural
from ..layout import AdapterLayout
from ..program import GateProgram

_FIRST = 10  # targets before a gate moves: a variance is known from them to a third
_LEAST = 1e-12  # nats: of a standard error
_DAMPING = 0.05  # of the Fisher matrix: .02 diverged once in thirty runs of a problem with twelve gates, .05 never


def is_natural(program: GateProgram, config: RunConfig) -> bool:
    """Whether gates learn by natural gradients: some are free, and it is configured or the ELBO's gradient is one."""
    guide = program.gate_guide
    if isinstance(guide, LogBayesFactors) and not any(guide.free):
        return False
    of_elbo = isinstance(program.elbo, GateELBO) and program.elbo.natural
    return of_elbo if config.gate_optimizer == "auto" else config.gate_optimizer == "natural"


class NaturalGradient:
    """Moves the log Bayes factors of a program's guide; their gradients must be those of the loss, -ELBO / N.

    kl_weight: of the KL in that loss. state: where the averages are kept, by parameter, as an optimizer keeps its
    moments, for checkpoints.
    """

    def __init__(
        self, program: GateProgram, kl_weight: float = 1.0, state: MutableMapping[Any, dict[str, Tensor]] | None = None
    ):
        guide = require_natural(program.gate_guide, "--gate_optimizer natural", "--gate_optimizer adam")
        self.guide, self.state = guide, {} if state is None else state
        self.scale = program.n_train / kl_weight
        self.natural = isinstance(program.elbo, GateELBO) and program.elbo.natural
        self.parameters: list[nn.Parameter] = [guide.z_evidence, guide.g_evidence]
        pins = guide.z_pins, guide.g_pins
        self.free = [x.isnan().expand(e.shape) for x, e in zip(pins, self.parameters, strict=True)]
        self.members = [
            _members(role.to(e.device), free).to(e.dtype)
            for role, free, e in zip(roles(program.layout), self.free, self.parameters, strict=True)
        ]

    @torch.no_grad()
    def step(self, left_out: Tensor, share: float = 1.0) -> None:
        """Take the gradients in, and move the gates to this share of the way from their start to their averages.

        left_out: (), whether this step's gradients are not finite; then nothing changes.
        """
        for site, parameter in enumerate(self.parameters):
            if parameter.grad is None or not parameter.numel():
                continue
            slope = parameter.grad if self.natural else self._divided(site, parameter.grad)
            target = torch.where(self.free[site], parameter - self.scale * slope, 0.0)
            before = self.state.get(parameter) or self._nothing(parameter)
            after = averaged(before, target)
            if share > 0:
                seen = self.free[site] & (after["step"] >= _FIRST) & ~left_out
                reached = after["start"].lerp(shrunk(after, self.members[site]), share)
                parameter.copy_(torch.where(seen, reached, parameter))
            self.state[parameter] = {key: torch.where(left_out, before[key], x) for key, x in after.items()}
            parameter.grad = None

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """For the log: root mean squares, over free gates, of how far they have moved and of their averages' error."""
        seen = [(p, free, self.state[p]) for p, free in zip(self.parameters, self.free, strict=True) if p in self.state]
        seen = [(p, free, state) for p, free, state in seen if state["step"] >= _FIRST and bool(free.any())]
        if not seen:
            return {}
        moved = torch.cat([(p - state["start"])[free] for p, free, state in seen])
        error = torch.cat([standard_error(state)[free] for _, free, state in seen])
        return {"gates_moved": moved.square().mean().sqrt().item(), "gates_error": error.square().mean().sqrt().item()}

    def _nothing(self, parameter: Tensor) -> dict[str, Tensor]:
        none = torch.zeros_like(parameter)
        return {"step": none.new_zeros(()), "start": parameter.clone(), "mean": none, "variance": none.clone()}

    def _divided(self, site: int, gradient: Tensor) -> Tensor:
        """(F + damping I)^-1 gradient, of each component and ladder."""
        matrix = fisher(self.guide.components()[site].mean)
        damped = matrix + _DAMPING * torch.eye(matrix.shape[-1], device=matrix.device)
        found, _ = torch.linalg.solve_ex(damped, len(matrix) * gradient[..., None])  # without a look from the host
        return found[..., 0]


def fisher(marginals: Tensor) -> Tensor:
    """Covariance of the statistics 1[depth >= k] of a ladder with these marginals.  (..., K) -> (..., K, K)"""
    K = marginals.shape[-1]
    later = torch.ones(K, K, device=marginals.device).tril().bool()  # row at or after column: the rarer of the two
    both = torch.where(later, marginals[..., :, None], marginals[..., None, :])
    return both - marginals[..., :, None] * marginals[..., None, :]


def averaged(state: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
    """With one more target: their mean with weights 1, 2, ..., t, and their variance about it."""
    step = state["step"] + 1
    rate = 2 / (step + 1)
    change = target - state["mean"]
    return {
        "step": step, "start": state["start"], "mean": state["mean"] + rate * change,
        "variance": (1 - rate) * (state["variance"] + rate * change.square()),
    }  # fmt: skip


def standard_error(state: dict[str, Tensor]) -> Tensor:
    """Of the means, from the targets' variance about them; their weights are 2 i / (t (t + 1)), i = 1, ..., t."""
    t = state["step"]
    squares = 2 * (2 * t + 1) / (3 * t * (t + 1))  # of the weights, summed
    return (state["variance"] * squares / (1 - squares)).sqrt().clamp(min=_LEAST)


def shrunk(state: dict[str, Tensor], members: Tensor) -> Tensor:
    """The means, each as far from its start as can be told from noise, by its role's deviation and by its own.

    members (roles, gates): 1 where a free gate is of the role. Deviations count in standard errors.
    """
    error = standard_error(state)
    score = ((state["mean"] - state["start"]) / error).flatten()  # standard normal where all is noise about the start
    count = members.sum(1).clamp(min=1)
    mean = members @ score / count
    common = mean * (1 - 1 / (count * mean.square()).clamp(min=1))  # James and Stein, its positive part
    beyond = members @ (score - members.T @ common).square() / count - 1  # the variance that is not noise
    own = members.T @ (beyond.clamp(min=0) / (1 + beyond.clamp(min=0)))
    common = members.T @ common
    return state["start"] + error * (common + own * (score - common)).view_as(error)


def roles(layout: AdapterLayout) -> Gates[Tensor]:
    """The role of each gate: of z its type of projection, tensor and rung, of g its type.  (L, T, K), (L, R - 1)"""
    types = [p.type for p in layout.projections]
    kind = torch.tensor([types.index(each) for each in types])
    _, T, K = layout.z_shape
    z = (kind[:, None, None] * T + torch.arange(T)[:, None]) * K + torch.arange(K)
    return Gates(z, kind[:, None].expand(layout.g_shape))


def _members(role: Tensor, free: Tensor) -> Tensor:
    """(roles, gates): a product with it sums over roles in an order that never changes.  free (M, ...)"""
    each = role.expand(free.shape).flatten()
    return (each == each.unique()[:, None]) & free.flatten()
