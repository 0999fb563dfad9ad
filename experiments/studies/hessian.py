"""HAWQ-V2's sensitivity of every tensor at every bit width: the average trace of the Hessian times the squared error.

    Omega(x, b) = Tr(H_x) / n * ||Q_b(x) - x||^2,      H_x the Hessian of the training loss with respect to x, of size n

Traces are Hutchinson's, v' H v with v of random signs, tensor by tensor: probed together, the estimates of all would be
unbiased, but the curvature between tensors made them ten times as noisy. The Hessian of an activation is that of each
example, averaged over examples. A trace that is estimated below zero counts as zero. Ranks are open: HAWQ-V2 has none.
Source: Dong et al., HAWQ-V2 (NeurIPS 2020), arXiv:1911.03852.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_blora.adapters.gate_context import Observer
from pyro_blora.adapters.gated_model import observed
from pyro_blora.program import BayesianLoRA
from pyro_blora.quantizer.grid import rounded

Batches = Iterable[tuple[dict, Tensor]]


class _Shifted(Observer):
    """Adds zeros to every tensor, with respect to which the loss is differentiated twice."""

    def __init__(self):
        self.shifts: dict[tuple[int, int], list[Tensor]] = {}

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        shift = torch.zeros_like(x, requires_grad=True)
        self.shifts.setdefault((projection, tensor), []).append(shift)
        return x + shift

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        known = self.shifts.setdefault((projection, tensor), [])
        if not known:  # a weight that is used again has one
            known.append(torch.zeros_like(weight, requires_grad=True))
        return F.linear(x, weight.detach() + known[0], bias)


class _Errors(Observer):
    """Mean squared error of every tensor at every bit width, over calls; of activations without padding.

    ranges (L, T, 5).
    """

    mask: Tensor | None = None  # of the batch, (B, tokens)

    def __init__(self, ranges: Tensor, ladder: tuple[int, ...]):
        self.ranges, self.ladder = ranges, ladder
        self.total, self.calls = torch.zeros_like(ranges), torch.zeros_like(ranges[..., :1])

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        read = x[self.mask] if self.mask is not None and x.shape[:2] == self.mask.shape else x
        self._count(projection, tensor, read)
        return x

    def _count(self, projection: int, tensor: int, x: Tensor) -> None:
        for i, bits in enumerate(self.ladder[:-1]):  # the last is exact
            error = rounded(x, self.ranges[projection, tensor, i], bits) - x
            self.total[projection, tensor, i] += error.square().mean()
        self.calls[projection, tensor] += 1

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._count(projection, tensor, weight)
        return F.linear(x, weight, bias)


def traces(program: BayesianLoRA, batches: Batches, *, probes: int, seed: int = 0) -> Tensor:
    """Tr(H_x) of the NLL per example with respect to every tensor, (L, T); 0 where there is none."""
    generator = torch.Generator().manual_seed(seed)
    found, examples = torch.zeros(program.layout.z_shape[:2], dtype=torch.float64), 0
    for inputs, labels in batches:
        observer = _Shifted()
        with observed(program.net, observer), sdpa_kernel(SDPBackend.MATH):  # the fused ones have one derivative
            logits = program.net.logits(**inputs)
            nll = -program.likelihood(logits, scale=program.log_scale.exp().detach()).log_prob(labels).sum()
            shifts = [shift for each in observer.shifts.values() for shift in each]
            slopes = iter(torch.autograd.grad(nll, shifts, create_graph=True))
            for key, own in observer.shifts.items():
                mine = [next(slopes) for _ in own]
                for _ in range(probes):
                    signs = [torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1 for x in own]
                    along = sum((slope * sign).sum() for slope, sign in zip(mine, signs, strict=True))
                    products = torch.autograd.grad(along, own, retain_graph=True, materialize_grads=True)
                    each = ((sign * x).sum() for sign, x in zip(signs, products, strict=True))
                    found[key] += sum(each).double().cpu() / probes
        examples += len(labels)
    return found / max(1, examples)


@torch.no_grad()
def mean_squared_errors(program: BayesianLoRA, batches: Batches, ranges: Tensor) -> Tensor:
    """Mean of (Q_b(x) - x)^2 over the values of every tensor.  ranges (L, T, 5), at each bit width -> (L, T, 5)"""
    errors = _Errors(ranges, program.layout.ladder)
    with observed(program.net, errors):
        for inputs, _ in batches:
            errors.mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            program.net.logits(**inputs)
    return (errors.total / errors.calls.clamp(min=1)).double().cpu()


def sensitivities(program: BayesianLoRA, batches: Batches, ranges: Tensor, *, probes: int, seed: int = 0) -> Tensor:
    """Omega of every tensor at every bit width, (L, T, 5).  ranges (L, T, 5)"""
    batches = list(batches)
    positive = traces(program, batches, probes=probes, seed=seed).clamp(min=0.0)
    return positive[..., None] * mean_squared_errors(program, batches, ranges)
