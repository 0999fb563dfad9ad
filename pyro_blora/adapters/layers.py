"""The gated linear layers: LoRA as PEFT has it, B-LoRA-XS, and maps without an adapter; all read their `GateContext`.

One adapted projection computes, with Q the mixture of nested grids (fake_quantize.py), g the rank gates, xq = Q(x):

    y = Q(W0) xq + b + (alpha / R) * Q(B) diag(g) Q(Q(A) xq)

A layer has no state of its own: `adapters.use_gates` sets gates and drawn weights for one call.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from ..layout import BASE, HIDDEN, LORA_A, LORA_B
from .gate_context import ADAPTER, GateContext, Gated
from .quantized_linear import source_of
from .xs import factors


class GatedLinear(LoraLinear, Gated):
    """PEFT's LoRA layer with quantized tensors and rank gates; `save_pretrained` writes it as plain LoRA.

    Shapes: x (..., n) -> (..., m); weight (m, n), lora_A (R, n), lora_B (m, R).
    """

    has_adapter = True
    lora_A: Any  # PEFT's, by the adapter's name
    lora_B: Any

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        gate_context, index = self.gate_context, self.index
        base: Any = self.get_base_layer()
        down, up = self.low_rank()
        # (..., m) and (..., R)
        y, hidden = gate_context.products(index, x, (BASE, base.weight, base.bias), (LORA_A, down, None))
        hidden = gate_context.ranks(index, gate_context.activation(index, HIDDEN, hidden))
        return y + self.scaling[ADAPTER] * gate_context.product(index, LORA_B, hidden, up)

    def base_weight(self) -> Tensor:
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight
        return weight

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(lora_A (R, n), lora_B (m, R)): the parameters, or what was drawn in their place."""
        down, up = (self.gate_context.drawn(self.index, name, p) for name, p in self.random_weights().items())
        return down, up

    def start(self) -> None:
        """Called once, when PEFT has made the layer; its ranges start from what this leaves."""

    def random_weights(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A[ADAPTER].weight, "lora_B": self.lora_B[ADAPTER].weight}


class XSLinear(GatedLinear):
    """B-LoRA-XS: lora_A = S Q^T and P, in PEFT's lora_B, are frozen; lora_B = P M with the core M (R, R) learned.

    PEFT's `save_pretrained` would lose the core, so it is refused: `pyro_blora.export` writes plain LoRA of it.
    """

    @torch.no_grad()
    def start(self, **settings: str) -> None:
        """Frozen factors of the base weight, and a core of zeros: step 0 is the pretrained model."""
        rank = self.r[ADAPTER]
        right, left = factors(self.base_weight(), rank, **settings)
        for side, value in ((self.lora_A, right), (self.lora_B, left)):
            side[ADAPTER].weight.requires_grad_(False).copy_(value)
        self.lora_core = nn.Linear(rank, rank, bias=False, device=left.device, dtype=left.dtype)
        nn.init.zeros_(self.lora_core.weight)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What PEFT merges into the base weight, (m, n)."""
        down, up = self.low_rank()
        delta: Tensor = self.scaling[adapter] * (up @ down)
        return delta

    def low_rank(self) -> tuple[Tensor, Tensor]:
        core = self.gate_context.drawn(self.index, "core", self.lora_core.weight)
        # a weight, which is quantized from float32 as LoRA's is
        with torch.autocast(core.device.type, enabled=False), torch._C.DisableTorchFunction():
            return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight @ core

    def random_weights(self) -> dict[str, nn.Parameter]:
        return {"core": self.lora_core.get_parameter("weight")}


class QuantizedLinear(nn.Module, Gated):
    """A linear map without an adapter whose input and weight are quantized; its parameters keep their names."""

    def __init__(self, linear: nn.Linear, gate_context: GateContext, index: int):
        super().__init__()
        self.weight, self.bias, self.kind = linear.weight, linear.bias, type(linear)
        self.gate_context, self.index = gate_context, index

    def forward(self, x: Tensor) -> Tensor:
        return self.gate_context.products(self.index, x, (BASE, self.weight, self.bias), source=source_of(x))[0]

    def base_weight(self) -> Tensor:
        return self.weight

    def plain(self) -> nn.Linear:
        linear = self.kind(self.weight.shape[1], self.weight.shape[0], self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear
