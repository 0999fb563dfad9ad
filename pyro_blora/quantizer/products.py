"""Products of codes: integers, whose sum is exact in any order.

    y = sum_k c_k w_k * (s_x s_w)        of x = s_x c and W = s_w w, codes c and w of at most 8 bit

A code is a whole number in float32, so products and their sums are whole, too, and exact while they stay below 2^24:
longer sums are taken in pieces, which are added in float64. So the answer depends neither on the other rows of a batch,
nor on padding, nor on how a library orders its sums, and onnxruntime's integer kernels give the same float32 numbers.
Codes of more than 8 bit are two bytes, c = 256 h + l, of a product each. A factor at 32 bit has no codes: its product
is summed in float64 and rounded once.

Shapes: x (..., n), W (m, n) -> (..., m).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Scale

BYTE = 8  # bits of a code that integer kernels take
_EXACT = 1 << 24  # from which on float32 does not have every whole number
_HIGH = 256  # of the high byte's unit
_ELEMENTS = 1 << 24  # of a weight that is converted to float64 at once


class Part(NamedTuple):
    """Codes of one byte, whole numbers in float32 of at most this size, and their step, () or (m, 1)."""

    codes: Tensor
    step: Tensor
    largest: int


class Coded(NamedTuple):
    """A tensor on a grid as codes, step * codes; at 32 bit the numbers, without a step."""

    x: Tensor
    step: Tensor | None = None
    bits: int = 32

    @classmethod
    def of(cls, x: Tensor, scale: Scale, bits: int) -> Coded:
        return cls(scale.codes(x), scale.step, bits)

    @property
    def numbers(self) -> Tensor:
        return self.x if self.step is None else self.x * self.step

    def parts(self) -> list[Part]:
        """Codes by byte, the high ones first."""
        assert self.step is not None
        if self.bits <= BYTE:
            return [Part(self.x, self.step, 2 ** (self.bits - 1) - 1)]
        high = (self.x / _HIGH).floor()
        return [Part(high, self.step * _HIGH, 2 ** (self.bits - 9)), Part(self.x - high * _HIGH, self.step, _HIGH - 1)]


def product(x: Coded, weight: Coded, bias: Tensor | None = None) -> Tensor:
    """W x + b, float32.  x (..., n), weight (m, n), bias (m,)"""
    if x.step is None or weight.step is None:
        y = in_float64(x.numbers, weight.numbers)
    else:
        flat = x._replace(x=x.x.reshape(-1, x.x.shape[-1]))
        terms = [
            _sums(a, b) * (a.step * (b.step.flatten() if b.step.dim() else b.step))
            for a in flat.parts() for b in weight.parts()
        ]  # fmt: skip
        y = sum(terms[1:], terms[0]).view(*x.x.shape[:-1], -1)
    return y if bias is None else y + bias


def _sums(a: Part, b: Part) -> Tensor:
    """a b^T of codes (T, n) and (m, n): the exact sums, rounded to float32 once."""
    length, width = (_EXACT - 1) // (a.largest * b.largest), a.codes.shape[-1]
    if width <= length:
        return torch.mm(a.codes, b.codes.T)
    pieces = zip(a.codes.split(length, -1), b.codes.split(length, -1), strict=True)
    whole = sum((torch.mm(x, w.T).double() for x, w in pieces), torch.zeros((), device=a.codes.device))
    return whole.float()


def in_float64(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b, summed in float64 and rounded once, in as many pieces as keep the converted weights small."""
    rows = max(1, _ELEMENTS // max(1, weight.shape[-1]))
    x = x.double()
    y = torch.cat([F.linear(x, part.double()).float() for part in weight.split(rows)], -1)
    return y if bias is None else y + bias
