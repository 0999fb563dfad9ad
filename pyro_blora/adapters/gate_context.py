"""Per-call gates and sampled weights for the gated layers, and activation observers.

A layer calls its `GateContext` for every quantized tensor and every product, which applies the gates of the draw.
While an `Observer` is set, the network runs at 32 bit with all ranks open and the observer receives every tensor, to
measure ranges (range_calibration.py) or the effect of a coarser grid on the loss (gate_init.py).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import HIDDEN, INPUT, TENSORS
from ..quantizer.fake_quantize import quantize_on
from ..quantizer.grid import Constants, Grid
from ..quantizer.packing import Scale
from ..quantizer.products import Coded, product
from ..registry import undefined
from .quantized_linear import Map, Source, quantized_products
from .smoothing import Smoothing

ADAPTER = "default"  # PEFT's name of the one adapter


class Gated:
    """A layer that takes gates and weights from a GateContext; the layers are in layers.py, which imports PEFT."""

    gate_context: "GateContext"
    index: int
    has_adapter = False

    def base_weight(self) -> Tensor:
        """The pretrained weight, (m, n)."""
        raise undefined(self, "base_weight")

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(lora_A (R, n), lora_B (m, R)), where it has an adapter."""
        raise undefined(self, "low_rank")

    def random_weights(self) -> dict[str, nn.Parameter]:
        """Parameters that may be random, by name."""
        return {}


class LayerGates(NamedTuple):
    """What one call computes with."""

    grids: Sequence[Grid | None]
    """Of each (projection, tensor); None for the identity."""
    ranks: Sequence[Tensor] | None
    """By projection; None where all are open."""
    kept: dict[tuple[int, int], Tensor] | None
    """Rounded weights by (projection, tensor), which no gradient can change during the call; None to keep none."""
    drawn: Mapping[tuple[int, str], Tensor]
    """Weights by (projection, name)."""
    scales: Sequence[Tensor] | None = None
    """Of the smoothing, by projection; None where there is none, and where nothing is rounded."""
    bits: Sequence[int] | None = None
    """Of each (projection, tensor), where products are those of codes (quantizer/products.py)."""
    codes: dict[tuple[int, int], Coded] | None = None
    """Weights as codes by (projection, tensor), kept during the call."""


class Observer:
    """Receives the tensors of a network in a forward pass at 32 bit, all ranks open; this class changes nothing.

    A method returns a tensor of the shape and dtype that the network would have had: under autocast a linear map is in
    bfloat16, and a network that mixes two results of one layer (DeBERTa's content and positions) refuses two dtypes.
    """

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        """x, or its replacement. (B, ..., n)"""
        return x

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of the linear map, or its replacement."""
        return F.linear(x, weight, bias)

    def ranks(self, projection: int, hidden: Tensor) -> Tensor:
        """hidden (B, ..., R), or its replacement."""
        return hidden


class _Watched(torch.autograd.Function):
    """Zeros in the shape of a tensor, which take no memory; their gradient, that tensor's, becomes the anchor's."""

    @staticmethod
    def forward(ctx, like, anchor, of_anchor, *saved):
        ctx.of_anchor = of_anchor
        ctx.save_for_backward(*saved)
        return like.new_zeros(()).expand(like.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # read once: a checkpointed block gives them once
        return None, ctx.of_anchor(grad, *saved), None, *(None for _ in saved)


def watched(y: Tensor, anchor: Tensor, of_anchor: Callable[..., Tensor], *saved: Tensor) -> Tensor:
    """y, whose gradient also reaches `anchor`, as of_anchor(gradient of y, *saved).

    What is computed from the gradient is computed in the backward pass and keeps no more than `saved`, so that an
    observer takes the memory of a training step.
    """
    return y + _Watched.apply(y.detach(), anchor, of_anchor, *(x.detach() for x in saved))


class GateContext:
    """The state that the layers of one model read during one call: grids and ranks, or an observer."""

    def __init__(self, owners: list[int] | None = None):
        """owners: for each projection the one whose grid its input is on, where some share one; none: each its own."""
        self.owners = owners
        self.shared: tuple[int, Tensor, Any] | None = None  # owner, input, rounded input of the last call
        self.gates: LayerGates | None = None
        self.keeps_weights = True
        self.smoothing: Smoothing | None = None
        self.observer: Observer | None = None

    @property
    def is_exact(self) -> bool:
        """Whether this call multiplies codes."""
        return self.observer is None and self.gates is not None and self.gates.bits is not None

    def drawn(self, projection: int, name: str, parameter: Tensor) -> Tensor:
        """A random weight of this call, (m, n) or one an example, (B, m, n); the parameter where none was drawn."""
        return parameter if self.gates is None else self.gates.drawn.get((projection, name), parameter)

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        if self.observer is not None:
            return self.observer.activation(projection, tensor, x)
        if self.is_exact:  # `product` rounds it
            return x
        grid = self._grid(projection, tensor)
        return x if grid is None else quantize_on(x, grid)

    def products(
        self, projection: int, x: Tensor, *maps: tuple[int, Tensor, Tensor | None], source: Source | None = None
    ) -> Sequence[Tensor]:
        """Linear maps of the projection's quantized input: (tensor, weight, bias) of each. source: of an x that nobody
        else keeps."""
        if self.is_exact:
            return self._exact_products(projection, x, *maps)
        given, (x, grid), scale = x, self._input(projection, x), self._scale(projection)
        if scale is not None:
            maps = tuple((tensor, weight * scale, bias) for tensor, weight, bias in maps)
        if self.observer is not None:
            return [self.observer.product(projection, tensor, x, weight, bias) for tensor, weight, bias in maps]
        if any(weight.dim() == 3 for _, weight, _ in maps):  # one weight per example: operation by operation
            x = x if grid is None else quantize_on(x, grid)
            return [self._linear(x, *self._weight(projection, tensor, w), bias) for tensor, w, bias in maps]
        on_grids = [Map(*self._weight(projection, tensor, weight), bias) for tensor, weight, bias in maps]
        return quantized_products(x, grid, on_grids, source if x is given else None)

    def _input(self, projection: int, x: Tensor) -> tuple[Tensor, Grid | None]:
        """The input and the grid that it is still to be put on: none where an observer or several readers have it."""
        if self.owners is not None:
            owner = self.owners[projection]
            if self.shared is None or self.shared[0] != owner or self.shared[1] is not x:
                self.shared = owner, x, self.activation(owner, INPUT, self._smoothed(owner, x))
            return self.shared[2], None
        if self.observer is not None:
            return self.observer.activation(projection, INPUT, self._smoothed(projection, x)), None
        return self._smoothed(projection, x), self._grid(projection, INPUT)

    def _smoothed(self, projection: int, x: Tensor) -> Tensor:
        scale = self._scale(projection)
        return x if scale is None else x / scale

    def _scale(self, projection: int) -> Tensor | None:
        if self.observer is not None:
            return None if self.smoothing is None else self.smoothing.scales()[projection]
        scales = self._current().scales
        return None if scales is None else scales[projection]

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor) -> Tensor:
        if self.observer is not None:
            return self.observer.product(projection, tensor, x, weight, None)
        if self.is_exact:
            return product(self._coded(projection, HIDDEN, x), self._coded_weight(projection, tensor, weight))
        return self._linear(x, *self._weight(projection, tensor, weight))

    def _linear(self, x: Tensor, weight: Tensor, grid: Grid | None, bias: Tensor | None = None) -> Tensor:
        weight = weight if grid is None else quantize_on(weight, grid)
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        y = x @ weight.mT  # (B, ..., n) with (B, m, n)
        return y if bias is None else y + bias.to(y.dtype)

    def _exact_products(self, projection: int, x: Tensor, *maps: tuple[int, Tensor, Tensor | None]) -> Sequence[Tensor]:
        owner, scale = projection if self.owners is None else self.owners[projection], self._scale(projection)
        if self.shared is None or self.shared[0] != owner or self.shared[1] is not x:
            self.shared = owner, x, self._coded(owner, INPUT, self._smoothed(owner, x))
        coded = self.shared[2]
        weights = [weight if scale is None else weight * scale for _, weight, _ in maps]
        return [
            product(coded, self._coded_weight(projection, tensor, weight), bias)
            for (tensor, _, bias), weight in zip(maps, weights, strict=True)
        ]

    def _coded(self, projection: int, tensor: int, x: Tensor) -> Coded:
        """x as codes at its one width; at 32 bit as it is."""
        bits, grid = self._current().bits, self._grid(projection, tensor)
        if bits is None or grid is None:
            return Coded(x)
        at = Constants.of(grid.constants).range
        width = bits[projection * len(TENSORS) + tensor]
        return Coded.of(x.contiguous(), Scale.of(at if at.dim() > 1 else at[0], width), width)

    def _coded_weight(self, projection: int, tensor: int, weight: Tensor) -> Coded:
        kept = self._current().codes
        if kept is None:
            return self._coded(projection, tensor, weight)
        if (projection, tensor) not in kept:
            kept[projection, tensor] = self._coded(projection, tensor, weight)
        return kept[projection, tensor]

    def ranks(self, projection: int, hidden: Tensor) -> Tensor:
        if self.observer is not None:
            return self.observer.ranks(projection, hidden)
        ranks = self._current().ranks
        return hidden if ranks is None else hidden * ranks[projection].to(hidden.dtype)

    def _weight(self, projection: int, tensor: int, weight: Tensor) -> tuple[Tensor, Grid | None]:
        """The weight and the grid that it is still to be put on: none where its rounded values are kept."""
        grid, kept = self._grid(projection, tensor), self._current().kept
        if grid is None or kept is None:
            return weight, grid
        if (projection, tensor) not in kept:
            kept[projection, tensor] = quantize_on(weight, grid)
        return kept[projection, tensor], None

    def _grid(self, projection: int, tensor: int) -> Grid | None:
        return self._current().grids[projection * len(TENSORS) + tensor]

    def _current(self) -> LayerGates:
        if self.gates is None:
            raise RuntimeError(
                "a gated layer was called without gates: wrap the call, `with use_gates(net, z, g): net(**batch)`; for "
                "the deployed allocation use z, g = pyro_blora.posterior.deployed(program)"
            )
        return self.gates

    def recomputation(self) -> tuple:
        """Contexts of a checkpoint's forward and of its recomputation. A method, so that a deep copy gets its own."""
        return contextlib.nullcontext(), gates_set(self, self.gates)


@contextlib.contextmanager
def gates_set(gate_context: GateContext, gates: LayerGates | None) -> Iterator[None]:
    before, gate_context.gates, gate_context.shared = gate_context.gates, gates, None
    try:
        yield
    finally:
        gate_context.gates, gate_context.shared = before, None
