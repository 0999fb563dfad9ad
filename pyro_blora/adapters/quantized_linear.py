"""Linear maps of a quantized input, Q(W) Q(x) + b, with little saved for the backward pass.

The unrounded tensors are saved, which plain LoRA keeps too, and rounded again in the backward pass: no rounded copy is
stored. An input that plain LoRA does not keep, as its weight is frozen, is recomputed from the tensors that the module
before the map saves (`Source`). The main extra cost of a step is one matrix product for the grid of a frozen weight,
which plain LoRA does not need: half as much again as a map's other two.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizer.fake_quantize import as_kernels_take, kernels
from ..quantizer.grid import Grid

_LARGE = 1 << 26  # multiplications from which on a product of bfloat16 repays its two conversions
_YES, _NO = torch.ones(()), torch.zeros(())
_KEEPS_ITS_INPUT = {nn.LayerNorm, nn.GELU, nn.SiLU}
_OF_TRANSFORMERS = {"GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation",
                    "AccurateGELUActivation", "GELUTanh", "SiLUActivation"}  # fmt: skip


class Source(NamedTuple):
    """The module whose output a tensor is, that module's input, and how often both had been changed in place."""

    module: nn.Module
    x: Tensor
    versions: tuple[int, int]


def remember_sources(backbone: nn.Module) -> None:
    """Let activations and layer norms of a backbone, which keep their input for themselves, mark their output."""
    for module in backbone.modules():
        known = type(module) in _KEEPS_ITS_INPUT or type(module).__name__ in _OF_TRANSFORMERS
        if known and _mark not in module._forward_hooks.values():
            module.register_forward_hook(_mark, prepend=True)  # before a hook that gives something else


def _mark(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or len(inputs) != 1 or type(output) is not Tensor:
        return
    if output is not inputs[0] and not (output.is_inference() or inputs[0].is_inference()):
        source = Source(module, inputs[0], (inputs[0]._version, output._version))
        output.source = source  # type: ignore[attr-defined]  # our mark on a tensor


def source_of(x: Tensor) -> Source | None:
    """Where x comes from, if it can be computed again: not under autocast, whose rules end before the backward pass."""
    source = getattr(x, "source", None)
    if source is None or source.versions != (source.x._version, x._version):
        return None
    return None if torch.is_autocast_enabled(x.device.type) else source


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, source, x, _, constants, *maps):
        weights, of_weights, biases = maps[0::4], maps[2::4], maps[3::4]
        ctx.dtype, ctx.source = dtype, None if source is None else source.module
        # whether it is the source is saved, too: a checkpoint gives back what its recomputation has saved
        what = (x, _NO) if source is None else (source.x, _YES)
        ctx.save_for_backward(*what, constants, *weights, *of_weights)
        rounded_x = _on(x, constants, dtype).flatten(0, -2)
        found = (
            F.linear(rounded_x, _on(weight, c, dtype), None if bias is None else bias.to(dtype))
            for weight, c, bias in zip(weights, of_weights, biases, strict=True)
        )
        # no views: what follows may change them in place, as DeBERTa and Longformer do
        return tuple(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]) for y in found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, is_source, constants, *saved = ctx.saved_tensors
        if ctx.source is not None if torch.compiler.is_compiling() else is_source.numpy():
            x = ctx.source.forward(x)
        weights, of_weights = saved[: len(grads)], saved[len(grads) :]
        needs, found = ctx.needs_input_grad[1:], []
        of_rounded_x: Tensor | None = None
        frozen = not any(needs[4::4])
        coarse = frozen and all(_is_coarse(grad, x) for grad in grads)
        rounded_x = _on(x, constants, torch.bfloat16 if coarse else ctx.dtype).flatten(0, -2)
        for i, (grad, weight, c) in enumerate(zip(grads, weights, of_weights, strict=True)):
            learns_weight, learns_grid, _, learns_bias = needs[4 + 4 * i : 8 + 4 * i]
            grad = grad.flatten(0, -2)  # (tokens, m)
            if needs[1] or needs[2]:
                rounded_weight = _on(weight, c, ctx.dtype)
                of_rounded_x = (
                    grad @ rounded_weight if of_rounded_x is None else of_rounded_x.addmm_(grad, rounded_weight)
                )
            slope = None
            if learns_weight or learns_grid:
                slope = grad.T @ rounded_x if learns_weight else _of_frozen(grad, rounded_x)
            found += [*_slopes(slope, weight, c, learns_weight, learns_grid), None]
            found.append(grad.sum(0) if learns_bias else None)
        del rounded_x
        slopes = _slopes(of_rounded_x, x.flatten(0, -2), constants, *needs[1:3])
        return None, None, slopes[0] if slopes[0] is None else slopes[0].view(x.shape), slopes[1], None, *found


def _of_frozen(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x of a weight that does not learn: it ends in the six sums of its grid, and a part in 300 of an element
    is nothing beside the noise of a batch. It takes a third of the time on processors with matrix units for bfloat16,
    half of it where they have vector instructions for that.
    """
    if not _is_coarse(grad, x):
        return grad.T @ x
    return (grad.to(torch.bfloat16).T @ x.to(torch.bfloat16)).float()


def _is_coarse(grad: Tensor, x: Tensor) -> bool:
    """Whether a product of a frozen weight's is taken in bfloat16."""
    large = grad.numel() * x.shape[-1] >= _LARGE
    on_cpu = grad.device.type == "cpu" and grad.dtype == torch.float32
    return large and on_cpu and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _on(x: Tensor, constants: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x on its grid, in a dtype; None: the unquantized x."""
    if constants is None:
        return x.to(dtype)
    return kernels(x, constants)[0](as_kernels_take(x, constants).data, constants, dtype).view(x.shape)


def _slopes(grad: Tensor | None, x: Tensor, constants: Tensor | None, of_x: bool, of_grid: bool) -> tuple:
    """What arrives at x and at its grid, of a gradient with regard to x on its grid."""
    if grad is None or constants is None:
        return (grad.to(x.dtype) if grad is not None and of_x else None), None
    _, backward, of_gates = kernels(x, constants)
    flat = as_kernels_take(grad, constants).data, as_kernels_take(x, constants).data, constants
    if not of_x:
        return None, of_gates(*flat) if of_grid else None
    to_x, to_grid = backward(*flat)
    return to_x.view(x.shape), to_grid


class Map(NamedTuple):
    """One linear map: weight (m, n), its grid (None: unquantized), bias (m,) or None."""

    weight: Tensor
    grid: Grid | None
    bias: Tensor | None = None


def quantized_products(
    x: Tensor, grid: Grid | None, maps: list[Map], source: Source | None = None
) -> tuple[Tensor, ...]:
    """Q(W) Q(x) + b of each map, differentiable in everything; under autocast, products are in its dtype.

    Shapes: x (..., n) -> (..., m) of each map.   grid: of x, None for the unquantized x.   source: of `source_of`, for
    an x that is not to be kept.
    """
    device = x.device.type
    if grid is None and all(each.grid is None for each in maps):
        return tuple(F.linear(x, weight, bias) for weight, _, bias in maps)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else maps[0].weight.dtype
    flat = [part for weight, g, bias in maps for part in (weight, *(g or (None, None)), bias)]
    return _Products.apply(dtype, source, x, *(grid or (None, None)), *flat)
