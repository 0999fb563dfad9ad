"""The deployed allocation of a program as what a packed model stores: bit widths, ranges and codes of each tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.gated_model import exact_tensors
from ..layout import BASE, HIDDEN, INPUT, LORA_A, LORA_B, Projection
from ..posterior.draws import deployed
from ..program import BayesianLoRA
from ..quantizer.packing import Scale, packed
from .merged import fitted_range, summed
from .packed import EXACT


class Widths(NamedTuple):
    """The deployed allocation of a program: bits (L, T), open ranks (L,), the range of each tensor of each projection.

    A range is (), or (m, 1) where every row of a weight has its own. smoothing: (n,) of each projection, which weights
    that read its input are multiplied with before they are rounded; None where nothing is. merged: see `packing.pack`.
    """

    program: BayesianLoRA
    bits: Tensor
    ranks: Tensor
    ranges: list[list[Tensor]]
    smoothing: list[Tensor] | None = None
    merged: bool = False

    @classmethod
    def of(cls, program: BayesianLoRA, merged: bool = False) -> Widths:
        net, (z, g) = program.net, deployed(program)
        layout = net.layout
        bits = torch.tensor(layout.ladder)[z.sum(-1).long().cpu()]
        owners = layout.input_owner
        bits[:, INPUT] = bits[owners, INPUT]
        ranges = [
            [_column(net.value_range(int(owners[i]) if t == INPUT else i, t)) for t in range(len(layout.tensors))]
            for i in range(len(layout.projections))
        ]
        smoothing = None
        if net.smoothing is not None and not all(exact_tensors(z)):
            smoothing = [scale.detach().cpu() for scale in net.smoothing.scales()]
        return cls(program, bits, 1 + g.sum(-1).long().cpu(), ranges, smoothing, merged)

    def _tensors(self, index: int) -> dict[str, int]:
        """Places of the tensors that a projection has."""
        places = {"input": INPUT, "base": BASE}
        return places | ({"lora_A": LORA_A, "lora_B": LORA_B, "hidden": HIDDEN} if self._has_adapter(index) else {})

    def _has_adapter(self, index: int) -> bool:
        return self.program.layout.projections[index].adapted and not self.merged

    def entry(self, index: int) -> dict[str, Any]:
        """Of a projection in the manifest."""
        layout, rank = self.program.layout, int(self.ranks[index])
        projection: Projection = layout.projections[index]
        found: dict[str, Any] = {
            "shape": [projection.out_features, projection.in_features],
            "bits": {name: int(self.bits[index, t]) for name, t in self._tensors(index).items()},
        }
        if self._has_adapter(index):
            found |= {"rank": layout.rank, "open": rank, "scale": layout.alpha / layout.rank}
        return found if self.smoothing is None else {**found, "smoothed": True}

    def packed(self, index: int, base: Tensor) -> dict[str, Tensor]:
        """Codes and ranges of a projection's tensors, by their names in the file."""
        projection, weights = self.program.layout.projections[index], {"base": base.float()}
        ranges = list(self.ranges[index])
        if ranges[LORA_A].dim():
            ranges[LORA_A] = ranges[LORA_A][: int(self.ranks[index])]
        if projection.adapted:
            weights |= self._adapter(index)
        found: dict[str, Tensor] = {}
        if self.smoothing is not None:
            scale = self.smoothing[index]
            found[f"{projection.name}.smoothing"] = scale
            weights |= {name: weights[name] * scale for name in ("base", "lora_A") if name in weights}
        if self.merged and projection.adapted:
            weights, ranges[BASE] = self._merged(index, weights, ranges)
        for name, t in self._tensors(index).items():
            bits, value_range = int(self.bits[index, t]), ranges[t].clone()
            if bits < EXACT:
                found[f"{projection.name}.{name}.range"] = value_range
            if name in weights:
                found[f"{projection.name}.{name}"] = (
                    packed(weights[name], value_range, bits) if bits < EXACT else weights[name]
                )
        return found

    def _adapter(self, index: int) -> dict[str, Tensor]:
        down, up = self.program.net.low_rank(self.program.layout.projections[index].name)
        rank = int(self.ranks[index])
        return {"lora_A": down[:rank].detach().cpu(), "lora_B": up[:, :rank].detach().cpu()}

    def _merged(self, index: int, weights: dict[str, Tensor], ranges: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The dequantized base with the adapter, and its range."""
        layout, on_grid = self.program.layout, {}
        for name, t in (("base", BASE), ("lora_A", LORA_A), ("lora_B", LORA_B)):
            bits, x = int(self.bits[index, t]), weights[name]
            on_grid[name] = x if bits == EXACT else Scale.of(ranges[t], bits).rounded(x)
        total = summed(on_grid["base"], on_grid["lora_A"], on_grid["lora_B"], layout.alpha / layout.rank)
        bits = int(self.bits[index, BASE])
        return {"base": total}, ranges[BASE] if bits == EXACT else fitted_range(total, bits)


def _column(value_range: Tensor) -> Tensor:
    """() as it is, (m,) as (m, 1)."""
    found = value_range.detach().cpu()
    return found[:, None] if found.dim() else found
