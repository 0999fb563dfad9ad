"""A product of which only the weight has few bits, as onnxruntime's MatMulNBits: codes at 2, 4 or 8 bits, in float32.

    y = sum_k x_k (q_k - 2^(b-1)) s,      q = code + 2^(b-1), b bits each

Codes of a row follow each other, the least significant bits first, in blocks of which each has a step. A tensor, or a
row, has one step here, so that it is repeated, and 2^(b-1) is the operator's own zero: the numbers are those of the
packed model. It multiplies in float32 (accuracy level 0): level 4 would round inputs to 8 bit, block by block, which no
run has seen.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from .low_bit import EXACT, Weight

WIDTHS = (2, 4, 8)  # bits of a code that the operator takes
_BLOCKS = (32, 64, 128, 256)  # columns with a step of their own
_FLOAT = 4  # bytes


class Form(NamedTuple):
    """How a weight is stored: bits of a code, columns of a block, and bytes of a row."""

    bits: int
    block: int
    row: int


def form_of(weight: Weight) -> Form | None:
    """The smallest form of a weight (m, n), at the next width that is stored; None where float32 is no larger."""
    n = weight.codes.shape[1]
    forms = [
        Form(bits, block, math.ceil(n / block) * (block * bits // 8 + _FLOAT))
        for bits in WIDTHS if weight.bits <= bits for block in _BLOCKS
    ]  # fmt: skip
    smallest = min(forms, key=lambda form: (form.row, form.bits, -form.block), default=None)
    return smallest if smallest is not None and smallest.row < n * _FLOAT else None


class NarrowWeight(nn.Module):
    """W x, x in float32.  weight (m, n), in a form of `form_of`"""

    codes: Tensor
    steps: Tensor

    def __init__(self, weight: Weight, form: Form):
        super().__init__()
        codes, step = weight.codes.detach(), weight.step
        assert weight.bits < EXACT and step is not None
        (m, self.columns), (self.bits, self.block, _) = codes.shape, form
        blocks, per_byte = math.ceil(self.columns / self.block), 8 // self.bits
        padded = nn.functional.pad(codes, (0, blocks * self.block - self.columns)).int() + 2 ** (self.bits - 1)
        places = torch.arange(per_byte, device=codes.device) * self.bits
        stored = (padded.view(m, blocks, -1, per_byte) << places).sum(-1).to(torch.uint8)
        self.register_buffer("codes", stored, persistent=False)
        self.register_buffer("steps", step.detach().expand(m, blocks).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        m = self.codes.shape[0]
        attributes: dict[str, Any] = {
            "K": self.columns,
            "N": m,
            "bits": self.bits,
            "block_size": self.block,
            "accuracy_level": 0,
        }
        return symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.steps),
            attributes,
            dtype=torch.float32,
            shape=(*x.shape[:-1], m),
            version=1,
        )
