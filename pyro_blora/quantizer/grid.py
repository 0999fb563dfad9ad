"""The grids of a bit ladder: scales, mixture weights and codes; what depends on no element of a tensor.

    s_b = 2 range / (2^b - 1),   Q_b(x) = s_b * round(clamp(x, -range, range) / s_b),   Q_32(x) = x

A `Grid` is what one tensor's quantizer reads (fake_quantize.py); the grids of all tensors are computed in one pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LADDER = (2, 4, 8, 16, 32)  # bit widths; the last is the unquantized float
GRIDS = LADDER[:-1]
_INSIDE = 4  # of the dtype's epsilons, so that x / s_b, with its roundings, stays below 2^(b-1) - 1/2
# where each part of `constants` starts
RANGE, WEIGHT, EXACT, SCALE, INVERSE, WEIGHTED_SCALE, BELOW_32, EDGE = 0, 1, 5, 6, 10, 14, 18, 19


def mixture_weights(gates: Tensor) -> Tensor:
    """Ladders (..., 5) of [z_2, ..., z_32] to the weight of each bit width (..., 5): w_b = z_b - z_next."""
    return gates - torch.cat([gates[..., 1:], torch.zeros_like(gates[..., :1])], -1)


class Grid(NamedTuple):
    """What one tensor's quantizer reads.  learned (6,): range and weights of 2, 4, 8, 16, 32 bit, for gradients.

    constants (20,): the same without a gradient; s_b, 1 / s_b and w_b s_b of the four grids; W; where x is clipped.
    """

    learned: Tensor
    constants: Tensor


def grids(ranges: Tensor, weights: Tensor) -> list[Grid]:
    """The grids of many tensors, in one pass over all of them.  ranges (..., ) > 0, weights (..., 5)"""
    learned = torch.cat([ranges[..., None].to(weights.dtype), weights], -1).view(-1, 1 + len(LADDER))
    with torch.no_grad():
        ranges, weights = learned[:, :1], learned[:, 1:]
        negligible = weights.abs() < torch.finfo(weights.dtype).eps ** 2  # of a sum of 1; denormal numbers are slow
        weights, (scales, inverse) = weights.masked_fill(negligible, 0.0), _scales(ranges[:, 0])
        parts = [ranges, weights, scales, inverse, weights[:, :-1] * scales, weights[:, :-1].sum(-1, keepdim=True)]
        constants = torch.cat([*parts, _edge(ranges)], -1)
    return [Grid(*pair) for pair in zip(learned.unbind(0), constants.unbind(0), strict=True)]


def _scales(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """s_b of each grid, and 1 / s_b, (..., 4): computed once a tensor, so that its elements cost products only."""
    scales = torch.stack([2 * ranges / (2**bits - 1) for bits in GRIDS], -1)
    return scales, 1 / scales


def _edge(ranges: Tensor) -> Tensor:
    return ranges * (1 - _INSIDE * torch.finfo(ranges.dtype).eps)


def integer_codes(x: Tensor, value_range: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integer codes and the scale with codes * scale == Q_bits(x), for export.

    Shapes: codes as x, int8 up to 8 bit and int16 at 16; scale ().   Errors: ValueError for 32 bit.
    """
    if bits not in GRIDS:
        raise ValueError(f"only {GRIDS} bit have integer codes, got {bits}")
    (scales, inverse), edge = _scales(value_range), _edge(value_range)
    codes = (x.to(value_range.dtype).clamp(-edge, edge) * inverse[GRIDS.index(bits)]).round()
    return codes.to(torch.int8 if bits <= 8 else torch.int16), scales[GRIDS.index(bits)]


def squared_errors(x: Tensor, ranges: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean squared error of x on the grid of every bit width, at each of several ranges; 0 at 32 bit.

    Shapes: x any, weights (>= 0) as x; ranges (C,) > 0 -> (C, 5).
    """
    x, weights, errors = x.flatten().to(ranges.dtype), weights.flatten().to(ranges.dtype), []
    for value_range in ranges:
        (scales, inverse), edge = _scales(value_range), _edge(value_range)
        clipped = x.clamp(-edge, edge)
        on_grids = ((clipped * inverse[i]).round() * scales[i] for i in range(len(GRIDS)))
        errors.append(torch.stack([((value - x).square() * weights).mean() for value in on_grids] + [x.new_zeros(())]))
    return torch.stack(errors)


def rounded(x: Tensor, value_range: Tensor, bits: int) -> Tensor:
    """Q_bits(x), without gradients.  x any, value_range ()."""
    if bits == LADDER[-1]:
        return x.detach()
    codes, scale = integer_codes(x.detach(), value_range, bits)
    return (codes * scale).to(x.dtype)
