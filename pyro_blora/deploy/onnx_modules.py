"""The layers of a packed model as ONNX's operators, for torch.onnx's exporter.

Their products are those of onnx_products.py; of a small file, where only the weight has up to 8 bit, onnx_narrow.py's.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..quantizer.products import BYTE
from .low_bit import EXACT, LowBitLinear, OnGrid, Rounded, Weight, compute_in_float32
from .onnx_narrow import NarrowWeight, form_of
from .onnx_products import Codes, FastProduct, OfNumbers, Product, clipped, is_of_codes

log = logging.getLogger(__name__)


class OneInput(nn.Module):
    """What reads an input: products of codes and products of numbers, each with the form of it that it takes.

    bias: of the first weight. small: weights of up to 8 bit at their own width, where the input has more.
    """

    edge: Tensor
    inverse: Tensor
    step: Tensor

    def __init__(
        self, rounded: Rounded, weights: list[Weight], dtype: torch.dtype, small: bool = False,
        bias: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        fast, self.bits, self.bias = dtype == torch.float32, rounded.bits, bias
        self.codes = Codes(rounded, fast) if self.bits < EXACT else None
        if self.codes is not None:
            for name in ("edge", "inverse", "step"):
                self.register_buffer(name, getattr(rounded, name).detach().clone(), persistent=False)
        self.products, self.places = nn.ModuleList(), []  # the places of a product's weights among these
        together = []
        for place, weight in enumerate(weights):
            form = form_of(weight) if small and weight.bits <= BYTE < self.bits else None
            of_codes = form is None and is_of_codes(self.bits, weight.bits, weight.codes.shape[1], fast)
            if of_codes and fast:
                together.append(place)
                continue
            numbers = OfNumbers(weight, dtype) if form is None else NarrowWeight(weight, form)
            self.products.append(Product(weight, place == 0) if of_codes else numbers)
            self.places.append([place])
        if together:
            added, self.bias = (bias, None) if 0 in together else (None, bias)
            self.products.append(FastProduct([weights[place] for place in together], added))
            self.places.append(together)

    def forward(self, x: Tensor) -> list[Tensor]:
        of_codes = [isinstance(product, Product | FastProduct) for product in self.products]
        coded = self.codes(x) if self.codes is not None and any(of_codes) else None
        numbers = x
        if self.codes is not None and not all(of_codes):
            numbers = (clipped(x, -self.edge, self.edge) * self.inverse).round() * self.step
        found: dict[int, Tensor] = {}
        for product, has, places in zip(self.products, of_codes, self.places, strict=True):
            found |= zip(places, product(coded) if has else [product(numbers)], strict=True)
        if self.bias is not None:
            found[0] = found[0] + self.bias
        return [found[place] for place in sorted(found)]


class OnnxLinear(nn.Module):
    """One projection of the deployed model, in ONNX's operators.

    A smoothed input is divided as in training: a product with 1 / s would be another number in the last bit.
    """

    smoothing: Tensor | None

    def __init__(self, linear: LowBitLinear, dtype: torch.dtype, small: bool):
        super().__init__()
        self.register_buffer("smoothing", linear.smoothing, persistent=False)
        self.is_adapted, self.scale = linear.scale is not None, linear.scale
        low_rank = [] if linear.scale is None else [linear.lora_A]
        self.read = OneInput(linear.rounded, [linear.base, *low_rank], dtype, small, linear.bias)
        if linear.scale is not None:
            up: Weight = linear.lora_B
            if dtype == torch.float32:  # the scale is a part of the step, which saves a pass over y
                up, self.scale = _scaled(up, linear.scale), None
            self.hidden = OneInput(linear.hidden, [up], dtype, small)

    def forward(self, x: Tensor) -> Tensor:
        y, *hidden = self.read(x if self.smoothing is None else x / self.smoothing)
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
    integer += sum(len(module.rows) for module in model.modules() if isinstance(module, FastProduct))
    if small and not narrow:
        log.warning("--small changes nothing: no weight of up to 8 bit is read by an input of more")
    return Products(integer, narrow, integer + narrow + wide)
