"""The layers of a packed model as ONNX's operators, for torch.onnx's exporter.

    y = sum_k c_k w_k * (s_x s_w)

A product of two factors that have codes is QuantizeLinear, DequantizeLinear and MatMul, which onnxruntime runs as one
integer product and scales once: operation by operation that of quantizer/products.py. Codes of every width up to 8 bit
are bytes, an input's around 128, as onnxruntime's kernels take them; those of up to 16 bit are two bytes, so two
products. A product with a factor at 32 bit is in float64, or for speed in float32, as are then those of two bytes that
would take longer. In a small file, one of which only the weight has up to 8 bit is onnx_narrow.py's.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from ..quantizer.products import BYTE
from .low_bit import EXACT, LowBitLinear, OnGrid, Rounded, Weight, compute_in_float32
from .onnx_narrow import NarrowWeight, form_of

log = logging.getLogger(__name__)

_OPSET = 21
_MIDDLE, _HIGH = 128, 256  # of an input's byte; of the high byte's unit
_SHORT = 64  # columns, up to which two products of bytes take longer than one of float32: those of lora_B


def _clipped(x: Tensor, *ends: Tensor) -> Tensor:
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
            return [found._replace(codes=_clipped(found.codes, *ends))]
        codes = _clipped(x * self.inverse, self.low, self.high)
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

    def __init__(self, codes: Tensor, step: Tensor, of: torch.dtype, fused: bool, fast: bool):
        super().__init__()
        self.fused, self.fast = fused, fast
        step = step.detach().flatten().clone() if step.dim() else step.detach().clone()  # of the columns of W^T
        self.register_buffer("codes", codes.detach().T.contiguous().to(of), persistent=False)
        self.register_buffer("step", step, persistent=False)
        self.register_buffer("zero", torch.zeros((), dtype=of), persistent=False)

    def forward(self, x: Byte) -> Tensor:
        shape = (*x.codes.shape[:-1], self.codes.shape[1])
        if not self.fused and self.fast:
            scaled = (x.codes, self.codes, x.step, self.step, x.zero)
            return symbolic("com.microsoft::MatMulIntegerToFloat", scaled, dtype=torch.float32, shape=shape, version=1)
        if not self.fused:
            codes = (x.codes, self.codes, x.zero, self.zero)
            whole = symbolic("MatMulInteger", codes, dtype=torch.int32, shape=shape, version=_OPSET)
            return whole.float() * (x.step * self.step)
        with torch._C.DisableTorchFunction():  # the one product that is not in float64
            return torch.matmul(_dequantized(x.codes, x.step, x.zero), _dequantized(self.codes, self.step, axis=1))


class Product(nn.Module):
    """W x of codes by byte.  weight (m, n)

    fused: by onnxruntime, of the matrices around a MatMul; it does that for one reader of an input, so the second one,
    lora_A, takes ONNX's integer product; if fast, onnxruntime's own, which scales its sums.
    """

    def __init__(self, weight: Weight, fused: bool, fast: bool):
        super().__init__()
        parts, is_wide = weight().parts(), weight.bits > BYTE
        kinds = (torch.int8, torch.uint8) if is_wide else (torch.int8,)
        self.parts = nn.ModuleList(
            _ByteWeight(codes, step, kind, fused and not is_wide, fast)
            for (codes, step, _), kind in zip(parts, kinds, strict=True)
        )

    def forward(self, inputs: list[Byte]) -> Tensor:
        terms = [part(x) for x in inputs for part in self.parts]
        y: Tensor = terms[0]
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


class OneInput(nn.Module):
    """What reads an input: products of codes and products of numbers, each with the form of it that it takes.

    small: weights of up to 8 bit at their own width, where the input has more.
    """

    edge: Tensor
    inverse: Tensor
    step: Tensor

    def __init__(self, rounded: Rounded, weights: list[Weight], dtype: torch.dtype, small: bool = False):
        super().__init__()
        coded, self.narrows = rounded.bits < EXACT, small and rounded.bits > BYTE
        self.codes = Codes(rounded, dtype == torch.float32) if coded else None
        self.bits = rounded.bits
        if coded:
            for name in ("edge", "inverse", "step"):
                self.register_buffer(name, getattr(rounded, name).detach().clone(), persistent=False)
        self.products = nn.ModuleList(
            self._product(weight, number == 0, dtype) for number, weight in enumerate(weights)
        )

    def _product(self, weight: Weight, is_first: bool, dtype: torch.dtype) -> nn.Module:
        form = form_of(weight) if self.narrows and weight.bits <= BYTE else None
        if form is not None:
            return NarrowWeight(weight, form)
        fast = dtype == torch.float32
        if is_of_codes(self.bits, weight.bits, weight.codes.shape[1], fast):
            return Product(weight, is_first, fast)
        return OfNumbers(weight, dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        of_codes = [isinstance(product, Product) for product in self.products]
        coded = self.codes(x) if self.codes is not None and any(of_codes) else None
        numbers = x
        if self.codes is not None and not all(of_codes):
            numbers = (_clipped(x, -self.edge, self.edge) * self.inverse).round() * self.step
        return [product(coded if has else numbers) for product, has in zip(self.products, of_codes, strict=True)]


class OnnxLinear(nn.Module):
    """One projection of the deployed model, in ONNX's operators.

    A smoothed input is divided as in training: a product with 1 / s would be another number in the last bit.
    """

    smoothing: Tensor | None

    def __init__(self, linear: LowBitLinear, dtype: torch.dtype, small: bool):
        super().__init__()
        self.register_buffer("smoothing", linear.smoothing, persistent=False)
        self.bias, self.is_adapted, self.scale = linear.bias, linear.scale is not None, linear.scale
        low_rank = [] if linear.scale is None else [linear.lora_A]
        self.read = OneInput(linear.rounded, [linear.base, *low_rank], dtype, small)
        if linear.scale is not None:
            up: Weight = linear.lora_B
            if dtype == torch.float32:  # the scale is a part of the step, which saves a pass over y
                up, self.scale = _scaled(up, linear.scale), None
            self.hidden = OneInput(linear.hidden, [up], dtype, small)

    def forward(self, x: Tensor) -> Tensor:
        y, *hidden = self.read(x if self.smoothing is None else x / self.smoothing)
        if self.bias is not None:
            y = y + self.bias
        if not self.is_adapted:
            return y
        update: Tensor = self.hidden(hidden[0])[0]
        return y + (update if self.scale is None else self.scale * update)


def _scaled(weight: Weight, scale: float) -> Weight:
    """The same codes with a longer step."""
    step = None if weight.step is None else weight.step * scale
    return Weight(OnGrid(weight().numbers * scale, step, weight.bits))


class Products(NamedTuple):
    """How many products of two codes there are, of numbers with the codes of a weight, and all."""

    integer: int
    narrow: int
    all: int


def in_onnx_operators(model: nn.Module, fast: bool = False, small: bool = False) -> Products:
    """Replace the low-bit layers of a packed model.

    fast: everything but the codes in float32, also between these layers. small: see `OneInput`.
    """
    if fast:
        compute_in_float32(model)
    dtype = torch.float32 if fast else torch.float64
    for name, module in list(model.named_modules()):
        if isinstance(module, LowBitLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, OnnxLinear(module, dtype, small))
    integer, narrow, wide = (
        sum(isinstance(module, kind) for module in model.modules()) for kind in (Product, NarrowWeight, OfNumbers)
    )
    if small and not narrow:
        log.warning("--small changes nothing: no weight of up to 8 bit is read by an input of more")
    return Products(integer, narrow, integer + narrow + wide)
