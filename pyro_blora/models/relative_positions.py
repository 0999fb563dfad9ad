"""DeBERTaV3's relative positions, computed once for all inputs.

transformers computes them anew in every forward, with a number that is copied from the host: the one thing for which a
GPU waits in a step, and which no CUDA graph may hold. A position depends on the difference of its two places alone, so
those of a short input are a corner of a long one's.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn

_SHORTEST = 128  # tables are of this length times a power of two


class _Positions:
    """In the place of `DebertaV2Encoder.get_rel_pos`, with the same values."""

    def __init__(self, encoder: nn.Module):
        kind: Any = type(encoder)
        self.compute = kind.get_rel_pos
        plain = {name: x for name, x in vars(encoder).items() if isinstance(x, bool | int)}
        self.settings = types.SimpleNamespace(**plain)  # not the encoder: it holds this object
        self.tables: dict[tuple[torch.device, int], Tensor] = {}  # all are kept, as a CUDA graph reads where they are

    def __call__(self, hidden_states: Tensor, query_states: Tensor | None = None, relative_pos: Tensor | None = None):
        if relative_pos is not None or query_states is not None or torch.compiler.is_compiling():
            return self.compute(self.settings, hidden_states, query_states, relative_pos)
        length, size = hidden_states.shape[-2], _SHORTEST
        while size < length:
            size *= 2
        key = hidden_states.device, size
        if key not in self.tables:
            with torch.no_grad():
                self.tables[key] = self.compute(self.settings, hidden_states.new_empty(size, 1))
        return self.tables[key][:, :length, :length]


def remember_positions(backbone: nn.Module) -> None:
    """Let every DeBERTaV2 or V3 encoder of a backbone keep its relative positions; others are left as they are."""
    for module in backbone.modules():
        if getattr(module, "relative_attention", False) and hasattr(type(module), "get_rel_pos"):
            module.get_rel_pos = _Positions(module)  # type: ignore[assignment]  # in the place of its method
