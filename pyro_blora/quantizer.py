"""The nested grid: one tensor at a random bit width, as a mixture of plain uniform grids.

    s_b = 2 range / (2^b - 1),   Q_b(x) = s_b * round(clamp(x, -range, range) / s_b),   Q_32(x) = x
    quantize(x) = sum_b w_b Q_b(x),   w_b = z_b - z_next(b)        for a chain z = [z_2, z_4, z_8, z_16, z_32]

The scales have odd integer ratios (5, 17, 257), so the grids nest, and the published residual ladder
x_2 + z_4 (e_4 + z_8 (e_8 + ...)) equals this mixture, which needs no residual, saves only x and reads no gate on the
host. With binary gates one weight is 1 and the value is one rounding. Gradients are straight-through:

    dL/dx     = g * (w_32 + W * 1[|x| < range])                             W = sum of w_b over b < 32
    dL/dw_b   = sum of g * Q_b(x)
    dL/drange = sum of g * (sum_{b<32} w_b Q_b(x) - W clamp(x)) / range  +  W * sum over |x| >= range of g * sign(x)

32 bit is the unquantized float: it is not clipped, so an open ladder is exactly the pretrained network and exactly
plain LoRA, whatever the range. Codes are clamped to +-(2^(b-1) - 1): at most 2^b - 1 distinct values, an int8 at 8 bit.
The grid is computed in float32 at least (x / s_16 needs 16 bits of mantissa), also under bf16 autocast.

Bytes moved for n float32 values: forward reads 4n and writes 4n, backward reads 8n and writes 4n.
Source: van Baalen et al., Bayesian Bits (2020), whose ladder this mixture equals.
"""

import functools
import logging
import os

import torch
from torch import Tensor

LADDER = (2, 4, 8, 16, 32)  # bit widths; the last is the unquantized float
_GRIDS = LADDER[:-1]
log = logging.getLogger(__name__)


def mixture_weights(gates: Tensor) -> Tensor:
    """Chains (..., 5) of [z_2, ..., z_32] to the weight of each bit width (..., 5): w_b = z_b - z_next."""
    return gates - torch.cat([gates[..., 1:], torch.zeros_like(gates[..., :1])], -1)


def _scales(value_range: Tensor) -> tuple[Tensor, Tensor]:
    """s_b of each grid, and 1 / s_b: (4,) each, computed once a tensor, so that its elements cost products only."""
    scales = torch.stack([2 * value_range / (2**bits - 1) for bits in _GRIDS])
    return scales, 1 / scales


def _codes(x: Tensor, inverse_scale: Tensor, bits: int) -> Tensor:
    largest = 2 ** (bits - 1) - 1
    return (x * inverse_scale).round().clamp(-largest, largest)


def _forward(x: Tensor, value_range: Tensor, weights: Tensor, scales: Tensor, inverse: Tensor) -> Tensor:
    exact = x.to(weights.dtype)
    out = weights[-1] * exact
    for i, bits in enumerate(_GRIDS):
        out = out + weights[i] * (_codes(exact, inverse[i], bits) * scales[i])
    return out.to(x.dtype)


def _backward(
    grad: Tensor, x: Tensor, value_range: Tensor, weights: Tensor, scales: Tensor, inverse: Tensor
) -> tuple[Tensor, ...]:
    """dL/dx, dL/dw for each bit width, and the two sums of dL/drange, in one pass over grad and x."""
    dtype, grad, exact = x.dtype, grad.to(weights.dtype), x.to(weights.dtype)
    quantized_weight = weights[:-1].sum()
    inside = exact.abs() < value_range
    mixture_error = -quantized_weight * exact.clamp(-value_range, value_range)
    sums = []
    for i, bits in enumerate(_GRIDS):
        grid_value = _codes(exact, inverse[i], bits) * scales[i]
        mixture_error = mixture_error + weights[i] * grid_value
        sums.append((grad * grid_value).sum())
    sums.append((grad * exact).sum())
    saturated = torch.where(inside, 0.0, grad * exact.sign()).sum()
    grad_x = grad * (weights[-1] + torch.where(inside, quantized_weight, 0.0))
    return grad_x.to(dtype), *sums, (grad * mixture_error).sum(), saturated


@functools.cache
def _kernels(device: str = "cpu") -> tuple:
    """The two functions, compiled once with dynamic shapes; eager where no compiler works, which is said once."""
    if os.environ.get("PYRO_BLORA_COMPILE", "1") == "0":
        return _forward, _backward
    # without fullgraph, a process that meets more dtypes and sizes than the compiler keeps goes on eagerly
    compiled = tuple(torch.compile(f, dynamic=True) for f in (_forward, _backward))
    probe, one, weights = (torch.ones(shape, device=device) for shape in (8, (), len(LADDER)))
    try:
        compiled[0](probe, one, weights, *_scales(one))
        compiled[1](probe.clone(), probe, one, weights, *_scales(one))
    except Exception as error:  # a missing or broken compiler shows itself in many types; eager is always right
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("no working compiler for the quantizer (%s): running it eagerly, several times slower", reason)
        return _forward, _backward
    return compiled


def _bare(*tensors: Tensor) -> list[Tensor]:
    """The same values without view history or offset, on which the compiler would guard: one recompile a layer."""
    return [t.data if t.numel() > len(LADDER) else t.data.clone() for t in tensors]


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value_range, weights):
        scales, inverse = _scales(value_range)
        ctx.save_for_backward(x, value_range, weights, scales, inverse)
        return _kernels(x.device.type)[0](*_bare(x, value_range, weights, scales, inverse))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, value_range, weights, *scales = ctx.saved_tensors
        backward = _kernels(x.device.type)[1]
        grad_x, *sums, mixture, saturated = backward(*_bare(grad.contiguous(), x, value_range, weights, *scales))
        return grad_x, mixture / value_range + weights[:-1].sum() * saturated, torch.stack(sums)


def quantize_mixture(x: Tensor, value_range: Tensor, weights: Tensor) -> Tensor:
    """sum_b w_b Q_b(x), differentiable in all three.

    Shapes: x any; value_range () > 0; weights (5,), one for each bit width of LADDER, see `mixture_weights`.
    """
    flat = x.contiguous().view(-1)  # one dynamic dimension: every tensor of a network runs the same two kernels
    return _Quantize.apply(flat, value_range.to(weights.dtype), weights).view(x.shape)


def quantize(x: Tensor, value_range: Tensor, gates: Tensor) -> Tensor:
    """x on the grid that a chain of gates selects, differentiable in x, range and gates.

    Shapes: x any; value_range a scalar > 0; gates (5,), the chain [z_2, z_4, z_8, z_16, z_32], each at most the one
    before it; relaxed chains in [0, 1] mix the grids.
    Errors: ValueError for a range that is not a positive scalar or a chain of another length.
    """
    value_range = torch.as_tensor(value_range, dtype=gates.dtype, device=x.device)
    if value_range.numel() != 1 or not bool(value_range > 0):
        raise ValueError(f"the range of a quantizer must be one number > 0, got {value_range}")
    if gates.shape != (len(LADDER),):
        raise ValueError(f"gates must be the chain of {LADDER} bit, shape ({len(LADDER)},), got {tuple(gates.shape)}")
    return quantize_mixture(x, value_range.reshape(()), mixture_weights(gates))


def integer_codes(x: Tensor, value_range: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integer codes and the scale with codes * scale == Q_bits(x), for export.

    Shapes: codes as x, int8 up to 8 bit and int16 at 16; scale ().   Errors: ValueError for 32 bit, which has no codes.
    """
    if bits not in _GRIDS:
        raise ValueError(f"only {_GRIDS} bit have integer codes, got {bits}")
    scales, inverse = _scales(value_range)
    codes = _codes(x.to(value_range.dtype), inverse[_GRIDS.index(bits)], bits)
    return codes.to(torch.int8 if bits <= 8 else torch.int16), scales[_GRIDS.index(bits)]


def squared_errors(x: Tensor, ranges: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean squared error of x on the grid of every bit width, at each of several ranges; 0 at 32 bit.

    Shapes: x any, weights (>= 0) as x; ranges (C,) > 0 -> (C, 5).   Units: those of x squared times weights.
    """
    x, weights, errors = x.flatten().to(ranges.dtype), weights.flatten().to(ranges.dtype), []
    for value_range in ranges:
        scales, inverse = _scales(value_range)
        grids = (_codes(x, inverse[i], bits) * scales[i] for i, bits in enumerate(_GRIDS))
        errors.append(torch.stack([((grid - x).square() * weights).mean() for grid in grids] + [x.new_zeros(())]))
    return torch.stack(errors)


def rounded(x: Tensor, value_range: Tensor, bits: int) -> Tensor:
    """Q_bits(x), without gradients.  x any, value_range ()."""
    if bits == LADDER[-1]:
        return x.detach()
    codes, scale = integer_codes(x.detach(), value_range, bits)
    return (codes * scale).to(x.dtype)
