"""The grids of a bit ladder: scales, mixture weights and codes; what depends on no element of a tensor.

    s_b = 2 range / (2^b - 1),   Q_b(x) = s_b * round(clamp(x, -range, range) / s_b),   Q_32(x) = x

A `Grid` is what one tensor's quantizer reads (fake_quantize.py); the grids of all tensors are computed in one pass.
A ladder is a tuple of bit widths that rises and whose last one, 32, is the unquantized float. Shape letter: G grids,
all widths but the last.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..bit_widths import LADDER

EXACT_BITS = 32  # the unquantized float
_AT_ONCE = 1 << 16  # values times ranges: as many as stay in a core's cache
_INSIDE = 4  # of the dtype's epsilons, so that x / s_b, with its roundings, stays below 2^(b-1) - 1/2


class Constants(NamedTuple):
    """The parts of a grid's constants (4 G + 4,), in their order, which cpu.c and triton.py know too.

    Of a tensor with a range for every row: the constants are (C, 4 G + 4), and so each part leads with C.
    """

    range: Tensor  # (1,)
    weights: Tensor  # (G,) of the grids
    exact: Tensor  # (1,) weight of the unquantized float
    scales: Tensor  # (G,)
    inverse: Tensor  # (G,) of the scales
    weighted_scales: Tensor  # (G,)
    below_exact: Tensor  # (1,) sum of the grids' weights
    edge: Tensor  # (1,) where x is clipped

    @classmethod
    def of(cls, c: Tensor) -> "Constants":
        n = number_of_grids(c)
        return cls(*c.split([1, n, 1, n, n, n, 1, 1], -1))


def number_of_grids(constants: Tensor) -> int:
    return constants.shape[-1] // 4 - 1


def mixture_weights(gates: Tensor) -> Tensor:
    """Ladders (..., G + 1) of [z_2, ..., z_32] to the weight of each bit width (..., G + 1): w_b = z_b - z_next."""
    return gates - torch.cat([gates[..., 1:], torch.zeros_like(gates[..., :1])], -1)


class Grid(NamedTuple):
    """What one tensor's quantizer reads.  learned (G + 2,): range and weights of all bit widths, for gradients.

    constants (4 G + 4,): the same without a gradient, and what follows from them: see `Constants`.
    With a range for each of C rows: learned (C + G + 1,), constants (C, 4 G + 4).
    """

    learned: Tensor
    constants: Tensor


def grids(ranges: Tensor, weights: Tensor, ladder: Sequence[int] = LADDER) -> list[Grid]:
    """The grids of many tensors, in one pass over all of them.  ranges (..., ) > 0, weights (..., G + 1)"""
    learned = torch.cat([ranges[..., None].to(weights.dtype), weights], -1).view(-1, 1 + len(ladder))
    constants = _constants(learned[:, :1], learned[:, 1:], ladder)
    return [Grid(*pair) for pair in zip(learned.unbind(0), constants.unbind(0), strict=True)]


class Rows(NamedTuple):
    """Which ranges the tensors have.  sizes: of each how many; owner (V,): of each range the tensor that it is of.

    order (V + tensors (G + 1),): where [ranges, weights] of all tensors stand among ranges, then weights, of each.
    """

    sizes: tuple[int, ...]
    owner: Tensor
    order: Tensor


def grids_of_rows(ranges: Tensor, weights: Tensor, rows: Rows, ladder: Sequence[int] = LADDER) -> list[Grid]:
    """The same of tensors that may have a range for each of their rows.  ranges (V,) > 0, weights (..., G + 1)"""
    weights = weights.view(-1, len(ladder))
    learned = torch.cat([ranges.to(weights.dtype), weights.flatten()]).index_select(0, rows.order)
    constants = _constants(ranges.detach().to(weights.dtype)[:, None], weights[rows.owner], ladder)
    return [
        Grid(of, c[0] if size == 1 else c)
        for of, c, size in zip(
            learned.split([size + len(ladder) for size in rows.sizes]), constants.split(rows.sizes), rows.sizes,
            strict=True,
        )
    ]  # fmt: skip


@torch.no_grad()
def _constants(ranges: Tensor, weights: Tensor, ladder: Sequence[int]) -> Tensor:
    """ranges (V, 1), weights (V, G + 1) -> (V, 4 G + 4), see `Constants`"""
    negligible = weights.abs() < torch.finfo(weights.dtype).eps ** 2  # of a sum of 1; denormal numbers are slow
    weights, scales = weights.masked_fill(negligible, 0.0), _scales(ranges[:, 0], ladder)
    parts = [ranges, weights, scales, 1 / scales, weights[:, :-1] * scales, weights[:, :-1].sum(-1, keepdim=True)]
    return torch.cat([*parts, _edge(ranges)], -1)


def _scales(ranges: Tensor, ladder: Sequence[int]) -> Tensor:
    """s_b of each grid, (..., G): computed once a tensor, as its inverse is, so that its elements cost products."""
    return torch.stack([_scale(ranges, bits) for bits in ladder[:-1]], -1)


def _scale(value_range: Tensor, bits: int) -> Tensor:
    scale: Tensor = 2 * value_range / (2**bits - 1)
    return scale


def _edge(ranges: Tensor) -> Tensor:
    return ranges * (1 - _INSIDE * torch.finfo(ranges.dtype).eps)


def integer_codes(x: Tensor, value_range: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integer codes and the scale with codes * scale == Q_bits(x), for export.

    Shapes: codes as x, int8 up to 8 bit and int16 up to 16; value_range and scale (), or of x (..., C, n) a value_range
    (C,) for its rows, and then scale (C, 1).   Errors: ValueError for 32 bit.
    """
    value_range = value_range[:, None] if value_range.dim() else value_range
    if not 2 <= bits <= 16:
        raise ValueError(f"only 2 to 16 bit have integer codes, got {bits}")
    scale, edge = _scale(value_range, bits), _edge(value_range)
    codes = (x.to(value_range.dtype).clamp(-edge, edge) * (1 / scale)).round()
    return codes.to(torch.int8 if bits <= 8 else torch.int16), scale


def squared_errors(x: Tensor, ranges: Tensor, weights: Tensor, ladder: Sequence[int] = LADDER) -> Tensor:
    """Weighted mean squared error of x on the grid of every bit width, at each of several ranges; 0 at 32 bit.

    Shapes: x (..., n), weights (>= 0) as x; ranges (..., C) > 0 -> (..., C, G + 1).
    """
    x, weights, errors = x.to(ranges.dtype)[..., None, :], weights.to(ranges.dtype)[..., None, :], []
    for some in ranges.split(max(1, _AT_ONCE // max(1, x.numel())), -1):
        edge, scales = _edge(some)[..., None], _scales(some, ladder)  # (..., C, 1), (..., C, G)
        clipped = x.clamp(-edge, edge)
        on_grids = ((clipped * (1 / scale)).round() * scale for scale in scales.split(1, -1))
        each = [((value - x).square() * weights).mean(-1) for value in on_grids]
        errors.append(torch.stack([*each, torch.zeros_like(some)], -1))
    return torch.cat(errors, -2)


def rounded(x: Tensor, value_range: Tensor, bits: int) -> Tensor:
    """Q_bits(x), without gradients.  x any, value_range (), or (C,) of the rows of x (..., C, n)."""
    if bits == EXACT_BITS:
        return x.detach()
    codes, scale = integer_codes(x.detach(), value_range, bits)
    return (codes * scale).to(x.dtype)
