"""HAWQ-V2's sensitivity of every tensor at every bit width: the average trace of the Hessian times the squared error.

    Omega(x, b) = Tr(H_x) / n * ||Q_b(x) - x||^2,      H_x the Hessian of the training loss with respect to x, of size n

The Hessian of an activation is that of each example, averaged over examples. Ranks are open: HAWQ-V2 has none. Traces
are Hutchinson's, of one of two matrices:

    gauss_newton_traces   J' F J, with J the Jacobian of the logits and F the Fisher information about them: what the
                          Hessian is where the loss has its minimum, which HAWQ-V2 supposes; never below zero
    hessian_traces        the Hessian itself, v' H v with v of random signs, tensor by tensor (probed together, they
                          would be unbiased, but ten times as noisy); an estimate below zero counts as zero

Where the gates start, LoRA is not at a minimum: on STS-B the trace of the Hessian itself is below zero, in both halves
of the examples, for 42 % of the inputs and frozen weights, which then cost nothing at 2 bit. So the first is what is
compared, and the second stays to show it.
Source: Dong et al., HAWQ-V2 (NeurIPS 2020), arXiv:1911.03852.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_blora.adapters.gate_context import Observer
from pyro_blora.adapters.gated_model import observed
from pyro_blora.layout import AdapterLayout
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

    ranges (*layout.range_shape, K + 1).
    """

    mask: Tensor | None = None  # of the batch, (B, tokens)

    def __init__(self, layout: AdapterLayout, ranges: Tensor):
        self.layout, self.ranges = layout, ranges
        self.total = ranges.new_zeros(*layout.z_shape[:2], len(layout.ladder))
        self.calls = torch.zeros_like(self.total[..., :1])

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        read = x[self.mask] if self.mask is not None and x.shape[:2] == self.mask.shape else x
        self._count(projection, tensor, read)
        return x

    def _count(self, projection: int, tensor: int, x: Tensor) -> None:
        ranges = self.layout.ranges_of(self.ranges, projection, tensor)
        for i, bits in enumerate(self.layout.ladder[:-1]):  # the last is exact
            error = rounded(x, ranges[..., i], bits) - x
            self.total[projection, tensor, i] += error.square().mean()
        self.calls[projection, tensor] += 1

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._count(projection, tensor, weight)
        return F.linear(x, weight, bias)


def gauss_newton_traces(program: BayesianLoRA, batches: Batches, *, probes: int, seed: int = 0) -> Tensor:
    """Tr(J' F J) of the NLL per example with respect to every tensor, (L, T); 0 where there is none.

    As E|J' v|^2 with E[v v'] = F; examples of a batch have independent v, so what they share of a weight cancels.
    """
    found, examples = torch.zeros(program.layout.z_shape[:2], dtype=torch.float64), 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for inputs, labels in batches:
            observer, scale = _Shifted(), program.log_scale.exp().detach()
            with observed(program.net, observer):
                logits = program.net.logits(**inputs)
                shifts = [shift for each in observer.shifts.values() for shift in each]
                for _ in range(probes):
                    along = logits * program.likelihood.fisher_directions(logits.detach(), labels, scale)
                    slopes = iter(torch.autograd.grad(along.sum(), shifts, retain_graph=True, materialize_grads=True))
                    for key, own in observer.shifts.items():
                        for _ in own:
                            found[key] += next(slopes).square().sum().double().cpu() / probes
            examples += len(labels)
    return found / max(1, examples)


def hessian_traces(program: BayesianLoRA, batches: Batches, *, probes: int, seed: int = 0) -> Tensor:
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
    """Mean of (Q_b(x) - x)^2 over the values of every tensor.  ranges (*range_shape, K + 1) -> (L, T, K + 1)"""
    errors = _Errors(program.layout, ranges)
    with observed(program.net, errors):
        for inputs, _ in batches:
            errors.mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            program.net.logits(**inputs)
    return (errors.total / errors.calls.clamp(min=1)).double().cpu()


def sensitivities(traces: Tensor, errors: Tensor) -> Tensor:
    """Omega of every tensor at every bit width.  traces (L, T), errors (L, T, K + 1) -> (L, T, K + 1)"""
    return traces.clamp(min=0.0)[..., None] * errors
