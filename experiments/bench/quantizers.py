"""The quantizer, forward and backward, against what a user would run instead.

ladder          the published residual ladder in eager PyTorch, with its straight-through rounding
fake_quantize   PyTorch's own kernel, one bit width and no gradient of the gates or the range
copies          the floor: copying the five tensors that must move, x, out, its gradient, x again, x's gradient
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_blora.quantizer import LADDER, grids, mixture_weights, quantize_on

from .timing import Row, compared, in_turn, recorded

SHAPES = {"cpu": (4096, 768), "cuda": (65536, 1024)}  # larger than any cache


def _inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(SHAPES[device], generator=generator).to(device, dtype) for _ in range(2))
    gates = torch.tensor([1.0, 0.9, 0.7, 0.2, 0.1], device=device)  # soft, so that every width takes part
    return x.requires_grad_(), torch.tensor(2.5, device=device, requires_grad=True), gates.requires_grad_(), upstream


def residual_ladder(x: Tensor, value_range: Tensor, gates: Tensor) -> Tensor:
    """z_2 x_2 + z_4 e_4 + ..., of the ladder (5,); e_b is what is left, rounded to b bit."""
    clipped = torch.minimum(torch.maximum(x, -value_range), value_range)
    value, out = torch.zeros_like(x), torch.zeros_like(x)
    for gate, bits in zip(gates, LADDER[:-1], strict=False):
        scale = 2 * value_range / (2**bits - 1)
        scaled = (clipped - value) / scale
        part = scale * (scaled + (scaled.round() - scaled).detach())
        value, out = value + part, out + gate * part
    return out + gates[-1] * (x - value)


def subjects(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], object]]:
    """What is run in turn: each a forward and a backward, or the copies of as many bytes."""
    x, value_range, gates, upstream = _inputs(device, dtype)
    (grid,) = grids(value_range, mixture_weights(gates))
    grid = grid._replace(learned=grid.learned.detach().requires_grad_())  # a step makes those of all tensors at once
    bits = 8
    scale = float(2 * value_range.detach() / (2**bits - 1))
    largest = 2 ** (bits - 1) - 1
    source, half = x.detach(), x.detach()[: len(x) // 2]
    target, half_target = torch.empty_like(source), torch.empty_like(half)

    def ours():
        torch.autograd.grad(quantize_on(x, grid), (x, grid.learned), upstream)

    def ladder():
        torch.autograd.grad(residual_ladder(x, value_range, gates), (x, value_range, gates), upstream)

    def fake_quantize():
        torch.autograd.grad(torch.fake_quantize_per_tensor_affine(x, scale, 0, -largest, largest), x, upstream)

    def copies():  # each copy moves two tensors
        target.copy_(source)
        target.copy_(upstream)
        half_target.copy_(half)

    @torch.no_grad()
    def forward():
        quantize_on(x, grid)

    def copy_two():
        target.copy_(source)

    return {
        "quantizer": ours, "ladder": ladder, "fake_quantize": fake_quantize, "copies": copies,
        "forward alone": forward, "copy of its two tensors": copy_two,
    }  # fmt: skip


def measure(device: str, seconds: float) -> list[Row]:
    """On a GPU the goals are shares of the copy's bandwidth, 70 % forward and 60 % both ways; everything is recorded as
    a CUDA graph, as a training step is, so that the kernels are timed and not their launches."""
    section = f"Quantizer, forward and backward of {SHAPES[device]} float32"
    functions = subjects(device)
    if device == "cuda":
        functions = {name: recorded(function) for name, function in functions.items()}
    taken = in_turn(functions, seconds=seconds, device=device)
    return [
        compared(section, taken, "quantizer", "ladder", goal=20, faster=True),
        compared(section, taken, "quantizer", "fake_quantize", goal=2, faster=True),
        compared(section, taken, "quantizer", "copies", goal=2.5 if device == "cpu" else 1 / 0.6),
        compared(section, taken, "forward alone", "copy of its two tensors", goal=None if device == "cpu" else 1 / 0.7),
    ]
