"""Expected bit operations: BOPs = sum over matrix products of MACs * bits of the weight * bits of the activation.

    per projection   MACs(W x) b_input b_base  +  rank * (MACs(A x) b_input b_lora_A + MACs(B h) b_hidden b_lora_B)

BOPs are bit operations, MACs are multiply-accumulates; both are per example. One function serves the prior's cost, the
progress bar, the report and the tests. It takes draws, or probabilities: then the result is the exact expectation under
a mean-field distribution, since bits and ranks of different ladders multiply.
Two denominators are always reported: `adapted`, the adapted projections with all R ranks at 32 x 32 bit, and `model`,
every matrix product of a forward (attention products and head included) with the same adapters at 32 x 32. A model
whose gates are all open has the ratio 1.0 for both.
"""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .gates import Gates
from .layout import INPUT, PRODUCTS, AdapterLayout


class Full(NamedTuple):
    """Bit operations at 32 x 32 bit with all R ranks, float64 scalars: the two denominators."""

    adapted: Tensor
    model: Tensor


class BOPs(NamedTuple):
    """Bit operations per example (layout.sequence_length tokens, layout.batch_size), and their ratios to 32 x 32 bit.

    Shapes: float64, the leading dimensions of the gates.   Units: BOPs = MACs * bit * bit.
    """

    adapted: Tensor
    model: Tensor
    adapted_ratio: Tensor
    model_ratio: Tensor


def expected_bits(layout: AdapterLayout, z_probs: Tensor) -> Tensor:
    """Expected bit width of each tensor, a shared input in every projection that reads it.

    z_probs (..., L, T, K) marginals or draws -> (..., L, T), bits.
    """
    bits = layout.ladder[0] + z_probs @ layout.on(z_probs.device, "ladder_steps").to(z_probs.dtype)
    if not layout.share_inputs:
        return bits
    shared = bits[..., INPUT].index_select(-1, layout.on(bits.device, "input_owner"))
    return torch.cat([shared[..., None], bits[..., INPUT + 1 :]], -1)


def _per_rank(layout: AdapterLayout, z_probs: Tensor) -> dict[str, Tensor]:
    """E[BOPs] of W x, and of A x and B h at one rank, of every projection.  z_probs (..., L, T, K) -> (..., L)"""
    widths, macs = expected_bits(layout, z_probs).unbind(-1), layout.product_macs(z_probs.device)
    bits = dict(zip(layout.tensors, widths, strict=True))
    return {
        name: math.prod((bits[factor] for factor in of if factor != "rank"), start=macs[name])
        for name, of in PRODUCTS.items()
    }


def _by_rank(each: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(sum of the plain model's products, sum of the adapters')."""
    plain, adapters = (sum(x for name, x in each.items() if ("rank" in PRODUCTS[name]) is of) for of in (False, True))
    return torch.as_tensor(plain), torch.as_tensor(adapters)


def bops_by_product(layout: AdapterLayout, z_probs: Tensor, g_probs: Tensor) -> dict[str, Tensor]:
    """E[BOPs] of W x, and of A x and B h at the expected rank, of every projection.  Shapes as below -> (..., L)"""
    rank = expected_rank(g_probs)
    return {
        name: each * rank if "rank" in PRODUCTS[name] else each for name, each in _per_rank(layout, z_probs).items()
    }


def expected_rank(g_probs: Tensor) -> Tensor:
    """Expected number of open ranks.  g_probs (..., L, R - 1) marginals or draws -> (..., L)."""
    return 1 + g_probs.sum(-1)


def at_full_width(layout: AdapterLayout) -> Full:
    """What the ratios of `expected_bops` are of."""
    plain, adapters = _by_rank(layout.product_macs())
    full, adapter_macs = float(layout.ladder[-1] ** 2), layout.rank * adapters.sum()
    adapted = (plain * _adapted(layout)).sum() + adapter_macs
    return Full(full * adapted, full * (layout.model_macs + adapter_macs))


def _adapted(layout: AdapterLayout, device: torch.device | str = "cpu") -> Tensor:
    """(L,) bool: the adapted projections; all of them after full fine-tuning, which has no adapter."""
    mask = layout.on(device, "g_mask")
    return mask | ~mask.any()


def expected_bops(layout: AdapterLayout, z_probs: Tensor, g_probs: Tensor) -> BOPs:
    """E[BOPs], exact under a mean-field distribution; or the BOPs of draws.

    Shapes: z_probs (..., L, T, K), g_probs (..., L, R - 1) -> each field (...).
    Errors: ValueError for gates of another layout.
    """
    if tuple(z_probs.shape[-3:]) != layout.z_shape or tuple(g_probs.shape[-2:]) != layout.g_shape:
        raise ValueError(
            f"gates of shapes {tuple(z_probs.shape)} and {tuple(g_probs.shape)} do not fit this layout: "
            f"expected (..., {layout.z_shape}) and (..., {layout.g_shape})"
        )
    z_probs, g_probs = z_probs.double(), g_probs.double()
    plain, adapters = _by_rank(_per_rank(layout, z_probs))
    gated = plain + expected_rank(g_probs) * adapters  # (..., L)
    full, plain_macs = at_full_width(layout), _by_rank(layout.product_macs(z_probs.device))[0]
    adapted = gated.masked_fill(~_adapted(layout, z_probs.device), 0.0).sum(-1)
    model = gated.sum(-1) + layout.ladder[-1] ** 2 * (layout.model_macs - plain_macs.sum())
    return BOPs(adapted, model, adapted / full.adapted.item(), model / full.model.item())


def savings(layout: AdapterLayout, z_probs: Tensor, g_probs: Tensor, of_adapted: bool = False) -> Gates[Tensor]:
    """What each gate contributes to the expected saving, in BOPs: Shapley values, which sum to full minus expected.

    BOPs are sums of products such as bits * bits * rank, so what one factor saves depends on the others; a Shapley
    value is its mean over all orders in which the factors could have gone from full to expected. Within a factor, bits
    and ranks are linear in the gates, and each closed gate saves its own share.
    Shapes: z_probs (L, T, K), g_probs (L, R - 1) marginals under a mean-field distribution -> the same, float64;
    the sum over all gates is the saving of `model`, or with `of_adapted` that of `adapted`: a shared input is credited
    with what its adapted readers save, whether or not its owner is adapted.
    Source: Shapley, A value for n-person games (1953).
    """
    z_probs, g_probs = z_probs.double().cpu(), g_probs.double().cpu()
    bits, most = expected_bits(layout, z_probs), float(layout.ladder[-1])
    rank = layout.rank
    factors = {t: (torch.full_like(bits[:, i], most), bits[:, i]) for i, t in enumerate(layout.tensors)}
    factors["rank"] = (torch.full_like(bits[:, 0], rank), expected_rank(g_probs))
    saved = {name: torch.zeros_like(bits[:, 0]) for name in factors}
    for product, all_macs in layout.product_macs().items():
        names, macs = PRODUCTS[product], all_macs * _adapted(layout) if of_adapted else all_macs
        for order in itertools.permutations(names):
            for place, name in enumerate(order):
                full, expected = factors[name]
                before = math.prod(factors[n][1] for n in order[:place])
                after = math.prod(factors[n][0] for n in order[place + 1 :])
                saved[name] += macs * before * (full - expected) * after / math.factorial(len(names))
    steps = torch.tensor(layout.ladder, dtype=torch.float64).diff()
    shares = (1 - z_probs) * steps  # (L, T, K): bits that each gate saves
    per_bit = torch.stack([saved[t] / (most - bits[:, i]).clamp(min=1e-12) for i, t in enumerate(layout.tensors)], -1)
    read = per_bit[:, INPUT].clone()
    per_bit[:, INPUT] = torch.zeros_like(read).index_add(0, layout.input_owner, read)  # what all that read it save
    shares = torch.where(layout.z_mask[..., None], shares, 0.0)
    per_rank = saved["rank"] / (rank - expected_rank(g_probs)).clamp(min=1e-12)
    return Gates(shares * per_bit[..., None], (1 - g_probs) * per_rank[:, None])
