"""The adapters with gates: LoRA, B-LoRA-XS, and none; PEFT puts their layers in, and only here by its private hook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..layout import AdapterLayout, Projection
from ..registries import register_adapter
from ..tasks.heads import Head
from .gate_context import GateContext
from .gated_model import GatedModel
from .input_pca import start_eva
from .peft_config import freeze_pooler, lora_config, settle, wrapped
from .ranges import start_ranges

if TYPE_CHECKING:
    from .layers import GatedLinear


def gated(
    backbone: nn.Module, layout: AdapterLayout, head: Head, layer: type[GatedLinear] | None, *,
    model: type[GatedModel] = GatedModel, start: Mapping[str, Any] | None = None, **config: Any,
) -> GatedModel:  # fmt: skip
    """Put gated layers of one class into a backbone, quantized maps beside them, all with one `GateContext`.

    head: how the backbone is called and read. layer: the class of adapted projections; None: there are none, and the
    whole backbone learns. start: arguments of each layer's `start`. model: the class that is returned. config: of
    PEFT's LoraConfig.
    """
    from .layers import GatedLinear, QuantizedLinear  # now, as PEFT takes seconds to import

    settle(backbone)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())
    gate_context = GateContext(layout.input_owner.tolist() if layout.share_inputs else None)
    if layer is None:
        layout = layout.without_adapters()
        whole = backbone.requires_grad_(True)
    else:
        peft_config = lora_config(backbone, layout, head, **config)
        peft_config._register_custom_module({nn.Linear: layer})
        whole = freeze_pooler(wrapped(backbone, peft_config))
    modules = dict(backbone.named_modules())
    for index, projection in enumerate(layout.projections):
        module = modules[projection.name]
        if projection.adapted:
            if not isinstance(module, GatedLinear):
                raise RuntimeError(f"PEFT put a {type(module).__name__} at {projection.name} instead of a gated layer")
            module.gate_context, module.index = gate_context, index
            module.start(**(start or {}))
        else:
            parent, _, child = projection.name.rpartition(".")
            setattr(modules[parent], child, QuantizedLinear(module, gate_context, index))
    net = model(whole, layout, gate_context, head)
    start_ranges(net, {})
    if checkpointing:
        net.gradient_checkpointing_enable()
    return net


@register_adapter("lora")
def lora(backbone: nn.Module, layout: AdapterLayout, head: Head, init_lora_weights: str = "default", /) -> GatedModel:
    """Low-rank updates of the adapted projections, alpha / R * B A.

    init_lora_weights: that of `attach`, `default` or `eva`.
    Source: Hu et al., LoRA (2021); Paischer et al., EVA (2024).
    """
    from .layers import GatedLinear

    if init_lora_weights == "default":
        return gated(backbone, layout, head, GatedLinear)
    if init_lora_weights != "eva":
        raise ValueError(f"unknown init_lora_weights {init_lora_weights!r}: known are default, eva")
    import peft

    net = gated(backbone, layout, head, GatedLinear, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    net.start_from_inputs = start_eva
    return net


class XSModel(GatedModel):
    """Its open ranks use a row each of every core."""

    def parameters_per_rank(self, projection: Projection) -> int:
        return self.layout.rank


def _unsaved(*_: Any, **__: Any) -> None:
    raise ValueError(
        "PEFT's save_pretrained would write the frozen factors of adapter 'xs' without its cores, another model: write "
        "it with pyro_blora.export(program, folder)"
    )


@register_adapter(
    "xs", proposes={"lr": 5e-3},  # of the rates tried on SST-2, from 1e-3 to 5e-2, the one that learned
    excludes={"init_lora_weights": "--init_lora_weights eva is for LoRA, --adapter xs starts from W0: drop one"},
)  # fmt: skip
def xs(
    backbone: nn.Module, layout: AdapterLayout, head: Head, *, singular_values: Literal["input", "split"] = "input",
    svd: Literal["exact", "randomized"] = "exact",
) -> GatedModel:  # fmt: skip
    """B-LoRA-XS: frozen factors of W0, and a core of R x R numbers between them that learns.

    Settings: singular_values, on the input side, or their square roots on both; svd, of W0.
    Source: Balazy et al., LoRA-XS (2024); Marszalek et al., B-LoRA-XS (2025). See xs.py.
    """
    from .layers import XSLinear

    start = {"singular_values": singular_values, "svd": svd}
    net = gated(backbone, layout, head, XSLinear, model=XSModel, start=start)
    whole: Any = net.peft_model
    whole.save_pretrained = _unsaved
    return net


@register_adapter(
    "none",
    excludes={"init_lora_weights": "--init_lora_weights eva is for LoRA, which --method full does not have: drop one"},
)
def none(backbone: nn.Module, layout: AdapterLayout, head: Head) -> GatedModel:
    """No adapter: every weight of the backbone learns."""
    return gated(backbone, layout, head, None)
