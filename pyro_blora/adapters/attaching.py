"""attach(): an adapter, chosen by name, into a Hugging Face backbone.

An adapter is a function `(backbone, layout, head, **settings) -> GatedModel` that puts what learns into the backbone,
in place: `lora.gated` does most of it for one whose layers are gated. What the net must and may have is in
gated_model.py.
Register it with `@register_adapter("name")`, or name it as `--adapter file.py:function`.

Scope `encoder` also quantizes input and weight of every other linear map of the encoder, without an adapter. The task
head stays at 32 bit, and a pooler inside the base model is frozen. Scope `encoder+head` also quantizes the output
matrix of a language model, whose head is pretrained and frozen; an input embedding that is the same matrix stays as it
is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..bit_widths import LADDER
from ..layout import BATCH_SIZE, GRANULARITIES
from ..models.conv1d import to_linear
from ..models.layout import layout_of
from ..registries import ADAPTERS
from ..tasks.heads import SEQUENCE, Head
from .gate_context import Gated
from .gated_model import GatedModel


def attach(
    backbone: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    target_modules: str | Iterable[str] | None = None,
    adapter: str | Callable[..., Any] = "lora",
    scope: str = "adapted",
    sequence_length: int = 128,
    init_lora_weights: str = "default",
    share_inputs: bool = False,
    smoothing: bool = False,
    adapter_settings: dict | None = None,
    batch_size: int = BATCH_SIZE,
    ladder: Sequence[int] = LADDER,
    granularity: str = GRANULARITIES[0],
    head: Head = SEQUENCE,
) -> GatedModel:
    """Put gated adapters into a Hugging Face backbone (in place) and freeze the rest but the task head.

    rank: maximal rank R. alpha: LoRA's scale, the update is multiplied by alpha / R whatever the number of open ranks.
    target_modules: None for the architecture's preset (query, key, value), names, or a regular expression.
    scope: `adapted` quantizes the adapted projections, `encoder` every linear map of the encoder, `encoder+head` the
    output matrix of a language model, too.
    sequence_length, batch_size: tokens and examples of the forward whose MACs are counted, per example.
    adapter: a name that `pyro-blora adapters` lists, `file.py:function`, or the function itself, with adapter_settings.
    head: of a task's `likelihood`, how the backbone is called and read.
    init_lora_weights: `default`, as in PEFT, or `eva`: see input_pca.py. share_inputs: see `AdapterLayout`. smoothing:
    see smoothing.py. ladder: the bit widths that a tensor can have, rising, the last 32. granularity: `tensor` or
    `channel`, what of a weight has a range of its own.
    Errors: ValueError, see `layout_of`; nothing is changed in the backbone then.
    """
    if any(isinstance(x, Gated | GatedModel) or type(x).__module__.startswith("peft.") for x in backbone.modules()):
        raise ValueError("this backbone has adapters already, attach puts them into it in place: load it again")
    make = ADAPTERS.resolve(adapter)
    settings = ADAPTERS.settings(make, adapter_settings or {})
    if init_lora_weights != "default" and "init_lora_weights" not in inspect.signature(make).parameters:
        called = ADAPTERS.called(adapter)
        raise ValueError(f"init_lora_weights {init_lora_weights!r} is for LoRA, not for adapter {called!r}: drop one")
    layout = layout_of(
        backbone, rank=rank, alpha=alpha, target_modules=target_modules, scope=scope, sequence_length=sequence_length,
        share_inputs=share_inputs, batch_size=batch_size, ladder=ladder, granularity=granularity,
        head=head,
    )  # fmt: skip
    to_linear(backbone, [p.name for p in layout.projections])
    start = () if init_lora_weights == "default" else (init_lora_weights,)
    net = make(backbone, layout, head, *start, **settings)
    if not isinstance(net, GatedModel):
        raise ValueError(
            f"adapter {ADAPTERS.called(adapter)!r} must return a pyro_blora.adapters.GatedModel, got "
            f"{type(net).__name__}: pyro_blora.adapters.gated makes one"
        )
    if smoothing:
        net.smooth()
    return net
