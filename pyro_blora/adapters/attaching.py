"""Gated, quantized LoRA put into a Hugging Face backbone by PEFT; the only file with its custom-module hook.

Scope `encoder` also quantizes input and weight of every other linear map of the encoder, without an adapter. The task
head stays at 32 bit, and a pooler inside the base model is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ..layout import BATCH_SIZE, AdapterLayout
from ..models.layout import layout_of
from ..tasks.heads import SEQUENCE, Head
from .gate_context import Handover
from .gated_model import GatedModel
from .peft_config import freeze_pooler, lora_config, settle, wrapped
from .ranges import start_ranges
from .xs import xs_settings

if TYPE_CHECKING:
    import peft


ADAPTERS = ("lora", "xs", "none")


def attach(
    backbone: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    target_modules: str | Iterable[str] | None = None,
    adapter: str = "lora",
    scope: str = "adapted",
    sequence_length: int = 128,
    init_lora_weights: str = "default",
    share_inputs: bool = False,
    adapter_settings: dict | None = None,
    batch_size: int = BATCH_SIZE,
    head: Head = SEQUENCE,
) -> GatedModel:
    """Put gated adapters into a Hugging Face backbone (in place) and freeze the rest but the task head.

    rank: maximal rank R. alpha: LoRA's scale, the update is multiplied by alpha / R whatever the number of open ranks.
    target_modules: None for the architecture's preset (query, key, value), names, or a regular expression.
    scope: `adapted` quantizes the adapted projections, `encoder` every linear map of the encoder.
    sequence_length, batch_size: tokens and examples of the forward whose MACs are counted, per example.
    adapter: `lora`; `xs` (B-LoRA-XS, with adapter_settings of xs.py); or `none`: no projection has an adapter, and the
    whole backbone learns.
    head: of a task's `likelihood`, how the backbone is called and read.
    init_lora_weights: `default`, as in PEFT, or `eva`: see input_pca.py. share_inputs: see `AdapterLayout`.
    Errors: ValueError, see `layout_of`; nothing is changed in the backbone then.
    """
    from .layers import GatedLinear, QuantizedLinear, XSLinear  # now, as PEFT takes seconds to import

    if adapter not in ADAPTERS:
        raise ValueError(f"unknown adapter {adapter!r}: known adapters are {', '.join(ADAPTERS)}")
    layout = layout_of(
        backbone, rank=rank, alpha=alpha, target_modules=target_modules, scope=scope, sequence_length=sequence_length,
        share_inputs=share_inputs, batch_size=batch_size, head=head,
    )  # fmt: skip
    settle(backbone)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())
    handover = Handover(layout.input_owner.tolist() if share_inputs else None)
    if adapter == "none":
        layout = layout.without_adapters()
        model = backbone.requires_grad_(True)
    else:
        layer = XSLinear if adapter == "xs" else GatedLinear
        model = _with_lora(backbone, layout, head, init_lora_weights, layer)
    modules = dict(backbone.named_modules())
    for index, projection in enumerate(layout.projections):
        module = modules[projection.name]
        if projection.adapted:
            if not isinstance(module, GatedLinear):
                raise RuntimeError(f"PEFT put a {type(module).__name__} at {projection.name} instead of a gated layer")
            module.handover, module.index = handover, index
            if adapter == "xs":
                module.start(xs_settings(**(adapter_settings or {})))
        else:
            parent, _, child = projection.name.rpartition(".")
            setattr(modules[parent], child, QuantizedLinear(module, handover, index))
    net = GatedModel(model, layout, handover, head)
    start_ranges(net, {})
    if checkpointing:
        net.gradient_checkpointing_enable()
    return net


def _with_lora(
    backbone: nn.Module, layout: AdapterLayout, head: Head, init_lora_weights: str, layer: type
) -> peft.PeftModel:
    import peft

    eva = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0)} if init_lora_weights == "eva" else {}
    config = lora_config(backbone, layout, head, **eva)
    config._register_custom_module({nn.Linear: layer})
    return freeze_pooler(wrapped(backbone, config))
