"""Ranges of the quantizers: started from the weights and from data, and the share of values beyond them.

Where inputs are smoothed, the start of that, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import whole
from ..layout import ACTIVATIONS, BASE, INPUT, LORA_A, LORA_B
from .gate_context import Observer
from .gated_model import GatedModel, observed

_UNSEEN_RANGE = 1.0  # of an activation before `calibrate`; at 32 bit the range plays no part
_SMALLEST_RANGE = 1e-30  # of a tensor of zeros: the inverse of its 16-bit scale is still a float32
_PERCENTILE = 99.99  # of |activation| that the starting range covers: a handful of outliers would coarsen every grid
_SAMPLE = 1 << 20  # torch.quantile takes at most 2^24 numbers; an even stride that meets every channel is enough


class _Extent(Observer):
    """The largest range that any batch needed, by (projection, tensor)."""

    def __init__(self):
        self.ranges: dict[tuple[int, int], Tensor] = {}

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        stride = max(1, x.numel() // _SAMPLE)
        while math.gcd(stride, x.shape[-1]) > 1:
            stride += 1
        covering = x.detach().flatten()[::stride].float().abs().quantile(_PERCENTILE / 100)
        key = (projection, tensor)
        self.ranges[key] = torch.maximum(self.ranges.get(key, covering), covering)
        return x


@torch.no_grad()
def calibrate(net: GatedModel, batches: Iterable[dict]) -> None:
    """Start every range from data: weights by their maximum, activations by the 99.99th percentile of |x|.

    While lora_B is zero, which says nothing about the size it will have, it takes lora_A's range.
    """
    extent = _Extent()
    with observed(net, extent):
        for batch in batches:
            net(**batch)
    start_ranges(net, extent.ranges)


@torch.no_grad()
def start_ranges(net: GatedModel, observed: dict) -> None:
    ranges, layout = torch.full_like(net.log_range, _UNSEEN_RANGE), net.layout
    for layer in net.layers():
        index = layer.index
        for tensor in map(layout.tensors.index, ACTIVATIONS):
            if (index, tensor) in observed:
                layout.ranges_of(ranges, index, tensor).copy_(observed[index, tensor])
        base = layout.ranges_of(ranges, index, BASE)
        base.copy_(whole(_largest(layer.base_weight(), base)))
        if layer.has_adapter:
            down, up = layer.low_rank()
            of_down, of_up = (layout.ranges_of(ranges, index, tensor) for tensor in (LORA_A, LORA_B))
            of_down.copy_(_largest(down, of_down))
            largest = _largest(up, of_up)
            of_up.copy_(torch.where(largest > 0, largest, down.abs().max()))
    set_ranges(net, ranges)


def _largest(weight: Tensor, ranges: Tensor) -> Tensor:
    """The largest |w|: of the whole weight for a range (), of each row for ranges (m,)."""
    return weight.abs().amax(-1) if ranges.dim() else weight.abs().max()


@torch.no_grad()
def set_ranges(net: GatedModel, ranges: Tensor) -> None:
    """ranges (*layout.range_shape) >= 0; zero becomes the smallest positive range."""
    net.log_range.copy_(ranges.clamp(min=_SMALLEST_RANGE).log())


class _Channels(Observer):
    """The largest |value| of each channel of each input, (n,) by projection."""

    def __init__(self) -> None:
        self.largest: dict[int, Tensor] = {}

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        if tensor == INPUT:
            found = x.detach().float().abs().flatten(0, -2).amax(0)
            self.largest[projection] = torch.maximum(self.largest.get(projection, found), found)
        return x


@torch.no_grad()
def start_smoothing(net: GatedModel, batches: Iterable[dict]) -> None:
    """Start each channel's scale from sqrt(largest |x| / largest |W|), in batches and in the weights that read it.

    Where a channel or its weights are zero it is 1. Without smoothing nothing is done.
    Source: Xiao et al., SmoothQuant (2023), with alpha = 1/2.
    """
    if net.smoothing is None:
        return
    net.smoothing.log_scale.zero_()
    channels, of_weights = _Channels(), dict[int, Tensor]()
    with observed(net, channels):
        for batch in batches:
            net(**batch)
    for layer, owner in zip(net.layers(), net.smoothing.owners, strict=True):
        for weight in (whole(layer.base_weight()), *(layer.low_rank()[:1] if layer.has_adapter else ())):
            found = weight.abs().amax(0)
            of_weights[owner] = torch.maximum(of_weights.get(owner, found), found)
    scales = {}
    for owner, largest in of_weights.items():
        x = channels.largest.get(owner, torch.zeros_like(largest))
        scales[owner] = torch.where((x > 0) & (largest > 0), (x / largest).sqrt(), 1.0)
    net.smoothing.set(scales)


class _Clipped(Observer):
    """Counts the values of every tensor, and those beyond its range."""

    def __init__(self, net: GatedModel):
        self.layout, self.ranges = net.layout, net.log_range.double().exp()
        self.beyond, self.all = self.ranges.new_zeros(2, *net.layout.z_shape[:2])

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        limit = self.layout.ranges_of(self.ranges, projection, tensor)
        self.beyond[projection, tensor] += (x.abs() > (limit[:, None] if limit.dim() else limit)).sum()
        self.all[projection, tensor] += x.numel()
        return x

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.activation(projection, tensor, weight), bias)


@torch.no_grad()
def clipped(net: GatedModel, batches: Iterable[tuple[dict, Tensor]]) -> Tensor:
    """Share of each tensor's values that lie beyond its range, at 32 bit; nan where there is none.  (L, T)"""
    if not net.layers():  # PEFT's own layers have no ranges
        return torch.full(net.layout.z_shape[:2], torch.nan)
    seen = _Clipped(net)
    for inputs, _ in batches:
        with observed(net, seen):
            net(**inputs)
    return seen.beyond / seen.all
