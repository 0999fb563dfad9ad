"""A backbone as PEFT takes it: the plain configuration of a layout, the head found by its module, attention settled."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from ..layout import AdapterLayout
from ..models.architectures import head_modules, settle_attention
from ..models.conv1d import is_conv1d
from ..models.relative_positions import remember_positions
from ..tasks.heads import SEQUENCE, Head
from .quantized_linear import remember_sources

if TYPE_CHECKING:
    import peft

_PEFT_NAMES = ("lora_dropout", "lora_A", "lora_B", "lora_E", "base_layer", "default")  # of what PEFT puts into a layer


def wrapped(backbone: nn.Module, config: peft.PeftConfig) -> peft.PeftModel:
    """PEFT's model of a configuration, without its warnings."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property by its old name
        warnings.filterwarnings("ignore", "lora with eva initialization")  # memory that a batch has no use for
        return peft.get_peft_model(backbone, config)


def freeze_pooler(model: peft.PeftModel) -> peft.PeftModel:
    """A pretrained one, like the encoder it belongs to; one that the checkpoint lacked learns, as the head does."""
    backbone: Any = model.base_model.model
    if (pooler := getattr(backbone.base_model, "pooler", None)) and not getattr(backbone, "pooler_is_new", False):
        pooler.requires_grad_(False)
    return model


def lora_config(backbone: nn.Module, layout: AdapterLayout, head: Head = SEQUENCE, **patterns) -> peft.LoraConfig:
    """The plain PEFT configuration of a layout: exact names as targets, saved with a head that learns.

    PEFT finds what is saved by the end of its path. Where other modules end so too, as `dropout` does for a head called
    `out`, the head goes by its path in PEFT's sequence classifier, which looks a second time, from further above.
    Errors: ValueError where the names that such a classifier adds are in the way.
    """
    import peft

    learned, paths = head_modules(backbone) if head.is_new else (), [name for name, _ in backbone.named_modules()]

    def ends(name: str, *found: str) -> bool:
        return any(path.endswith(name) for path in (*_PEFT_NAMES, *(path for path in paths if path not in found)))

    last = {name: name.rsplit(".", 1)[-1] for name in learned}
    saved = [f"model.{name}" if ends(last[name], name) else last[name] for name in learned]
    above = saved != [*last.values()]
    added = any(ends(name, *learned) for name in (SEQUENCE if above else head).peft_heads)
    if above and added:
        raise ValueError(
            f"PEFT cannot tell the head of {type(backbone).__name__} ({', '.join(learned)}) from other modules: rename "
            "it to `classifier`, and modules of the encoder that end in `classifier` or `score`"
        )
    task_type = head.task_type if head.is_of(backbone) and not added else None
    return peft.LoraConfig(
        task_type=SEQUENCE.task_type if above else task_type,
        r=layout.rank, lora_alpha=layout.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        target_modules=[p.name for p in layout.adapted],
        fan_in_fan_out=any(is_conv1d(backbone.get_submodule(p.name)) for p in layout.adapted),
        modules_to_save=saved, **patterns,
    )  # fmt: skip


def settle(backbone: nn.Module) -> None:
    """How a backbone trains: positions computed once, inputs of maps computed again, and full attention for good.

    A warning says so where it had a sparse one, which would end at some step.
    """
    remember_positions(backbone)
    remember_sources(backbone)
    if settle_attention(backbone):
        warnings.warn(
            f"{type(backbone).__name__} leaves its sparse attention at the first short input: it has full attention "
            "from now on. Load what is exported on a backbone with attention_type='original_full'",
            stacklevel=3,
        )
