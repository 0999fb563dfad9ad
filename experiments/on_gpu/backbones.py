"""Backbones by `file.py:function` for machines without a hub.

The folder of MiniLM is in PYRO_BLORA_MINILM, of SmolLM2's tokenizer in PYRO_BLORA_SMOLLM2.
"""

import os
from pathlib import Path

import transformers

from pyro_blora.models.deberta_from_bert import converted_folder

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def deberta_v3_base(num_labels: int):
    """DeBERTaV3-base of exact configuration with random weights, and MiniLM's tokenizer, whose ids it has."""
    return _deberta(num_labels, **_BASE), _tokenizer()


def tiny_deberta(num_labels: int):
    return _deberta(num_labels, **_TINY), _tokenizer()


def minilm(num_labels: int):
    return _classifier(_folder(), num_labels), _tokenizer()


def minilm_as_deberta(num_labels: int):
    return _classifier(converted_folder(_folder()), num_labels), _tokenizer()


def minilm_for_spans(num_labels: int):
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(
        str(_folder()), num_labels=num_labels, dtype="float32", trust_remote_code=False
    )
    return model, _tokenizer()


def smollm2(num_labels: int):
    """SmolLM2-135M of exact configuration with random weights; a vocabulary has as many outputs as it has."""
    return _llama(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, intermediate_size=1536)


def tiny_smollm2(num_labels: int):
    return _llama(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64)


def _llama(**sizes):
    tokenizer = transformers.AutoTokenizer.from_pretrained(os.environ["PYRO_BLORA_SMOLLM2"], trust_remote_code=False)
    config = transformers.LlamaConfig(
        vocab_size=49152, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), tokenizer


def _deberta(num_labels: int, **sizes):
    config = transformers.AutoConfig.for_model(
        "deberta-v2", vocab_size=128100, max_position_embeddings=512, max_relative_positions=-1, position_buckets=256,
        pooler_hidden_size=sizes["hidden_size"], type_vocab_size=0, relative_attention=True,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        pooler_hidden_act="gelu", layer_norm_eps=1e-7, num_labels=num_labels, **sizes,
    )  # fmt: skip
    return transformers.DebertaV2ForSequenceClassification(config)


def _classifier(folder: Path, num_labels: int):
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=num_labels, dtype="float32", trust_remote_code=False,
        problem_type="regression" if num_labels == 1 else "single_label_classification",
    )  # fmt: skip


def _tokenizer():
    return transformers.AutoTokenizer.from_pretrained(str(_folder()), trust_remote_code=False)


def _folder() -> Path:
    return Path(os.environ["PYRO_BLORA_MINILM"])
