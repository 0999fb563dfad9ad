"""The nested grid: one tensor at a random bit width, as a mixture of plain uniform grids.

    s_b = 2 range / (2^b - 1),   Q_b(x) = s_b * round(clamp(x, -range, range) / s_b),   Q_32(x) = x
    quantize(x) = sum_b w_b Q_b(x),   w_b = z_b - z_next(b)        for a ladder z = [z_2, z_4, z_8, z_16, z_32]

z are the gates of the tensor's ladder: gate z_b is 1 if the bit width is at least b. The scales of these widths have
odd integer ratios (5, 17, 257), so the grids nest, and the published residual ladder
x_2 + z_4 (e_4 + z_8 (e_8 + ...)) equals this mixture, which needs no residual, saves only x and reads no gate on the
host. It needs no nesting either: a ladder may have any widths, such as 3 and 6 bit. With binary gates one weight is 1
and the value is one rounding. Gradients are straight-through, with
c = clamp(x, -range, range), e_b = Q_b(x) - c and W = sum of w_b over b < 32:

    dL/dx     = g * (w_32 + W * 1[|x| < range])
    dL/dw_b   = sum of g * c  +  sum of g * e_b            dL/dw_32 = sum of g * x
    dL/drange = sum_b w_b * (sum of g * e_b) / range  +  W * sum over |x| >= range of g * sign(x)

32 bit is the unquantized float: it is not clipped, so an open ladder is exactly the pretrained network and exactly
plain LoRA, whatever the range. The clip is a few roundings inside the range, so that no code exceeds 2^(b-1) - 1: there
are at most 2^b - 1 distinct values, an int8 at 8 bit. The grid is computed in float32 at least (x / s_16 needs 16 bits
of mantissa), also under bf16 autocast.

The parts that do not depend on x (`Grid`) are computed for all tensors at once, so that a call is one kernel.
Source: van Baalen et al., Bayesian Bits (2020), whose ladder this mixture equals.
"""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bit_widths import LADDER
from . import cpu
from .grid import EXACT_BITS, Constants, Grid, grids, mixture_weights, number_of_grids

# forward (x, constants, dtype), backward and the backward of range and weights (grad, x, constants)
Kernels = tuple[
    Callable[..., Tensor],
    Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    Callable[[Tensor, Tensor, Tensor], Tensor],
]
_PROBED = 1000  # elements on which compiled functions are compared with the eager ones
log = logging.getLogger(__name__)


# --- the kernels: each is one loop over the elements, in cpu.c and triton.py


def _forward(x: Tensor, c: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """sum_b w_b Q_b(x), in x's dtype or another.  x (n,), c the `Constants` of G grids (4 G + 4,)"""
    exact, of = x.to(c.dtype), Constants.of(c)
    clipped, out = exact.clamp(-of.edge, of.edge), of.exact * exact
    for inverse, weighted in zip(of.inverse, of.weighted_scales, strict=True):
        out = out + (clipped * inverse).round() * weighted
    return out.to(dtype or x.dtype)


def _backward_of_gates(grad: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """dL/d[range, w_2, ..., w_32], (G + 2,), from sums over the elements; those of Q_b for e_b would cancel."""
    grad, exact, of = grad.to(c.dtype), x.to(c.dtype), Constants.of(c)
    clipped = exact.clamp(-of.edge, of.edge)
    whole, beyond = (grad * clipped).sum(), (grad * (exact - clipped)).sum()
    to_range = of.below_exact * torch.where(exact.abs() < of.range, 0.0, grad * exact.sign()).sum()
    to_weights = []
    for weight, inverse, scale in zip(of.weights, of.inverse, of.scales, strict=True):
        error = (grad * ((clipped * inverse).round() * scale - clipped)).sum()
        to_range = to_range + weight * error / of.range
        to_weights.append(whole + error)
    return torch.cat([to_range, torch.stack([*to_weights, whole + beyond])])


def _backward(grad: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx (n,), and the above, in the same pass over grad and x."""
    of = Constants.of(c)
    slope = of.exact + torch.where(x.to(c.dtype).abs() < of.range, of.below_exact, 0.0)
    return (grad.to(c.dtype) * slope).to(x.dtype), _backward_of_gates(grad, x, c)


_EAGER = (_forward, _backward, _backward_of_gates)


@functools.cache
def _kernels(device: str = "cpu", widths: int = len(LADDER)) -> Kernels:
    """The three functions: Triton's on CUDA, else compiled from C; eager where no compiler works.

    widths: of the ladder, whose number of grids they are compiled for.
    """
    if os.environ.get("PYRO_BLORA_COMPILE", "1") == "0":
        return _EAGER
    try:
        if device == "cuda":
            from .triton import KERNELS as found
        else:
            from .cpu import KERNELS as found
        _probe(found, device, widths)
    except Exception as error:  # a missing or broken compiler shows itself in many types; eager is always right
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("no working compiler for the quantizer (%s): running it eagerly, several times slower", reason)
        return _EAGER
    return found


def _probe(found: Kernels, device: str, widths: int) -> None:
    """Errors: RuntimeError where what was compiled computes something else."""
    x = torch.linspace(-2, 2, _PROBED, device=device)
    weights = torch.full((widths,), 0.2, device=device)
    (grid,) = grids(torch.ones((), device=device), weights, [*range(2, 1 + widths), EXACT_BITS])
    of_x, sums = found[1](x, x, grid.constants)
    right = torch.equal(found[0](x, grid.constants), _forward(x, grid.constants))
    right &= torch.equal(of_x, _backward(x, x, grid.constants)[0])
    if not (right and torch.allclose(sums, found[2](x, x, grid.constants), rtol=1e-3)):
        raise RuntimeError("what was compiled computes something else")


def kernels(x: Tensor, constants: Tensor) -> Kernels:
    """Those for x's device; eager where a whole network is being compiled, for tensors without values, in float64."""
    if torch.compiler.is_compiling() or constants.dtype != torch.float32:
        return _EAGER
    widths = number_of_grids(constants) + 1
    if x.is_cuda:
        return _kernels("cuda", widths)
    return _kernels("cpu", widths) if x.device.type == "cpu" and cpu.serves(x, constants) else _EAGER


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, learned: Tensor, constants: Tensor) -> Tensor:
        ctx.save_for_backward(x, constants)
        return kernels(x, constants)[0](x.data, constants)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, constants = ctx.saved_tensors
        _, backward, of_gates = kernels(x, constants)
        of_x, of_learned, _ = ctx.needs_input_grad
        if of_x:
            return *backward(grad.contiguous().data, x.data, constants), None
        return None, of_gates(grad.contiguous().data, x.data, constants) if of_learned else None, None


def quantize_on(x: Tensor, grid: Grid) -> Tensor:
    """sum_b w_b Q_b(x), differentiable in x and in the grid.  x any shape; grid one of `grids`."""
    out: Tensor = _Quantize.apply(x.contiguous().view(-1), *grid)  # one dynamic dimension: the same kernels
    return out.view(x.shape)


def quantize_mixture(x: Tensor, value_range: Tensor, weights: Tensor, ladder: Sequence[int] = LADDER) -> Tensor:
    """sum_b w_b Q_b(x), differentiable in all three.  x any; value_range () > 0; weights as of `mixture_weights`"""
    (grid,) = grids(value_range, weights, ladder)
    return quantize_on(x, grid)


def quantize(x: Tensor, value_range: Tensor, gates: Tensor, ladder: Sequence[int] = LADDER) -> Tensor:
    """x on the grid that a ladder of gates selects, differentiable in x, range and gates.

    Shapes: x any; value_range a scalar > 0; gates (5,), the ladder [z_2, z_4, z_8, z_16, z_32] or another one's, each
    at most the one before it; relaxed ladders in [0, 1] mix the grids.
    Errors: ValueError for a range that is not a positive scalar, or another length of the ladder.
    """
    value_range = torch.as_tensor(value_range, dtype=gates.dtype, device=x.device)
    if value_range.numel() != 1 or not bool(value_range > 0):
        raise ValueError(f"the range of a quantizer must be one number > 0, got {value_range}")
    if gates.shape != (len(ladder),):
        raise ValueError(f"gates must be the ladder of {ladder} bit, shape ({len(ladder)},), got {tuple(gates.shape)}")
    return quantize_mixture(x, value_range.reshape(()), mixture_weights(gates), ladder)
