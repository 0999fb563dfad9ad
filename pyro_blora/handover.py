"""What passes from the top of a program to the gated layers of its network during one call, and what may look on.

A layer asks its `Handover` for every quantized tensor and every product. Most of the time it answers with the gates of
the draw; while an `Observer` is set, the network runs at 32 bit with all ranks open and the observer sees every tensor:
to measure ranges (ranges.py) or how the loss answers to a coarser grid (starting.py).
"""

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from .layout import TENSORS
from .quantizer import quantize_mixture


class Observer:
    """What sees the tensors of a network in one forward at 32 bit, all ranks open; the base class only looks on."""

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        """x, or what to go on with instead. (B, ..., n)"""
        return x

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear map, or what to go on with instead."""
        return F.linear(x, weight, bias)

    def ranks(self, projection: int, hidden: Tensor) -> Tensor:
        """hidden (B, ..., R), or what to go on with instead."""
        return hidden


class Handover:
    """What the layers of one model read during one call: mixture weights, ranges and ranks, or an observer."""

    def __init__(self):
        # (weights by (projection, tensor), None for the identity; ranges likewise; ranks by projection)
        self.gates: tuple | None = None
        self.observer: Observer | None = None

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        if self.observer is not None:
            return self.observer.activation(projection, tensor, x)
        return self._quantize(projection, tensor, x)

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.observer is not None:
            return self.observer.product(projection, tensor, x, weight, bias)
        return F.linear(x, self._quantize(projection, tensor, weight), bias)

    def ranks(self, projection: int, hidden: Tensor) -> Tensor:
        if self.observer is not None:
            return self.observer.ranks(projection, hidden)
        return hidden * self.gates[2][projection].to(hidden.dtype)

    def _quantize(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        if self.gates is None:
            raise RuntimeError(
                "a gated layer was called without gates: wrap the call, `with adapters.gates(net, z, g): net(**batch)`;"
                " for the deployed allocation use z, g = the modes of the guide's posterior"
            )
        weights, ranges, _ = self.gates
        index = projection * len(TENSORS) + tensor
        return x if weights[index] is None else quantize_mixture(x, ranges[index], weights[index])

    def recomputation(self) -> tuple:
        """Contexts of a checkpoint's forward and of its recomputation. A method, so that a deep copy gets its own."""
        return contextlib.nullcontext(), handed_over(self, self.gates)


@contextlib.contextmanager
def handed_over(handover: Handover, gates: tuple | None) -> Iterator[None]:
    before, handover.gates = handover.gates, gates
    try:
        yield
    finally:
        handover.gates = before
