"""Nested Bernoulli gates: a gate can be open only if the gate before it is open.

A ladder of K gates has K + 1 states, its depth d = 0, ..., K being the number of open gates, and

    p(z_1 = 1) = p_1,   p(z_{k+1} = 1 | z_k = 1) = p_{k+1},   p(z_{k+1} = 1 | z_k = 0) = 0.

`NestedBernoulli` is that discrete distribution: priors and reported posteriors are of this class.
`RelaxedNestedBernoulli` is the same distribution with a reparametrised sample for training. Only `rsample` is relaxed;
the KL divergence is the closed form between the two **discrete** distributions. (The density of relaxed samples
against a probability mass, as of Pyro's relaxed Bernoulli paired with a Bernoulli, is not an ELBO.)

Everything is computed from log-probabilities (log p = -rate, log(1 - p) = log(-expm1(-rate))), so that rates from 1e-6
to 1e6 nats give finite values and gradients in float32. A gate with log p = 0 or -inf is *pinned* open or closed.

Shapes: the event is one ladder of K gates, (..., K); dimensions to the left are batch dimensions.
Source: van Baalen et al., Bayesian Bits (2020); Bayesian-LoRA, equations 7 and 8.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, Self, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.distributions.utils import lazy_property
from torch.types import _size

from .ladder_math import log1mexp, log_at_least, nested, parents, weighted

_Site = TypeVar("_Site", covariant=True)  # what `Gates` has two of: tensors or distributions
_IMPOSSIBLE = -1e30  # log of 0, in sums that have to stay finite
_NONPOSITIVE = constraints.independent(constraints.interval(-torch.inf, 0.0), 1)


class _Ladder(constraints.Constraint):
    """0/1 vectors that never increase from one gate to the next."""

    is_discrete = True
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return ((value == 0) | (value == 1)).all(-1) & (value[..., 1:] <= value[..., :-1]).all(-1)


def _refuse(gradient: Tensor) -> None:
    raise ValueError(
        "the log-probability of a soft draw has no gradient: in an ELBO it would close every gate. Use program.elbo or "
        "pyro.infer.TraceMeanField_ELBO(), whose KL is in closed form, or hard draws: --estimator straight_through"
    )


class NestedBernoulli(TorchDistribution):
    """The distribution of a ladder of nested gates.

    Shapes: log_probs (..., K), conditional log-probabilities of opening; K may be 0. Values are 0/1 ladders (..., K).
    Units: log-probabilities and entropies in nats.
    Errors: ValueError where a log-probability is positive or nan.
    """

    arg_constraints = {"log_probs": _NONPOSITIVE}  # noqa: RUF012 (torch's own spelling of a class attribute)
    support = _Ladder()
    has_enumerate_support = True

    def __init__(self, log_probs: Tensor, validate_args: bool | None = None):
        self.log_probs = log_probs
        super().__init__(log_probs.shape[:-1], log_probs.shape[-1:], validate_args=validate_args)

    @classmethod
    def from_rate(cls, rate: Tensor, validate_args: bool | None = None) -> "NestedBernoulli":
        """p(open | parent open) = exp(-rate).  rate (..., K) >= 0, in nats."""
        if not rate.is_meta and not bool((rate >= 0).all()):
            raise ValueError(f"a rate must be >= 0 nats (p(open) = exp(-rate)), got {rate.min().item():g}")
        return cls(-rate, validate_args=validate_args)

    @classmethod
    def from_depth_logits(cls, logits: Tensor, validate_args: bool | None = None) -> "NestedBernoulli":
        """The ladder whose depth d has probability softmax(logits)_d.  logits (..., K + 1), -inf: impossible."""
        at_least = log_at_least(logits)
        reachable = at_least[..., :-1] > -torch.inf  # a gate whose parent is never open is closed
        opening = at_least[..., 1:] - torch.where(reachable, at_least[..., :-1], 0.0)
        return cls(torch.where(reachable, opening, -torch.inf).clamp(max=0.0), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        new: Self = self._get_checked_instance(NestedBernoulli, _instance)
        new.log_probs = self.log_probs.expand(torch.Size(batch_shape) + self.event_shape)
        super(NestedBernoulli, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def log_probs_closed(self) -> Tensor:
        """log p(closed | parent open), (..., K)."""
        return log1mexp(self.log_probs)

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            uniform = torch.rand(shape, dtype=self.log_probs.dtype, device=self.log_probs.device)
            return (uniform < self.log_probs.exp()).to(self.log_probs.dtype).cumprod(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a ladder; -inf for any other vector.

        It is linear in the gates, sum_k z_k log p_k + (z_{k-1} - z_k) log(1 - p_k), so a straight-through
        draw gets the exact differences as its gradient.
        """
        if self._validate_args:
            self._validate_sample(value)
        step_down = parents(value) - value
        terms = weighted(value, self.log_probs) + weighted(step_down, self.log_probs_closed)
        return torch.where((step_down >= 0).all(-1), terms.sum(-1), -torch.inf)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All K + 1 ladders, (K + 1, 1, ..., K), or (K + 1, *batch_shape, K) if expanded."""
        gates = self.event_shape[0]
        chains = torch.ones(gates + 1, gates, dtype=self.log_probs.dtype, device=self.log_probs.device).tril(-1)
        chains = chains.reshape((gates + 1,) + (1,) * len(self.batch_shape) + (gates,))
        return chains.expand((gates + 1, *self.batch_shape, gates)) if expand else chains

    @property
    def mean(self) -> Tensor:
        """Exact marginal probability that each gate is open, (..., K)."""
        return self.log_probs.cumsum(-1).exp()

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 - self.mean)

    @property
    def mode(self) -> Tensor:
        """The deployed (median) ladder: a gate is open where its marginal exceeds one half, (..., K)."""
        return (self.mean > 0.5).to(self.log_probs.dtype)

    @property
    def depth_probs(self) -> Tensor:
        """P(d = 0), ..., P(d = K): the distribution of the number of open gates, (..., K + 1)."""
        return self.depth_log_probs.exp()

    @lazy_property
    def depth_log_probs(self) -> Tensor:
        """log P(d = 0), ..., log P(d = K), finite where the probability itself underflows, (..., K + 1)."""
        zero = self.log_probs.new_zeros((*self.batch_shape, 1))
        return torch.cat([zero, self.log_probs.cumsum(-1)], -1) + torch.cat([self.log_probs_closed, zero], -1)

    def entropy(self) -> Tensor:
        """Entropy of each ladder, nats, (...)."""
        closed = weighted(self.log_probs_closed.exp(), self.log_probs_closed)
        per_gate = weighted(self.log_probs.exp(), self.log_probs) + closed
        return -(parents(self.mean) * per_gate).sum(-1)


class RelaxedNestedBernoulli(TorchDistribution):
    """A nested Bernoulli distribution with a reparametrised sample: binary Concrete gates, multiplied along the ladder.

    `hard=True` thresholds each gate and passes the gradient straight through; then samples and `log_prob` are those of
    the discrete distribution. `hard=False` returns soft ladders in [0, 1], which have no density here: `log_prob` is
    that of the value rounded to a ladder, and differentiating it raises. ELBOs use the closed-form KL.

    Shapes: logits (..., K), log-odds of opening given the parent; -inf, inf pin a gate. temperature > 0, number or ().
    Source: Maddison et al., Jang et al. (2017); straight-through: Bengio et al. (2013).
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012 (as above)
    support = constraints.independent(constraints.unit_interval, 1)
    has_rsample = True

    def __init__(
        self, logits: Tensor, temperature: float | Tensor, hard: bool = True, validate_args: bool | None = None
    ):
        if not isinstance(temperature, Tensor) and not temperature > 0:  # a tensor is not read on the host
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.logits, self.temperature, self.hard = logits, temperature, hard
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        new: Self = self._get_checked_instance(RelaxedNestedBernoulli, _instance)
        new.logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        new.temperature, new.hard, new.has_rsample = self.temperature, self.hard, self.has_rsample
        super(RelaxedNestedBernoulli, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def discrete(self) -> NestedBernoulli:
        """The discrete distribution, which is the one that is reported."""
        distribution = NestedBernoulli(torch.nn.functional.logsigmoid(self.logits), validate_args=False)
        distribution.log_probs_closed = torch.nn.functional.logsigmoid(
            -self.logits
        )  # beyond 100 nats, p is 1 and 1 - p is lost
        return distribution

    @property
    def mean(self) -> Tensor:
        """Exact marginals of the discrete distribution, (..., K)."""
        return self.discrete.mean

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        noisy = self.logits + torch.logit(uniform, eps=torch.finfo(self.logits.dtype).eps)
        gates = torch.sigmoid(noisy / self.temperature)
        if self.hard:
            gates = (noisy > 0).to(gates.dtype) + (gates - gates.detach())  # in this order: exactly 0 or 1
        return nested(gates)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.discrete.log_prob(value if self.hard else (value > 0.5).to(self.logits.dtype))
        if log_prob.requires_grad and not self.hard:
            log_prob.register_hook(_refuse)
        return log_prob


def _kl(log_q: Tensor, log_q_closed: Tensor, log_p: Tensor, log_p_closed: Tensor) -> Tensor:
    """sum_k P_q(parent open) * [q (log q - log p) + (1 - q)(log(1 - q) - log(1 - p))], nats; METHOD §3.

    An impossible event has a large finite log-probability here, so that 0 log 0 is 0 without a special case.
    """
    q, closed = log_q.exp(), log_q_closed.exp()
    q_1, q_0, p_1, p_0 = (x.clamp(min=_IMPOSSIBLE) for x in (log_q, log_q_closed, log_p, log_p_closed))
    kl = (parents(log_q.cumsum(-1).exp()) * (q * (q_1 - p_1) + closed * (q_0 - p_0))).sum(-1)
    return torch.where(kl < -1e-12 * _IMPOSSIBLE, kl, torch.inf)  # 1e-12 of probability where the prior has none


@register_kl(NestedBernoulli, NestedBernoulli)  # type: ignore[untyped-decorator]  # torch's own
def _kl_nested_nested(q: NestedBernoulli, p: NestedBernoulli) -> Tensor:
    return _kl(q.log_probs, q.log_probs_closed, p.log_probs, p.log_probs_closed)


@register_kl(RelaxedNestedBernoulli, NestedBernoulli)  # type: ignore[untyped-decorator]
def _kl_relaxed_nested(q: RelaxedNestedBernoulli, p: NestedBernoulli) -> Tensor:
    opening, closing = torch.nn.functional.logsigmoid(q.logits), torch.nn.functional.logsigmoid(-q.logits)
    return _kl(opening, closing, p.log_probs, p.log_probs_closed)


def pinned_logits(log_probs: Tensor) -> Tensor:
    """Log-odds at which a guide must hold gates the prior pins: inf (open), -inf (closed), and nan where free."""
    free = torch.full_like(log_probs, torch.nan)
    return torch.where(log_probs == 0, torch.inf, torch.where(log_probs == -torch.inf, -torch.inf, free))


class Gates(NamedTuple, Generic[_Site]):
    """The two sites of the program: distributions, draws or marginals of the bit gates and of the rank gates.

    Shapes: z (..., L, T, K), g (..., L, R - 1); the lowest rung and the first rank are always open and not listed.
    """

    z: _Site
    g: _Site
