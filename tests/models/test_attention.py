"""Attention of softmax and scaled products is told from any other, and left as it was."""

import pytest
import torch
import transformers
from models import batch, tiny_bert, tiny_deberta, tiny_distilbert, tiny_llama, tiny_roberta

from pyro_blora.models.attention import is_ordinary


@pytest.mark.parametrize("build", [tiny_bert, tiny_roberta, tiny_distilbert, tiny_llama, tiny_deberta])
def test_a_model_of_transformers_has_an_ordinary_attention_or_one_that_cannot_be_replaced(build):
    model, (inputs, _) = build().eval(), batch()
    with torch.no_grad():
        before = model(**inputs).logits
        own = model.config._attn_implementation
        assert is_ordinary(model) and model.config._attn_implementation == own
        assert torch.equal(model(**inputs).logits, before)


def test_another_attention_is_told_from_it():
    def one_more_key(module, query, key, value, attention_mask, *, scaling=None, **_):
        key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
        weights = (query @ key.mT * scaling).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    transformers.AttentionInterface.register("one_more_key", one_more_key)
    model = tiny_bert()
    model.set_attn_implementation("one_more_key")
    assert not is_ordinary(model) and model.config._attn_implementation == "one_more_key"
