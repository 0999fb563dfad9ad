"""Expected bit operations: BOPs = sum over matrix products of MACs * bits of the weight * bits of the activation.

    per projection   MACs(W x) b_input b_base  +  rank * (MACs(A x) b_input b_lora_A + MACs(B h) b_hidden b_lora_B)

One function serves the prior's cost, the progress bar, the report and the tests: it takes probabilities (then the
result is the exact expectation under a mean-field law, since bits and ranks of different chains multiply) or draws.
Two denominators, both always: `adapted`, the adapted projections with all R ranks at 32 x 32 bit, and `model`, every
matrix product of a forward (attention products and head included) with the same adapters at 32 x 32.
An open model is 1.0 of either.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import AdapterLayout


class Full(NamedTuple):
    """Bit operations at 32 x 32 bit with all R ranks, float64 scalars: the two denominators."""

    adapted: Tensor
    model: Tensor


class BOPs(NamedTuple):
    """Bit operations of one forward (batch 1, layout.sequence_length tokens), and their ratios to 32 x 32 bit.

    Shapes: float64, the leading dimensions of the gates.   Units: BOPs = MACs * bit * bit.
    """

    adapted: Tensor
    model: Tensor
    adapted_ratio: Tensor
    model_ratio: Tensor


def expected_bits(layout: AdapterLayout, z_probs: Tensor) -> Tensor:
    """Expected bit width of each tensor.  z_probs (..., L, T, K) marginals or draws -> (..., L, T), bits."""
    ladder = torch.tensor(layout.ladder, dtype=z_probs.dtype, device=z_probs.device)
    return ladder[0] + z_probs @ ladder.diff()


def expected_rank(g_probs: Tensor) -> Tensor:
    """Expected number of open ranks.  g_probs (..., L, R - 1) marginals or draws -> (..., L)."""
    return 1 + g_probs.sum(-1)


def at_full_width(layout: AdapterLayout) -> Full:
    """What the ratios of `expected_bops` are of."""
    full, adapter_macs = float(layout.ladder[-1] ** 2), layout.rank * layout.rank_macs.sum()
    adapted = (layout.macs * _adapted(layout)).sum() + adapter_macs
    return Full(full * adapted, full * (layout.model_macs + adapter_macs))


def _adapted(layout: AdapterLayout) -> Tensor:
    """(L,) bool: the adapted projections; all of them after full fine-tuning, which has no adapter."""
    return layout.g_mask | ~layout.g_mask.any()


def expected_bops(layout: AdapterLayout, z_probs: Tensor, g_probs: Tensor) -> BOPs:
    """E[BOPs], exact under a mean-field law; or the BOPs of draws.

    Shapes: z_probs (..., L, T, K), g_probs (..., L, R - 1) -> each field (...).
    Errors: ValueError for gates of another layout.
    """
    if tuple(z_probs.shape[-3:]) != layout.z_shape or tuple(g_probs.shape[-2:]) != layout.g_shape:
        raise ValueError(
            f"gates of shapes {tuple(z_probs.shape)} and {tuple(g_probs.shape)} do not fit this layout: "
            f"expected (..., {layout.z_shape}) and (..., {layout.g_shape})"
        )
    z_probs, g_probs = z_probs.double(), g_probs.double()
    bits = dict(zip(layout.tensors, expected_bits(layout, z_probs).unbind(-1), strict=True))
    macs, rank_macs = layout.macs.to(z_probs.device), layout.rank_macs.to(z_probs.device)
    base = macs * bits["input"] * bits["base"]
    per_rank = rank_macs[:, 0] * bits["input"] * bits["lora_A"] + rank_macs[:, 1] * bits["hidden"] * bits["lora_B"]
    gated = base + expected_rank(g_probs) * per_rank  # (..., L)
    full = at_full_width(layout)
    adapted = (gated * _adapted(layout).to(z_probs.device)).sum(-1)
    model = gated.sum(-1) + layout.ladder[-1] ** 2 * (layout.model_macs - macs.sum())
    return BOPs(adapted, model, adapted / full.adapted.item(), model / full.model.item())
