"""Ranges that fit the bit widths in use: those of least expected loss, tensor by tensor.

A range that covers the largest value wastes a coarse grid: two bits over +-max round nearly every weight to zero, and
a few outliers, which the loss hardly feels, would stretch the grid of every activation. So a geometric ladder of ranges
is tried on a sample of each tensor's values, each squared error weighted by the squared gradient of the loss there (the
diagonal of the empirical Fisher), and the best one for the probabilities of the bit widths is taken. Training then
learns the ranges further, with everything else. A weight with a range for every row is searched row by row, on a sample
of its columns.
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
from ..layout import AdapterLayout
from ..program import BayesianLoRA
from ..quantizer.grid import squared_errors

_CANDIDATES = 0.88 ** torch.arange(40)  # of the largest value, down to 0.7 % of it
_SAMPLE = 1 << 14  # values a tensor
_COLUMNS = 256  # of a weight with a range for every row


class RangeErrors(NamedTuple):
    """ranges (L, T, C): those tried; errors (L, T, C, K + 1): weighted squared error at each bit width.

    By channel with `layout.range_shape`, (V,), in place of (L, T).
    """

    ranges: Tensor
    errors: Tensor
    layout: AdapterLayout | None = None

    def best(self, widths: Tensor) -> Tensor:
        """The range of least expected error.  widths (L, T, K + 1), the probability of each bit width -> (L, T)."""
        return self._best(widths if self.layout is None else self.layout.by_range(widths))

    def _best(self, widths: Tensor) -> Tensor:
        expected = (self.errors * widths[..., None, :].to(self.errors)).sum(-1)
        return self.ranges.gather(-1, expected.argmin(-1, keepdim=True)).squeeze(-1)

    def best_by_width(self) -> Tensor:
        """(L, T, K + 1): the range of least error of each bit width."""
        each = torch.eye(self.errors.shape[-1], device=self.errors.device)
        return torch.stack([self._best(width.expand(*self.ranges.shape[:-1], -1)) for width in each], -1)


class _Sample(Observer):
    """Values of every tensor with the gradients of the loss there, and the largest value, over several batches."""

    def __init__(self, layout: AdapterLayout, batches: int, device: torch.device):
        self.layout, self.size, self.columns = layout, _SAMPLE // max(1, batches), -(-_COLUMNS // max(1, batches))
        self.anchor = torch.zeros((), device=device, requires_grad=True)
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
        by_row = self.layout.range_sizes[projection * len(self.layout.tensors) + tensor] > 1
        index = (self._drawn_columns if by_row else self._drawn)((projection, tensor), weight)

        def keep(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
            slope = grad.flatten(0, -2).mT @ x.flatten(0, -2).to(grad.dtype)  # (m, n): the weight is not copied
            values, slopes = (w[:, index] if by_row else w.flatten()[index] for w in (weight, slope))
            return self._keep((projection, tensor), values.float(), slopes)

        return watched(F.linear(x, weight, bias), self.anchor, keep, x, weight)

    def _drawn(self, key: tuple[int, int], x: Tensor) -> Tensor:
        """Which values are kept, and a note of the largest."""
        largest = x.detach().abs().max().float()
        self.largest[key] = torch.maximum(self.largest.get(key, largest), largest)
        if x.numel() <= self.size:
            return torch.arange(x.numel(), device=x.device)
        return torch.randint(x.numel(), (self.size,), generator=torch.Generator().manual_seed(0)).to(x.device)

    def _drawn_columns(self, key: tuple[int, int], weight: Tensor) -> Tensor:
        """The columns that are kept, others in every batch, and a note of the largest of every row."""
        self.largest[key] = weight.detach().abs().amax(-1).float()
        generator = torch.Generator().manual_seed(len(self.values.get(key, ())))
        return torch.randperm(weight.shape[-1], generator=generator)[: self.columns].to(weight.device)

    def _keep(self, key: tuple[int, int], values: Tensor, slopes: Tensor) -> Tensor:
        self.values.setdefault(key, []).append(values)
        self.slopes.setdefault(key, []).append(slopes.float())
        return torch.zeros_like(self.anchor)


def range_errors(program: BayesianLoRA, batches: Iterable[tuple[dict, Tensor]]) -> RangeErrors:
    """Every candidate range of every tensor, tried on a sample of it. A tensor of zeros keeps the net's range."""
    net, ladder, batches = program.net, program.layout.ladder, list(batches)
    sample = _Sample(program.layout, len(batches), net.log_range.device)
    for inputs, labels in batches:
        with observed(net, sample):
            logits = net.logits(**inputs)
            nll = -program.likelihood(logits, scale=program.log_scale.exp()).log_prob(labels).sum()
            torch.autograd.grad(nll, sample.anchor)
    candidates = _CANDIDATES.to(net.log_range.device)
    with torch.no_grad():
        ranges = net.log_range.exp()[..., None].repeat_interleave(len(candidates), -1)  # (*range_shape, C)
        errors = torch.zeros(*ranges.shape, len(ladder), device=ranges.device)
        for key, largest in sample.largest.items():
            tried, found = (program.layout.ranges_of(x, *key) for x in (ranges, errors))
            tried.copy_(torch.where(largest[..., None] > 0, largest[..., None] * candidates, tried))
            values, slopes = (torch.cat(x[key], -1) for x in (sample.values, sample.slopes))
            found.copy_(squared_errors(values, tried, slopes.square(), ladder))
    return RangeErrors(ranges, errors, program.layout)
