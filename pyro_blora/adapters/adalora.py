"""AdaLoRA from PEFT inside our loop: its layers, and its allocator, which the guide `allocated` follows.

An adapted projection computes y = W0 x + b + (alpha / R) * B diag(E) A x, at 32 bit. After every optimizer step PEFT's
allocator zeroes the entries of E that matter least, on its cubic schedule from R everywhere to `target_rank` on
average. The open ranks are a point in the prior's space, so expected ranks, BOPs and reports are those of any run. What
is exported is plain LoRA: diag(E) A and B at the open ranks.

Source: Zhang et al., AdaLoRA (2023); its schedule is in fractions of the steps here.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layout import AdapterLayout
from ..registries import register_adapter
from ..tasks.heads import SEQUENCE, Head
from .gate_context import ADAPTER, GateContext
from .gated_model import GatedModel
from .peft_config import freeze_pooler, lora_config, settle, wrapped

if TYPE_CHECKING:
    import peft

_BEFORE, _AFTER, _INTERVAL = 0.1, 0.3, 0.01  # fractions of the steps: before, after, and between allocations
_ORTHOGONALITY = 0.1  # weight of the penalty, as AdaLoRA has it on most of GLUE


class AdaLoRAModel(GatedModel):
    """A backbone with PEFT's AdaLoRA layers; it ignores the gate context, as AdaLoRA masks ranks itself.

    Buffers: the allocator's running sensitivities, so that a checkpoint has them.
    """

    def __init__(self, peft_model: peft.PeftModel, layout: AdapterLayout, head: Head = SEQUENCE):
        super().__init__(peft_model, layout, GateContext(), head)
        self.allocation = nn.ModuleDict()  # by kind: a buffer for each parameter
        for kind in ("exp_avg_ipt", "exp_avg_unc"):
            self.allocation[kind] = module = nn.Module()
            for name, parameter in self._parameters_of_adapters():
                module.register_buffer(name.replace(".", "/"), torch.zeros_like(parameter))
        self.allocation.register_buffer("opened", torch.ones(len(layout.projections), layout.rank, dtype=torch.bool))

    @property
    def tuner(self) -> Any:
        """PEFT's AdaLoraModel."""
        return self.peft_model.base_model

    def _parameters_of_adapters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that AdaLoRA rates, by their names in PEFT's inner model."""
        layers = tuple(f"{p.name}.lora_" for p in self.layout.projections)
        return [(name, p) for name, p in self.backbone.named_parameters() if name.startswith(layers)]

    def low_rank(self, projection: str) -> tuple[Tensor, Tensor]:
        """(diag(E) A (r, n), B (m, r)) at the open ranks, which may be none."""
        layer: Any = self.backbone.get_submodule(projection)
        scales = layer.lora_E[ADAPTER].squeeze(-1)  # (R,)
        scales, opened = scales / (1 + 1e-5 / len(scales)), scales != 0  # PEFT divides by R + 1e-5
        return scales[opened, None] * layer.lora_A[ADAPTER][opened], layer.lora_B[ADAPTER][:, opened]

    def _scales(self) -> dict[str, Tensor]:
        """E of every projection, (R, 1), by its name in PEFT's inner model."""
        names = (f"{p.name}.lora_E.{ADAPTER}" for p in self.layout.projections)
        return {name: self.backbone.get_parameter(name) for name in names}

    allocates = True

    def penalty(self) -> Tensor:
        """The weighted mean distance of A A^T and B^T B from the identity."""
        distances = []
        for name, p in self._parameters_of_adapters():
            if "lora_E" not in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device)))
        return _ORTHOGONALITY * torch.stack(distances).mean()

    @torch.no_grad()
    def allocate(self, step: int, steps: int, target_rank: int) -> Tensor:
        """PEFT's allocation after optimizer step `step` (from 1) of `steps`, gradients in place; returns the ranks."""
        config, allocator = self.tuner.peft_config[ADAPTER], self.tuner.rankallocator
        config.total_step, config.target_r = steps, target_rank
        config.tinit, config.tfinal = int(_BEFORE * steps), int(_AFTER * steps)
        config.deltaT = max(1, int(_INTERVAL * steps))
        allocator.target_bgt = target_rank * len(allocator.name_set)
        opened = self.allocation.get_buffer("opened")  # (L, R), after the last step
        if step > steps - config.tfinal:  # from here on that is kept
            config.rank_pattern = dict(zip(self._scales(), opened.tolist(), strict=True))
        state = {kind: dict(module.named_buffers()) for kind, module in self.allocation.items()}
        for kind, buffers in state.items():
            setattr(allocator, kind, {name.replace("/", "."): x.clone() for name, x in buffers.items()})
        allocator.ipt = {name: torch.zeros_like(p) for name, p in self._parameters_of_adapters()}
        self.tuner.update_and_allocate(step)
        for kind, buffers in state.items():
            found = getattr(allocator, kind)  # of a head whose name has "lora_" in it, too
            for name in buffers.keys() & {key.replace(".", "/") for key in found}:
                buffers[name].copy_(found[name.replace("/", ".")])
        opened.copy_(torch.stack([scale.squeeze(-1) != 0 for scale in self._scales().values()]))
        return opened.sum(-1)


@register_adapter(
    "adalora",
    excludes={
        "init_lora_weights": "--init_lora_weights eva is for LoRA, which --method adalora does not have: drop one",
        "granularity": "--granularity channel is of quantized weights, --method adalora quantizes nothing: drop one",
    },
)
def adalora(backbone: nn.Module, layout: AdapterLayout, head: Head) -> AdaLoRAModel:
    """PEFT's AdaLoRA at 32 bit, from R ranks everywhere to the guide's `target_rank` on average.

    Errors: ValueError for scope `encoder` and for ranges of channels: nothing is quantized here.
    Source: Zhang et al., AdaLoRA (2023).
    """
    import peft

    if layout.scope != "adapted":
        raise ValueError(f"adalora quantizes nothing, so it has no scope {layout.scope!r}: drop --scope")
    if layout.granularity != "tensor":
        raise ValueError(f"adalora quantizes nothing, so it has no granularity {layout.granularity!r}: drop it")
    layout = dataclasses.replace(layout, share_inputs=False)  # of which it has no gates
    settle(backbone)
    plain = lora_config(backbone, layout, head)
    config = peft.AdaLoraConfig(
        task_type=plain.task_type, target_modules=plain.target_modules, modules_to_save=plain.modules_to_save,
        init_r=layout.rank, target_r=layout.rank, lora_alpha=layout.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        total_step=1,
    )  # fmt: skip
    return AdaLoRAModel(freeze_pooler(wrapped(backbone, config)), layout, head)
