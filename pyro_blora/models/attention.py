"""Whether a model's attention is the ordinary one, softmax of scaled products, as an exporter may write it.

transformers lets a model's attention be replaced by name where it follows its AttentionInterface. Whether a model is
read rightly there is not told by its name: with an ordinary attention put in, it has to give what it gives itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .architectures import example_rows
from .quiet_loading import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "pyro_blora_ordinary"  # as transformers knows it
_GAP = 1e-4  # largest relative difference between an ordinary attention and the model's own


def is_ordinary(model: PreTrainedModel) -> bool:
    """Whether a model's attention is softmax of scaled products and a mask, or cannot be replaced."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _mask)
    own, before = model.config._attn_implementation, _answers(model)
    with quiet():  # it warns where it cannot
        model.set_attn_implementation(_NAME)
        again = _answers(model)
        model.set_attn_implementation(own)
    return bool((again - before).abs().max() <= _GAP * before.abs().max().clamp(min=1.0))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """query (B, heads, T, c), key and value (B, their heads, keys, c), mask True where a key is seen."""
    shared = query.shape[1] // key.shape[1]  # queries of a key
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _mask(**settings: Any) -> Tensor | None:
    """A boolean mask (B, 1, T, keys), True where a key is seen."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**{**settings, "allow_is_causal_skip": False})


@torch.no_grad()
def _answers(model: PreTrainedModel) -> Tensor:
    """What the base model makes of two rows of ordinary tokens, one of them padded; not at the padding."""
    base: Any = model.base_model
    rows, training = example_rows(model, 2, 8, varied=True), model.training
    if "attention_mask" in rows:
        rows["attention_mask"][-1, 5:] = 0
    model.eval()
    hidden: Tensor = base(**rows)[0]
    model.train(training)
    return torch.cat([hidden[0], hidden[1, :5]]).float()
