"""Codes of a grid of any width from 2 to 16 bit, packed without gaps, and the tensor that they stand for.

    s = 2 range / (2^b - 1),   k = round(clamp(x, -range, range) / s),   Q_b(x) = s k,   |k| <= 2^(b-1) - 1

Codes are stored as k + 2^(b-1) - 1, b bits each, least significant bit first: 2 bits take two bits. A range is one
number, or one for every row, (m, 1). The arithmetic is that of fake_quantize.py to the bit; half precision would not
do at 16 bit, where k has 16 bits and a half a mantissa of 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WIDEST = 16  # bits of a code; 32 bit is the unquantized float
_INSIDE = 4  # of the dtype's epsilons that the clip is inside the range, as in grid.py
_CHUNK = 1 << 20  # codes that are packed at once, a multiple of 8: they take a byte a bit meanwhile


class Scale(NamedTuple):
    """Of one grid: where x is clipped, 1 / s and s; scalars, or (m, 1) where every row has its own."""

    edge: Tensor
    inverse: Tensor
    step: Tensor

    @classmethod
    def of(cls, value_range: Tensor, bits: int) -> Scale:
        """Errors: ValueError for a width without codes."""
        if not 2 <= bits <= WIDEST:
            raise ValueError(f"a grid of codes has 2 to {WIDEST} bit, got {bits}")
        least = 8 * torch.finfo(value_range.dtype).tiny  # so that its inverse is finite, and zeros have the code 0
        step = (2 * value_range / (2**bits - 1)).clamp(min=least)
        return cls(value_range * (1 - _INSIDE * torch.finfo(value_range.dtype).eps), 1 / step, step)

    def codes(self, x: Tensor) -> Tensor:
        """k of every element, as floats."""
        return (x.clamp(-self.edge, self.edge) * self.inverse).round()

    def rounded(self, x: Tensor) -> Tensor:
        """Q_b(x)"""
        return self.codes(x) * self.step


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return math.ceil(count * bits / 8)


def packed(x: Tensor, value_range: Tensor, bits: int) -> Tensor:
    """The codes of a float32 tensor, packed.  x any, value_range () or (m, 1) > 0 -> uint8 (packed_size(...),)"""
    codes = Scale.of(value_range, bits).codes(x).to(torch.int32) + (2 ** (bits - 1) - 1)
    flat = codes.flatten().cpu().numpy().astype("<u2")
    places = np.arange(bits, dtype=np.uint16)
    parts = [
        np.packbits((flat[start : start + _CHUNK, None] >> places & 1).astype(np.uint8), bitorder="little")
        for start in range(0, len(flat), _CHUNK)
    ]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.uint8)


def unpacked(stored: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes k, int32, of what `packed` gave.  Errors: ValueError for another number of bytes, or no code."""
    count = math.prod(shape)
    if stored.dtype != torch.uint8 or stored.shape != (packed_size(count, bits),):
        raise ValueError(
            f"{count:,} codes of {bits} bit take {packed_size(count, bits):,} bytes, not {stored.numel():,}"
        )
    data, places = stored.numpy(), np.arange(bits, dtype=np.int32)
    codes, step = np.empty(count, dtype=np.int32), _CHUNK // 8 * bits
    for index, start in enumerate(range(0, len(data), step)):
        part = codes[index * _CHUNK : (index + 1) * _CHUNK]
        flags = np.unpackbits(data[start : start + step], count=len(part) * bits, bitorder="little")
        part[:] = (flags.reshape(-1, bits).astype(np.int32) << places).sum(-1)
    highest = 2 ** (bits - 1) - 1
    if count and codes.max() > 2 * highest:
        raise ValueError(f"a code of {bits} bit is {codes.max()}, above the highest, {2 * highest}")
    return torch.from_numpy(codes - highest).view(*shape)


def restored(stored: Tensor, value_range: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Q_bits(x), float32, of the packed codes of x."""
    return unpacked(stored, bits, shape).to(value_range.dtype) * Scale.of(value_range, bits).step
