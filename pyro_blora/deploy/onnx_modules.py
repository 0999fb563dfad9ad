"""The layers of a packed model as ONNX's operators, for torch.onnx's exporter.

A product whose two factors have codes of at most 8 bit is QuantizeLinear, DequantizeLinear and MatMul with the learned
scales, which onnxruntime runs as one integer product; the codes of every width from 2 to 8 are bytes, and Clip keeps an
input within its own. Everything else is float32: a wider input is rounded as in low_bit.py, a weight has its numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from .low_bit import INT8, LowBitLinear, Rounded

_OPSET = 21
_MIDDLE = (
    128  # of an input's uint8: onnxruntime's kernels take these, and change int8 into them where one product reads it
)


def _clipped(x: Tensor, *ends: Tensor) -> Tensor:
    return symbolic("Clip", (x, *ends), dtype=x.dtype, shape=x.shape, version=_OPSET)


class Wide(nn.Module):
    """An input on its grid of more than 8 bit, in float32 as in low_bit.py."""

    low: Tensor
    high: Tensor
    inverse: Tensor
    step: Tensor

    def __init__(self, rounded: Rounded):
        super().__init__()
        values = {"low": -rounded.edge, "high": rounded.edge, "inverse": rounded.inverse, "step": rounded.step}
        for name, x in values.items():
            self.register_buffer(name, x.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (_clipped(x, self.low, self.high) * self.inverse).round() * self.step


class Quantized(nn.Module):
    """An input on its grid of at most 8 bit, as codes and back. Bytes are clipped, a quarter of the memory of x."""

    low: Tensor
    high: Tensor
    step: Tensor
    zero: Tensor

    def __init__(self, rounded: Rounded):
        super().__init__()
        highest = 2 ** (rounded.bits - 1) - 1
        self.saturates = _MIDDLE + highest == torch.iinfo(torch.uint8).max
        ends = {"low": _MIDDLE - highest, "high": _MIDDLE + highest, "zero": _MIDDLE}
        values = {name: torch.tensor(x, dtype=torch.uint8) for name, x in ends.items()}
        for name, x in {**values, "step": rounded.step.detach().clone()}.items():
            self.register_buffer(name, x, persistent=False)

    def codes(self, x: Tensor) -> Tensor:
        found = symbolic("QuantizeLinear", (x, self.step, self.zero), dtype=torch.uint8, shape=x.shape, version=_OPSET)
        return _clipped(found, self.low) if self.saturates else _clipped(found, self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes(x)
        return symbolic("DequantizeLinear", (codes, self.step, self.zero), dtype=x.dtype, shape=x.shape, version=_OPSET)


class Product(nn.Module):
    """x W^T, with the weight as int8 codes where it has them and its input, too.  weight (m, n), step () or (m, 1)"""

    weight: Tensor
    step: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, step: Tensor | None, input_is_int8: bool):
        super().__init__()
        self.is_int8 = step is not None and input_is_int8
        if step is None or not input_is_int8:
            self.register_buffer("weight", weight.detach().T.contiguous(), persistent=False)
            return
        codes = (weight.detach() / step).round().to(torch.int8)
        step = step.flatten() if step.dim() else step  # of the columns of W^T
        self.register_buffer("weight", codes.T.contiguous(), persistent=False)
        self.register_buffer("step", step.detach().clone(), persistent=False)
        self.register_buffer("zero", torch.zeros(step.shape, dtype=torch.int8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.is_int8:
            weight = symbolic(
                "DequantizeLinear", (weight, self.step, self.zero), {"axis": 1}, dtype=torch.float32,
                shape=weight.shape, version=_OPSET,
            )  # fmt: skip
        return torch.matmul(x, weight)


class OnnxLinear(nn.Module):
    """One projection of the deployed model, in ONNX's operators."""

    def __init__(self, linear: LowBitLinear):
        super().__init__()
        self.bias, self.is_adapted = linear.bias, linear.scale is not None
        self.rounded, is_int8 = _input(linear.rounded)
        self.base = Product(linear.weight, linear.steps["weight"], is_int8)
        if linear.scale is not None:
            self.down = Product(linear.lora_A, linear.steps["lora_A"], is_int8)
            self.hidden, is_int8 = _input(linear.hidden)
            step = linear.steps["lora_B"]  # the scale is a part of it: a product less to multiply
            step = None if step is None else step * linear.scale
            self.up = Product(linear.lora_B * linear.scale, step, is_int8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rounded(x)
        y: Tensor = self.base(x)
        if self.bias is not None:
            y = y + self.bias
        return y + self.up(self.hidden(self.down(x))) if self.is_adapted else y


def _input(rounded: nn.Module) -> tuple[nn.Module, bool]:
    """What puts an input on its grid, and whether that is int8."""
    if not isinstance(rounded, Rounded):
        return rounded, False
    is_int8 = rounded.bits <= INT8
    return (Quantized if is_int8 else Wide)(rounded), is_int8


def in_onnx_operators(model: nn.Module) -> tuple[int, int]:
    """Replace the low-bit layers of a packed model; returns (integer products, all products of these layers)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowBitLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, OnnxLinear(module))
    products = [module.is_int8 for module in model.modules() if isinstance(module, Product)]
    return sum(products), len(products)
