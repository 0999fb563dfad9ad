"""The quantizer's loops on CUDA, as Triton kernels: one launch a call, and sums in two stages.

The compiler chooses how to sum at the size it compiles for; one choice for every size left a GPU almost idle, fifty
times slower than copies of as many bytes (benchmarks/gpu). Here each program adds up the six gradients of its blocks of
elements in registers, and one further sum adds the programs' parts: in an order that depends on the size only, so a run
gives the same bits again on any GPU. The values are those of `quantizer._EAGER`, operation by operation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import number_of_grids

# chosen on an H200 (benchmarks/gpu): elements that a program has in its registers at once, of a map and of a sum
_BLOCK, _SUMMED_BLOCK, _WARPS = 2048, 1024, 4
_LEAST_BLOCK = 128  # the threads of a program
_PROGRAMS, _MOST_BLOCKS = 512, 64  # of a sum: programs from which on each takes several blocks, and how many at most
_WITHOUT_FUSION = {"enable_fp_fusion": False}  # a product is rounded before it is added to, as in PyTorch

_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to the nearest, even


def forward(x: Tensor, c: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """sum_b w_b Q_b(x), in x's dtype or another.  x and c the `Constants` of G grids: (n,) and (4 G + 4,), or by row
    (rows, n) and (C, 4 G + 4), rows a multiple of C."""
    out, (rows, n, channels) = torch.empty_like(x, dtype=dtype), _sizes(x, c)
    block = _block(_BLOCK, n, channels)
    blocks = triton.cdiv(n, block)
    if x.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _forward[(rows * blocks,)](
                x, c, out, n, channels, blocks, block, number_of_grids(c), num_warps=_WARPS, **_WITHOUT_FUSION
            )
    return out


def backward(grad: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx as x and dL/d[ranges, w_2, ..., w_32] (C + G + 1,)."""
    of_x = torch.empty_like(x)
    return of_x, _summed(grad, x, c, of_x)


def backward_of_gates(grad: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """dL/d[ranges, w_2, ..., w_32], (C + G + 1,)."""
    return _summed(grad, x, c, None)


def _sizes(x: Tensor, c: Tensor) -> tuple[int, int, int]:
    """Rows, elements of a row, and how many rows have constants of their own."""
    return (1, x.numel(), 1) if c.dim() == 1 else (x.shape[0], x.shape[1], len(c))


def _block(most: int, n: int, channels: int) -> int:
    """Elements of a program: no more than a row needs, where rows have constants of their own."""
    return most if channels == 1 else min(most, max(_LEAST_BLOCK, triton.next_power_of_2(n)))


KERNELS = (forward, backward, backward_of_gates)


def _summed(grad: Tensor, x: Tensor, c: Tensor, of_x: Tensor | None) -> Tensor:
    (rows, n, channels), grids = _sizes(x, c), number_of_grids(c)
    block = _block(_SUMMED_BLOCK, n, channels)
    blocks = triton.cdiv(n, block)
    of_a_program = min(_MOST_BLOCKS, triton.next_power_of_2(max(1, triton.cdiv(rows * blocks, _PROGRAMS))))
    of_a_program = min(of_a_program, triton.next_power_of_2(max(1, blocks)))  # none has blocks of two rows
    programs = triton.cdiv(blocks, of_a_program)
    parts = torch.empty(rows * programs, grids + 2, dtype=c.dtype, device=c.device)
    if x.numel():
        with torch.cuda.device_of(x):
            _backward[(rows * programs,)](
                grad, x, c, x if of_x is None else of_x, parts, n, channels, programs, block, of_a_program,
                of_x is not None, grids, num_warps=_WARPS, **_WITHOUT_FUSION,
            )  # fmt: skip
    if c.dim() == 1:
        return parts.sum(0)
    of_rows = parts.view(-1, channels, programs, grids + 2).sum((0, 2))
    return torch.cat([of_rows[:, 0], of_rows[:, 1:].sum(0)])


@triton.jit
def _forward(x, c, out, n, channels, blocks, BLOCK: tl.constexpr, GRIDS: tl.constexpr):
    EXACT: tl.constexpr = 1 + GRIDS  # where each part of the `Constants` starts
    INVERSE: tl.constexpr = 2 + 2 * GRIDS
    WEIGHTED_SCALE: tl.constexpr = 2 + 3 * GRIDS
    EDGE: tl.constexpr = 3 + 4 * GRIDS
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x, out, c = x + row.to(tl.int64) * n, out + row.to(tl.int64) * n, c + (row % channels) * (4 * GRIDS + 4)
    exact = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    edge = tl.load(c + EDGE)
    clipped = tl.where(exact > edge, edge, tl.where(exact < -edge, -edge, exact))  # nan stays nan
    value = tl.load(c + EXACT) * exact
    for i in tl.static_range(GRIDS):
        code = (clipped * tl.load(c + INVERSE + i) + _HALF_EVEN) - _HALF_EVEN
        value = value + code * tl.load(c + WEIGHTED_SCALE + i)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _error(g, clipped, so_far, scale, inverse):
    """Adds g e_b of a grid to what there is so far; rounded once, which no value depends on."""
    code = (clipped * tl.load(inverse) + _HALF_EVEN) - _HALF_EVEN
    return tl.fma(g, tl.fma(code, tl.load(scale), -clipped), so_far)


@triton.jit
def _backward(
    grad, x, c, of_x, parts, n, channels, programs, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TO_X: tl.constexpr,
    GRIDS: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = 1 + GRIDS  # where each part of the `Constants` starts
    SCALE: tl.constexpr = 2 + GRIDS
    INVERSE: tl.constexpr = 2 + 2 * GRIDS
    BELOW_32: tl.constexpr = 2 + 4 * GRIDS
    EDGE: tl.constexpr = 3 + 4 * GRIDS
    row, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    start = row.to(tl.int64) * n
    grad, x, of_x, c = grad + start, x + start, of_x + start, c + (row % channels) * (4 * GRIDS + 4)
    edge, value_range, below_32 = tl.load(c + EDGE), tl.load(c), tl.load(c + BELOW_32)
    exact_weight, none = tl.load(c + EXACT), tl.zeros([BLOCK], tl.float32)
    whole, beyond, outside, errors = none, none, none, (none,)
    for _ in tl.static_range(1, GRIDS):
        errors = errors + (none,)  # type: ignore[assignment]  # noqa: RUF005  # Triton has no unpacking
    first = program.to(tl.int64) * (BLOCK * BLOCKS) + tl.arange(0, BLOCK)
    for k in tl.range(BLOCKS):
        at = first + k * BLOCK
        g = tl.load(grad + at, mask=at < n, other=0.0).to(tl.float32)
        exact = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        clipped = tl.where(exact > edge, edge, tl.where(exact < -edge, -edge, exact))
        inside = tl.abs(exact) < value_range
        if TO_X:
            slope = exact_weight + tl.where(inside, below_32, 0.0)
            tl.store(of_x + at, (g * slope).to(of_x.dtype.element_ty), mask=at < n)
        whole = tl.fma(g, clipped, whole)
        beyond = tl.fma(g, exact - clipped, beyond)
        sign = tl.where(exact > 0, 1.0, tl.where(exact < 0, -1.0, 0.0))
        outside += tl.where(inside, 0.0, g * sign)
        more = (_error(g, clipped, errors[0], c + SCALE, c + INVERSE),)
        for i in tl.static_range(1, GRIDS):
            so_far = _error(g, clipped, errors[i], c + SCALE + i, c + INVERSE + i)
            more = more + (so_far,)  # type: ignore[assignment]  # noqa: RUF005  # Triton has no unpacking
        errors = more
    everything, of_range = tl.sum(whole), below_32 * tl.sum(outside)
    mine = parts + tl.program_id(0) * (GRIDS + 2)
    for i in tl.static_range(GRIDS):
        error = tl.sum(errors[i])
        of_range += tl.load(c + 1 + i) * error / value_range
        tl.store(mine + 1 + i, everything + error)
    tl.store(mine, of_range)
    tl.store(mine + 1 + GRIDS, everything + tl.sum(beyond))
