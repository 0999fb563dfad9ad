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

A weight may have a range for each of its rows (output channels): then the constants are (C, ...), a row's range gets
the sums over the row, and the weights w_b get those over all rows.

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
from .grid import EXACT_BITS, Constants, Grid, Rows, grids, grids_of_rows, mixture_weights, number_of_grids

# forward (x, constants, dtype), backward and the backward of range and weights (grad, x, constants)
Kernels = tuple[
    Callable[..., Tensor],
    Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    Callable[[Tensor, Tensor, Tensor], Tensor],
]
_LADDER_ERROR = 1e-4  # by which rounding may put a gate above the one before it
_PROBED = 1000  # elements on which compiled functions are compared with the eager ones
log = logging.getLogger(__name__)


# --- the kernels: each is one loop over the elements, in cpu.c and triton.py


def _forward(x: Tensor, c: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """sum_b w_b Q_b(x), in x's dtype or another.  x and c the `Constants` of G grids: (n,) and (4 G + 4,), or by row
    (rows, n) and (C, 4 G + 4), rows a multiple of C."""
    exact, of = _by_row(x, c).to(c.dtype), Constants.of(c)
    clipped, out = exact.clamp(-of.edge, of.edge), of.exact * exact
    for inverse, weighted in zip(of.inverse.split(1, -1), of.weighted_scales.split(1, -1), strict=True):
        out = out + (clipped * inverse).round() * weighted
    return out.to(dtype or x.dtype).view(x.shape)


def _by_row(x: Tensor, c: Tensor) -> Tensor:
    """(rows / C, C, n), to which the parts of constants (C, 4 G + 4) broadcast; x itself where it has one range."""
    return x if c.dim() == 1 else x.view(x.shape[0] // len(c), len(c), x.shape[1])


def _summed(x: Tensor, c: Tensor) -> Tensor:
    """The sum of each range's values, (1,) or (C,)."""
    return x.sum()[None] if c.dim() == 1 else x.sum((0, -1))


def _backward_of_gates(grad: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """dL/d[ranges, w_2, ..., w_32], (C + G + 1,), from sums over the elements; those of Q_b for e_b would cancel."""
    grad, exact, of = _by_row(grad, c).to(c.dtype), _by_row(x, c).to(c.dtype), Constants.of(c)
    clipped, value_range = exact.clamp(-of.edge, of.edge), of.range.flatten()
    whole, beyond = _summed(grad * clipped, c), _summed(grad * (exact - clipped), c)
    outside = _summed(torch.where(exact.abs() < of.range, 0.0, grad * exact.sign()), c)
    to_range, to_weights = of.below_exact.flatten() * outside, []
    for weight, inverse, scale in zip(
        *(part.split(1, -1) for part in (of.weights, of.inverse, of.scales)), strict=True
    ):
        error = _summed(grad * ((clipped * inverse).round() * scale - clipped), c)
        to_range = to_range + weight.flatten() * error / value_range
        to_weights.append((whole + error).sum())
    return torch.cat([to_range, torch.stack([*to_weights, (whole + beyond).sum()])])


def _backward(grad: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx as x, and the above, in the same pass over grad and x."""
    of = Constants.of(c)
    slope = of.exact + torch.where(_by_row(x, c).to(c.dtype).abs() < of.range, of.below_exact, 0.0)
    return (_by_row(grad, c).to(c.dtype) * slope).to(x.dtype).view(x.shape), _backward_of_gates(grad, x, c)


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


def as_kernels_take(x: Tensor, constants: Tensor) -> Tensor:
    """x as (n,), or (rows, n) where its rows have ranges.  Errors: ValueError for another number of rows."""
    if constants.dim() == 1:
        return x.contiguous().view(-1)
    if x.dim() < 2 or x.shape[-2] != len(constants):
        raise ValueError(f"{len(constants)} ranges do not fit the rows of {tuple(x.shape)}: give one for each row")
    return x.contiguous().view(-1, x.shape[-1])


def quantize_on(x: Tensor, grid: Grid) -> Tensor:
    """sum_b w_b Q_b(x), differentiable in x and in the grid.  x any shape; grid one of `grids`."""
    out: Tensor = _Quantize.apply(as_kernels_take(x, grid.constants), *grid)
    return out.view(x.shape)


def quantize_mixture(x: Tensor, value_range: Tensor, weights: Tensor, ladder: Sequence[int] = LADDER) -> Tensor:
    """sum_b w_b Q_b(x), differentiable in all three.

    Shapes: x any, value_range () > 0, or x (..., C, n) and value_range (C,) of its rows; weights of `mixture_weights`.
    """
    if value_range.dim() == 0:
        (grid,) = grids(value_range, weights, ladder)
    else:
        device, size = weights.device, len(value_range)
        rows = Rows((size,), torch.zeros(size, dtype=torch.long, device=device),
                    torch.arange(size + len(ladder), device=device))  # fmt: skip
        (grid,) = grids_of_rows(value_range, weights, rows, ladder)
    return quantize_on(x, grid)


def quantize(x: Tensor, value_range: Tensor, gates: Tensor, ladder: Sequence[int] = LADDER) -> Tensor:
    """x on the grid that a ladder of gates selects, differentiable in x, range and gates.

    Shapes: x any; value_range a scalar > 0, or one for each row of x (..., C, n), (C,); gates (5,), the ladder [z_2,
    z_4, z_8, z_16, z_32] or another one's, each at most the one before it; relaxed ladders in [0, 1] mix the grids.
    Errors: ValueError for ranges that are not positive and finite or fit no rows, gates that are no ladder, or another
    length of it.
    """
    exact = torch.promote_types(x.dtype, torch.float32)  # so that 32 bit is x itself
    gates = gates.to(torch.promote_types(exact, gates.dtype) if gates.is_floating_point() else exact)
    value_range = torch.as_tensor(value_range, dtype=gates.dtype, device=x.device)
    by_row = value_range.dim() == 1 and x.dim() > 1 and x.shape[-2] == len(value_range)
    if not (by_row or value_range.numel() == 1) or not bool(((value_range > 0) & value_range.isfinite()).all()):
        raise ValueError(
            f"the range of a quantizer must be one number > 0, or one for each row of {tuple(x.shape)}, finite, got "
            f"{value_range}"
        )
    if gates.shape != (len(ladder),):
        raise ValueError(f"gates must be the ladder of {ladder} bit, shape ({len(ladder)},), got {tuple(gates.shape)}")
    beyond = torch.cat([gates.detach().diff(), gates.detach()[:1] - 1, -gates.detach()[-1:]])
    if not bool((beyond <= _LADDER_ERROR).all()):
        raise ValueError(
            f"gates must be a ladder in [0, 1], each at most the one before it, got {gates.tolist()}: cumprod "
            "makes one of independent gates"
        )
    value_range = value_range if by_row else value_range.reshape(())
    return quantize_mixture(x, value_range, mixture_weights(gates), ladder)
