"""Products of a packed model in ONNX's operators, each with the form of its input that it takes.

    y = sum_k c_k w_k * (s_x s_w)

A product of two factors that have codes is QuantizeLinear, DequantizeLinear and MatMul, which onnxruntime runs as one
integer product and scales once: operation by operation that of quantizer/products.py. Codes of every width up to 8 bit
are bytes, an input's around 128, as onnxruntime's kernels take them; those of up to 16 bit are two bytes, so two
products. A product with a factor at 32 bit is in float64, or for speed in float32, as are then those of two bytes that
would take longer; of the others, those that read one input are then one product of onnxruntime's own operator.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from ..quantizer.products import BYTE
from .low_bit import EXACT, Rounded, Weight

Form = Literal["dequantized", "whole", "scaled"]  # MatMul of dequantized matrices, or MatMulInteger, or with scales

_OPSET = 21
_MIDDLE, _HIGH = 128, 256  # of an input's byte; of the high byte's unit
_SHORT = 64  # columns, up to which two products of bytes take longer than one of float32: those of lora_B


def clipped(x: Tensor, *ends: Tensor) -> Tensor:
    return symbolic("Clip", (x, *ends), dtype=x.dtype, shape=x.shape, version=_OPSET)


def _dequantized(codes: Tensor, step: Tensor, zero: Tensor | None = None, **attributes: Any) -> Tensor:
    return symbolic(
        "DequantizeLinear",
        (codes, step, *(() if zero is None else (zero,))),
        attributes,
        dtype=torch.float32,
        shape=codes.shape,
        version=_OPSET,
    )


def is_of_codes(input_bits: int, bits: int, columns: int, fast: bool) -> bool:
    """Whether a product is one of integers: where both have codes; if fast, unless one in float32 takes less time.

    bits, columns: of the weight. A table of `pyro-blora measure-costs` has the times.
    """
    if not fast:
        return max(input_bits, bits) < EXACT
    return bits <= BYTE and (input_bits <= BYTE or (input_bits < EXACT and columns > _SHORT))


class Byte(NamedTuple):
    """An input's codes of one byte: uint8, their zero, and the step.  (..., n)"""

    codes: Tensor
    zero: Tensor
    step: Tensor


class Codes(nn.Module):
    """An input on its grid, a `Byte` for each of its codes' bytes, the high one first.

    fast: a code of one byte is divided, rounded and clipped as a byte, in a quarter of the memory of x. Without
    the clip, codes of 8 bit would end at -128, one step lower, and MiniLM's logits of random tokens move by a tenth.
    """

    low: Tensor
    high: Tensor
    inverse: Tensor
    one: Tensor
    step: Tensor
    step_of_high: Tensor
    middle: Tensor
    none: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, rounded: Rounded, fast: bool):
        super().__init__()
        largest = float(2 ** (rounded.bits - 1) - 1)
        self.is_wide = rounded.bits > BYTE
        self.clips_bytes, self.saturates = fast and not self.is_wide, largest == _MIDDLE - 1
        if self.clips_bytes:
            for name, end in (("lowest", _MIDDLE - largest), ("highest", _MIDDLE + largest)):
                self.register_buffer(name, torch.tensor(int(end), dtype=torch.uint8), persistent=False)
        values = {
            "low": torch.tensor(-largest), "high": torch.tensor(largest), "inverse": rounded.inverse,
            "one": torch.ones(()), "step": rounded.step, "step_of_high": rounded.step * _HIGH,
            "middle": torch.tensor(_MIDDLE, dtype=torch.uint8), "none": torch.tensor(0, dtype=torch.uint8),
        }  # fmt: skip
        for name, x in values.items():
            self.register_buffer(name, x.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> list[Byte]:
        if self.clips_bytes:
            found = self._byte(x, self.middle, self.step, self.step)
            ends = (self.lowest,) if self.saturates else (self.lowest, self.highest)
            return [found._replace(codes=clipped(found.codes, *ends))]
        codes = clipped(x * self.inverse, self.low, self.high)
        if not self.is_wide:
            return [self._byte(codes, self.middle, self.step)]
        codes = codes.round()
        high = (codes / _HIGH).floor()
        return [
            self._byte(high, self.middle, self.step_of_high),
            self._byte(codes - high * _HIGH, self.none, self.step),
        ]

    def _byte(self, codes: Tensor, zero: Tensor, step: Tensor, unit: Tensor | None = None) -> Byte:
        """QuantizeLinear, which rounds.  unit: of the codes, 1."""
        inputs = (codes, self.one if unit is None else unit, zero)
        found = symbolic("QuantizeLinear", inputs, dtype=torch.uint8, shape=codes.shape, version=_OPSET)
        return Byte(found, zero, step)


class _ByteWeight(nn.Module):
    """A weight's codes of one byte, (m, n), as W^T."""

    codes: Tensor
    step: Tensor
    zero: Tensor

    def __init__(self, codes: Tensor, step: Tensor, of: torch.dtype, form: Form):
        super().__init__()
        self.form = form
        step = step.detach().flatten().clone() if step.dim() else step.detach().clone()  # of the columns of W^T
        self.register_buffer("codes", codes.detach().T.contiguous().to(of), persistent=False)
        self.register_buffer("step", step, persistent=False)
        self.register_buffer("zero", torch.zeros((), dtype=of), persistent=False)

    def forward(self, x: Byte, bias: Tensor | None = None) -> Tensor:
        """bias (m,): of the form `scaled` alone."""
        shape = (*x.codes.shape[:-1], self.codes.shape[1])
        if self.form == "scaled":
            scaled = (x.codes, self.codes, x.step, self.step, x.zero, None, bias)
            return symbolic("com.microsoft::MatMulIntegerToFloat", scaled, dtype=torch.float32, shape=shape, version=1)
        if self.form == "whole":
            codes = (x.codes, self.codes, x.zero, self.zero)
            whole = symbolic("MatMulInteger", codes, dtype=torch.int32, shape=shape, version=_OPSET)
            return whole.float() * (x.step * self.step)
        with torch._C.DisableTorchFunction():  # the one product that is not in float64
            return torch.matmul(_dequantized(x.codes, x.step, x.zero), _dequantized(self.codes, self.step, axis=1))


class Product(nn.Module):
    """W x of codes by byte.  weight (m, n)

    is_first: of what reads x. onnxruntime makes one integer product of the matrices around a MatMul for one reader, so
    the second one, lora_A, takes ONNX's integer product.
    """

    def __init__(self, weight: Weight, is_first: bool):
        super().__init__()
        is_wide = weight.bits > BYTE
        form: Form = "dequantized" if is_first and not is_wide else "whole"
        kinds = (torch.int8, torch.uint8) if is_wide else (torch.int8,)
        self.parts = nn.ModuleList(
            _ByteWeight(codes, step, kind, form) for (codes, step, _), kind in zip(weight().parts(), kinds, strict=True)
        )

    def forward(self, inputs: list[Byte]) -> list[Tensor]:
        return [_sum_of([part(x) for x in inputs for part in self.parts])]


class FastProduct(nn.Module):
    """W x of all weights of up to 8 bit that read x, in one product, of onnxruntime's own that scales its sums.

    weights (m, n); bias (m,): of the first one.
    """

    bias: Tensor | None

    def __init__(self, weights: list[Weight], bias: Tensor | None):
        super().__init__()
        self.rows = [len(weight.codes) for weight in weights]
        steps = [weight().parts()[0].step.expand(len(weight.codes), 1) for weight in weights]
        codes = torch.cat([weight.codes for weight in weights])
        self.part = _ByteWeight(codes, torch.cat(steps), torch.int8, "scaled")
        padded = None if bias is None else F.pad(bias.detach(), (0, sum(self.rows[1:])))
        self.register_buffer("bias", padded, persistent=False)

    def forward(self, inputs: list[Byte]) -> list[Tensor]:
        first, *rest = inputs
        y = _sum_of([self.part(first, self.bias), *map(self.part, rest)])
        return [*y.split(self.rows, -1)] if len(self.rows) > 1 else [y]


def _sum_of(terms: list[Tensor]) -> Tensor:
    y = terms[0]
    for term in terms[1:]:
        y = y + term
    return y


class OfNumbers(nn.Module):
    """W x of numbers, in this precision.  weight (m, n)"""

    weight: Tensor

    def __init__(self, weight: Weight, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", weight().numbers.detach().T.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.to(self.dtype), self.weight.to(self.dtype)).float()
