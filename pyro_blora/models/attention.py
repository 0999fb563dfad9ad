"""softmax1 in the attention of a backbone: exp(x_i) / (1 + sum_j exp(x_j)), in place of softmax.

A head that has nothing to say then attends to nothing, where softmax makes it look for a token to attend to; it is from
there that transformers have outliers in their activations, which coarse grids cannot hold. A pretrained network is
another one with it: the first step is no longer the pretrained model, and the adapter has to make up for that.

transformers lets a model's attention be replaced by name where it follows its AttentionInterface. Whether ours reads a
model's arguments rightly is not told by its name: with an ordinary softmax it has to give what the model gives.
Source: Miller, Attention is off by one (2023); Luo et al., OutEffHop (2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures import example_rows
from .quiet_loading import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOFTMAX, SOFTMAX1 = "softmax", "softmax1"
_NAMES = {SOFTMAX: "pyro_blora_softmax", SOFTMAX1: "pyro_blora_softmax1"}  # as transformers knows them
_GAP = 1e-4  # largest relative difference between our ordinary softmax and the model's own


def softmax1(x: Tensor) -> Tensor:
    """exp(x_i) / (1 + sum_j exp(x_j)) along the last dimension, in float32 or better; 0 where all are masked."""
    x = x if x.dtype == torch.float64 else x.float()
    largest = x.detach().amax(-1, keepdim=True).clamp(min=0.0)  # the 1 is a further score of 0
    powers = (x - largest).exp()
    return powers / ((-largest).exp() + powers.sum(-1, keepdim=True))


def _attend(probabilities: Any) -> Any:
    """An attention function of transformers with these probabilities of scores (B, heads, T, keys)."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
        scaling: float | None = None, dropout: float = 0.0, **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        shared = query.shape[1] // key.shape[1]  # queries of a key
        if shared > 1:
            key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            least, is_boolean = torch.finfo(scores.dtype).min, attention_mask.dtype == torch.bool
            scores = scores.masked_fill(~attention_mask, least) if is_boolean else scores + attention_mask
        weights = F.dropout(probabilities(scores).to(query.dtype), dropout, module.training)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    return attend


def _mask(**settings: Any) -> Tensor | None:
    """A boolean mask (B, 1, T, keys), True where a key is seen.

    Not a mask of numbers: to make one, transformers 5.17 copies a number to the GPU, which a CUDA graph cannot record.
    """
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**{**settings, "allow_is_causal_skip": False})


def set_attention(model: PreTrainedModel, name: str = SOFTMAX1) -> None:
    """Put softmax1 into every attention of a model; `softmax` leaves it as it is.

    Errors: ValueError for a model whose attention is its own.
    """
    if name == SOFTMAX:
        return
    own = model.config._attn_implementation
    ordinary = _ordinary_answers(model)
    with quiet():  # it warns where it cannot
        model.set_attn_implementation(_NAMES[SOFTMAX1])
    if ordinary is None or torch.equal(_answers(model), ordinary):
        model.set_attn_implementation(own)
        raise ValueError(
            f"{type(model).__name__} computes its attention by itself, softmax1 cannot be put into it: drop "
            "--attention, or choose a backbone like BERT, RoBERTa, DistilBERT, ELECTRA or ALBERT"
        )


def is_ordinary(model: PreTrainedModel) -> bool:
    """Whether a model's attention is softmax of scaled products and a mask, or cannot be replaced."""
    return _ordinary_answers(model) is not None


def _ordinary_answers(model: PreTrainedModel) -> Tensor | None:
    """The model's answers with our ordinary softmax; None where they are not its own."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for each, probabilities in ((SOFTMAX, lambda x: x.softmax(-1)), (SOFTMAX1, softmax1)):
        AttentionInterface.register(_NAMES[each], _attend(probabilities))
        AttentionMaskInterface.register(_NAMES[each], _mask)
    own, before = model.config._attn_implementation, _answers(model)
    with quiet():  # it warns where it cannot
        model.set_attn_implementation(_NAMES[SOFTMAX])
        again = _answers(model)
        model.set_attn_implementation(own)
    is_same = bool((again - before).abs().max() <= _GAP * before.abs().max().clamp(min=1.0))
    return again if is_same else None


def attention_of(model: nn.Module) -> str:
    """`softmax1`, or `softmax` for whatever a model has of its own."""
    config: Any = model.config
    return SOFTMAX1 if getattr(config, "_attn_implementation", None) == _NAMES[SOFTMAX1] else SOFTMAX


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
