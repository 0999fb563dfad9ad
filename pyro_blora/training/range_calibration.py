"""Ranges that fit the bit widths in use: those of least expected loss, tensor by tensor.

A range that covers the largest value wastes a coarse grid: two bits over +-max round nearly every weight to zero, and
a few outliers, which the loss hardly feels, would stretch the grid of every activation. So a geometric ladder of ranges
is tried on a sample of each tensor's values, each squared error weighted by the squared gradient of the loss there (the
diagonal of the empirical Fisher), and the best one for the probabilities of the bit widths is taken. Training then
learns the ranges further, with everything else.
Source: the quadratic loss of Optimal Brain Damage (1990); Nagel et al., A white paper on neural network quantization
(2021), section 3.1, for searching ranges.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.gate_context import Observer, watched
from ..adapters.gated_model import observed
from ..program import BayesianLoRA
from ..quantizer.grid import squared_errors

_CANDIDATES = 0.88 ** torch.arange(40)  # of the largest value, down to 0.7 % of it
_SAMPLE = 1 << 14  # values a tensor


class RangeErrors(NamedTuple):
    """ranges (L, T, C): those tried; errors (L, T, C, K + 1): weighted squared error at each bit width."""

    ranges: Tensor
    errors: Tensor

    def best(self, widths: Tensor) -> Tensor:
        """The range of least expected error.  widths (L, T, K + 1), the probability of each bit width -> (L, T)."""
        expected = (self.errors * widths[..., None, :].to(self.errors)).sum(-1)
        return self.ranges.gather(-1, expected.argmin(-1, keepdim=True)).squeeze(-1)

    def best_by_width(self) -> Tensor:
        """(L, T, K + 1): the range of least error of each bit width."""
        each = torch.eye(self.errors.shape[-1], device=self.errors.device)
        return torch.stack([self.best(width.expand(*self.ranges.shape[:2], -1)) for width in each], -1)


class _Sample(Observer):
    """Values of every tensor with the gradients of the loss there, and the largest value, over several batches."""

    def __init__(self, size: int, device: torch.device):
        self.size, self.anchor = size, torch.zeros((), device=device, requires_grad=True)
        self.values: dict[tuple[int, int], list[Tensor]] = {}
        self.slopes: dict[tuple[int, int], list[Tensor]] = {}
        self.largest: dict[tuple[int, int], Tensor] = {}

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        index = self._drawn((projection, tensor), x)
        values = x.detach().flatten()[index].float()

        def keep(grad: Tensor) -> Tensor:
            return self._keep((projection, tensor), values, grad.flatten()[index])

        return watched(x, self.anchor, keep)

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        index = self._drawn((projection, tensor), weight)

        def keep(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
            slope = grad.flatten(0, -2).mT @ x.flatten(0, -2).to(grad.dtype)  # (m, n): the weight is not copied
            return self._keep((projection, tensor), weight.flatten()[index].float(), slope.flatten()[index])

        return watched(F.linear(x, weight, bias), self.anchor, keep, x, weight)

    def _drawn(self, key: tuple[int, int], x: Tensor) -> Tensor:
        """Which values are kept, and a note of the largest."""
        largest = x.detach().abs().max().float()
        self.largest[key] = torch.maximum(self.largest.get(key, largest), largest)
        return torch.randint(x.numel(), (self.size,), generator=torch.Generator().manual_seed(0)).to(x.device)

    def _keep(self, key: tuple[int, int], values: Tensor, slopes: Tensor) -> Tensor:
        self.values.setdefault(key, []).append(values)
        self.slopes.setdefault(key, []).append(slopes.float())
        return torch.zeros_like(self.anchor)


def range_errors(program: BayesianLoRA, batches: Iterable[tuple[dict, Tensor]]) -> RangeErrors:
    """Every candidate range of every tensor, tried on a sample of it. A tensor of zeros keeps the net's range."""
    net, ladder, batches = program.net, program.layout.ladder, list(batches)
    sample = _Sample(_SAMPLE // max(1, len(batches)), net.log_range.device)
    for inputs, labels in batches:
        with observed(net, sample):
            logits = net.logits(**inputs)
            nll = -program.likelihood(logits, scale=program.log_scale.exp()).log_prob(labels).sum()
            torch.autograd.grad(nll, sample.anchor)
    candidates = _CANDIDATES.to(net.log_range.device)
    with torch.no_grad():
        ranges = net.log_range.exp()[..., None].repeat(1, 1, len(candidates))  # (L, T, C)
        errors = torch.zeros(*ranges.shape, len(ladder), device=ranges.device)
        for key, largest in sample.largest.items():
            if largest > 0:
                weights = torch.cat(sample.slopes[key]).square()
                ranges[key] = largest * candidates
                errors[key] = squared_errors(torch.cat(sample.values[key]), ranges[key], weights, ladder)
    return RangeErrors(ranges, errors)
