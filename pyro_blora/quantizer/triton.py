"""The quantizer's loops on CUDA, as Triton kernels: one launch a call, and sums in two stages.

The compiler chooses how to sum at the size it compiles for; one choice for every size left a GPU almost idle, fifty
times slower than copies of as many bytes (benchmarks/gpu). Here each program writes the six gradients of its block of
elements, and one further sum adds the parts: in the same order every time, so a run gives the same bits again. The
arithmetic is that of `quantizer._EAGER`, operation by operation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _SUMMED_BLOCK = 1024, 4096  # elements of a program: of a map, and of a sum
_OUTPUTS = 6  # gradients of the range and of five weights
_WITHOUT_FUSION = {"enable_fp_fusion": False}  # a product is rounded before it is added to, as in PyTorch

# where each part of a grid's constants starts, as in quantizer.py
_RANGE, _WEIGHT, _EXACT, _SCALE, _INVERSE, _WEIGHTED_SCALE, _BELOW_32, _EDGE = (
    tl.constexpr(i) for i in (0, 1, 5, 6, 10, 14, 18, 19)
)
_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to the nearest, even


def forward(x: Tensor, c: Tensor) -> Tensor:
    """sum_b w_b Q_b(x).  x (n,), c the constants (20,)"""
    out, n = torch.empty_like(x), x.numel()
    if n:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _forward[(triton.cdiv(n, _BLOCK),)](x, c, out, n, _BLOCK, **_WITHOUT_FUSION)
    return out


def backward(grad: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx (n,) and dL/d[range, w_2, ..., w_32] (6,)."""
    of_x = torch.empty_like(x)
    return of_x, _summed(grad, x, c, of_x)


def backward_of_gates(grad: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """dL/d[range, w_2, ..., w_32], (6,)."""
    return _summed(grad, x, c, None)


KERNELS = (forward, backward, backward_of_gates)


def _summed(grad: Tensor, x: Tensor, c: Tensor, of_x: Tensor | None) -> Tensor:
    n = x.numel()
    programs = triton.cdiv(n, _SUMMED_BLOCK)
    parts = torch.empty(programs, _OUTPUTS, dtype=c.dtype, device=c.device)
    if n:
        with torch.cuda.device_of(x):
            _backward[(programs,)](
                grad, x, c, x if of_x is None else of_x, parts, n, _SUMMED_BLOCK, of_x is not None, _OUTPUTS,
                num_warps=8, **_WITHOUT_FUSION,
            )  # fmt: skip
    return parts.sum(0)


@triton.jit
def _forward(x, c, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exact = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    edge = tl.load(c + _EDGE)
    clipped = tl.where(exact > edge, edge, tl.where(exact < -edge, -edge, exact))  # nan stays nan
    value = tl.load(c + _EXACT) * exact
    for i in tl.static_range(4):
        code = (clipped * tl.load(c + _INVERSE + i) + _HALF_EVEN) - _HALF_EVEN
        value = value + code * tl.load(c + _WEIGHTED_SCALE + i)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _backward(grad, x, c, of_x, parts, n, BLOCK: tl.constexpr, TO_X: tl.constexpr, OUTPUTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + at, mask=at < n, other=0.0).to(tl.float32)
    exact = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    edge, value_range, below_32 = tl.load(c + _EDGE), tl.load(c + _RANGE), tl.load(c + _BELOW_32)
    clipped = tl.where(exact > edge, edge, tl.where(exact < -edge, -edge, exact))
    inside = tl.abs(exact) < value_range
    if TO_X:
        slope = tl.load(c + _EXACT) + tl.where(inside, below_32, 0.0)
        tl.store(of_x + at, (g * slope).to(of_x.dtype.element_ty), mask=at < n)
    whole = tl.sum(g * clipped)
    sign = tl.where(exact > 0, 1.0, tl.where(exact < 0, -1.0, 0.0))
    of_range = below_32 * tl.sum(tl.where(inside, 0.0, g * sign))
    mine = parts + tl.program_id(0) * OUTPUTS
    for i in tl.static_range(4):
        code = (clipped * tl.load(c + _INVERSE + i) + _HALF_EVEN) - _HALF_EVEN
        error = tl.sum(g * (code * tl.load(c + _SCALE + i) - clipped))
        of_range += tl.load(c + _WEIGHT + i) * error / value_range
        tl.store(mine + 1 + i, whole + error)
    tl.store(mine, of_range)
    tl.store(mine + 5, whole + tl.sum(g * (exact - clipped)))
