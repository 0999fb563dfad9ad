"""A plain network that computes what the deployed allocation computes: products of codes, the rest in float64.

    y = Q(W0) Q(x) + b + (alpha / R) Q(B) Q(Q(A) Q(x)),      x / s for x where inputs are smoothed

Operation by operation that of adapters/layers.py in the deployed mode, so that outputs are equal to the bit in
float32. Closed ranks are rows and columns of zeros: at 32 bit, a product of another shape could sum in another order.
No Pyro, no PEFT, no code of the adapters.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizer.packing import Scale
from ..quantizer.products import Coded, product
from ..quantizer.reproducible import reproducible

EXACT = 32  # bits of what has no grid


class Rounded(nn.Module):
    """Q_b of an activation at its learned range, () or (n,), as codes; at 32 bit as it is."""

    edge: Tensor
    inverse: Tensor
    step: Tensor

    def __init__(self, bits: int = EXACT, value_range: Tensor | None = None):
        super().__init__()
        self.bits = bits
        if value_range is not None:
            for name, x in Scale.of(value_range, bits)._asdict().items():
                self.register_buffer(name, x, persistent=False)

    def forward(self, x: Tensor) -> Coded:
        if self.bits == EXACT:
            return Coded(x)
        return Coded.of(x.contiguous(), Scale(self.edge, self.inverse, self.step), self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class OnGrid(NamedTuple):
    """A weight on its grid, step * code: (m, n); step () or (m, 1), None at 32 bit."""

    x: Tensor
    step: Tensor | None = None
    bits: int = EXACT


class Weight(nn.Module):
    """A weight as codes and their step; at 32 bit as it is."""

    codes: Tensor
    step: Tensor | None

    def __init__(self, on_grid: OnGrid):
        super().__init__()
        x, step, self.bits = on_grid
        self.register_buffer("codes", x.detach() if step is None else (x.detach() / step).round(), persistent=False)
        self.register_buffer("step", step, persistent=False)

    def forward(self) -> Coded:
        return Coded(self.codes, self.step, self.bits)

    def extra_repr(self) -> str:
        return f"{tuple(self.codes.shape)}, bits={self.bits}"


class LowRank(NamedTuple):
    """An adapter: lora_A (R, n), what rounds A x, lora_B (m, R), and alpha / R."""

    down: OnGrid
    hidden: Rounded
    up: OnGrid
    scale: float


class Site(NamedTuple):
    """What a projection has beside its bias: what rounds x, its weight, an adapter.

    smoothing: what x is divided by, channel by channel, (n,); the weights that read it are multiplied with it.
    """

    rounded: Rounded
    weight: OnGrid
    adapter: LowRank | None
    smoothing: Tensor | None = None


class LowBitLinear(nn.Module):
    """One projection of the deployed model.  x (..., n) -> (..., m)"""

    smoothing: Tensor | None

    def __init__(self, site: Site, bias: nn.Parameter | None, is_exact: bool):
        super().__init__()
        self.bias, self.rounded, self.base = bias, site.rounded, Weight(site.weight)
        self.scale, self.is_exact = None if site.adapter is None else site.adapter.scale, is_exact
        self.register_buffer("smoothing", site.smoothing, persistent=False)
        if site.adapter is not None:
            self.hidden, self.lora_A, self.lora_B = (
                site.adapter.hidden,
                *map(Weight, (site.adapter.down, site.adapter.up)),
            )

    @property
    def weight(self) -> Tensor:
        """Q(W0), or Q(W0 diag(s)), (m, n)."""
        return self.base().numbers

    def forward(self, x: Tensor) -> Tensor:
        smoothed = x if self.smoothing is None else x / self.smoothing
        coded, multiplied = self.rounded(smoothed), product if self.is_exact else _in_float32
        y = multiplied(coded, self.base(), self.bias)
        if self.scale is None:
            return y
        return y + self.scale * multiplied(self.hidden(multiplied(coded, self.lora_A())), self.lora_B())


def _in_float32(x: Coded, weight: Coded, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.numbers, weight.numbers, bias)


@torch.no_grad()
def put_in(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Replace linear layers by path, and let the model compute reproducibly; in float32 where nothing is rounded.

    Errors: ValueError for a path that has no linear layer.
    """
    modules, is_exact = (
        dict(model.named_modules()),
        any(bits < EXACT for site in sites.values() for bits in _bits(site)),
    )
    for name, site in sites.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{type(model).__name__} has no linear layer {name!r}")
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, LowBitLinear(site, linear.bias, is_exact))
    if is_exact:
        _compute_reproducibly(model)


def _bits(site: Site) -> list[int]:
    own = [site.rounded.bits, site.weight.bits]
    return (
        own if site.adapter is None else [*own, site.adapter.down.bits, site.adapter.hidden.bits, site.adapter.up.bits]
    )


_RUNNING = threading.local()  # `calls`: those of a thread, the innermost last


def _enter(*_: Any) -> None:
    _RUNNING.calls = [*getattr(_RUNNING, "calls", []), reproducible()]
    _RUNNING.calls[-1].__enter__()


def _leave(*_: Any) -> None:
    _RUNNING.calls.pop().__exit__(None, None, None)


def _compute_reproducibly(model: nn.Module) -> None:
    """Let every call of a model run in `reproducible`."""
    model.register_forward_pre_hook(_enter)
    model.register_forward_hook(_leave, always_call=True)


def compute_in_float32(model: nn.Module) -> None:
    """Undo that."""
    for hooks, ours in ((model._forward_pre_hooks, _enter), (model._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
