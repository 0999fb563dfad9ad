"""Sums and products along a ladder of gates, with finite gradients where values underflow.

Shapes: K gates of a ladder, (..., K); dimensions to the left are batch dimensions.
"""

from typing import Any

import torch
from torch import Tensor


def parents(ladder: Tensor) -> Tensor:
    """Each gate's parent: the ladder moved by one, with an open gate in front. (..., K) -> (..., K)"""
    return torch.cat([torch.ones_like(ladder[..., :1]), ladder], -1)[..., :-1]


def log1mexp(log_prob: Tensor) -> Tensor:
    """log(1 - exp(log_prob)) for log_prob <= 0, finite wherever the result is, with finite gradients."""
    near_one = log_prob > -0.6931
    small = torch.where(near_one, log_prob, -1.0).clamp(max=-torch.finfo(log_prob.dtype).tiny)
    large = torch.where(near_one, -1.0, log_prob)
    value = torch.where(near_one, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
    return torch.where(log_prob < 0, value, -torch.inf)


class _Nested(torch.autograd.Function):
    """cumprod. PyTorch's own backward reads on the host whether a gate is 0, which synchronizes with the GPU."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor) -> Tensor:
        ladder = gates.cumprod(-1)
        ctx.save_for_backward(gates, ladder)
        return ladder

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gates, ladder = ctx.saved_tensors
        after = torch.ones(gates.shape[-1:] * 2, dtype=torch.bool, device=gates.device).triu(1)
        later = torch.where(after, gates[..., None, :], 1.0).cumprod(-1).triu()  # product of the gates after i up to k
        return parents(ladder) * (grad[..., None, :] * later).sum(-1)


def nested(gates: Tensor) -> Tensor:
    """Each gate times all before it: conditional gates to a ladder.  (..., K) -> (..., K)"""
    ladder: Tensor = _Nested.apply(gates)
    return ladder


class _LogAtLeast(torch.autograd.Function):
    """flip, logcumsumexp, flip: PyTorch's own backward is slower and hides nan."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor) -> Tensor:
        at_least = log_probs.flip(-1).logcumsumexp(-1).flip(-1)
        ctx.save_for_backward(log_probs, at_least)
        return at_least

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        log_probs, at_least = ctx.saved_tensors
        share: Tensor = log_probs[..., None, :] - at_least.nan_to_num(neginf=0.0)[..., :, None]
        share = share.triu_().exp().triu()  # P(d) / P(d >= k), (k, d)
        return (grad[..., :, None] * share).sum(-2)


def log_at_least(log_probs: Tensor) -> Tensor:
    """log P(d >= k) from log P(d), up to a constant, (..., K + 1)."""
    at_least: Tensor = _LogAtLeast.apply(log_probs)
    return at_least


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value with 0 * inf = 0, and no gradient through infinite values."""
    finite = value.isfinite()
    return torch.where(finite, weight * torch.where(finite, value, 0.0), torch.where(weight > 0, value, 0.0))
