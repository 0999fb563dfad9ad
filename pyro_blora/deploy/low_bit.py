"""A plain network that computes what the deployed allocation computes: weights on their grids, inputs rounded.

    y = Q(W0) Q(x) + b + (alpha / R) Q(B) Q(Q(A) Q(x))

Operation by operation that of adapters/layers.py, so that outputs are equal to the bit in float32; arithmetic is in
float32 here, only the numbers are those of a few bits. Closed ranks are rows and columns of zeros: a product of another
shape could sum in another order. No Pyro, no PEFT, no code of the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizer.packing import Scale

INT8 = 8  # bits of the codes that integer kernels take


class Rounded(nn.Module):
    """Q_b of an activation at its learned range, () or (n,)."""

    edge: Tensor
    inverse: Tensor
    step: Tensor

    def __init__(self, value_range: Tensor, bits: int):
        super().__init__()
        self.bits = bits
        for name, x in Scale.of(value_range, bits)._asdict().items():
            self.register_buffer(name, x, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return Scale(self.edge, self.inverse, self.step).rounded(x.contiguous())

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class OnGrid(NamedTuple):
    """A weight on its grid, step * code: (m, n); step () or (m, 1), None for one that has no codes of at most 8 bit."""

    x: Tensor
    step: Tensor | None = None


class LowRank(NamedTuple):
    """An adapter: lora_A (R, n), what rounds A x, lora_B (m, R), and alpha / R."""

    down: OnGrid
    hidden: nn.Module
    up: OnGrid
    scale: float


class LowBitLinear(nn.Module):
    """One projection of the deployed model.  x (..., n) -> (..., m)"""

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, linear: nn.Linear, rounded: nn.Module, step: Tensor | None, adapter: LowRank | None):
        """linear: its weight (m, n) is on its grid, of this step. rounded: of x, `Rounded`, or `nn.Identity`."""
        super().__init__()
        self.weight, self.bias, self.rounded = linear.weight, linear.bias, rounded
        self.scale = None if adapter is None else adapter.scale
        self.steps = {"weight": step}
        if adapter is not None:
            self.hidden = adapter.hidden
            self.register_buffer("lora_A", adapter.down.x, persistent=False)
            self.register_buffer("lora_B", adapter.up.x, persistent=False)
            self.steps |= {"lora_A": adapter.down.step, "lora_B": adapter.up.step}

    def forward(self, x: Tensor) -> Tensor:
        x = self.rounded(x)
        y = F.linear(x, self.weight, self.bias)
        if self.scale is None:
            return y
        return y + self.scale * F.linear(self.hidden(F.linear(x, self.lora_A)), self.lora_B)


class Site(NamedTuple):
    """What a projection has beside its weight: what rounds x, the weight's step as in `OnGrid`, and an adapter."""

    rounded: nn.Module
    step: Tensor | None
    adapter: LowRank | None


@torch.no_grad()
def put_in(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Replace linear layers, whose weights are on their grids already, by path.

    Errors: ValueError for a path that has no linear layer.
    """
    modules = dict(model.named_modules())
    for name, site in sites.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{type(model).__name__} has no linear layer {name!r}")
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, LowBitLinear(linear, *site))
