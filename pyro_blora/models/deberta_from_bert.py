"""A BERT converted exactly into the DeBERTaV3 architecture: disentangled attention on a network that has learned.

DeBERTa scores a pair of positions by (q_i k_j + q_i r_k + k_j r_q) / sqrt(3 d), where r_k and r_q are the key and query
projections of an embedding of their distance. With the layer norm of these embeddings at zero, r_k = b_k and r_q = b_q,
the projections' biases: q_i b_k is constant along a row, which the softmax ignores, and k_j b_q adds b_q k_j a second
time. So queries take weights times sqrt(3) and biases times sqrt(3) / 2, and everything else is copied: the hidden
states are BERT's to rounding, while query and key are called twice a forward, as in every DeBERTaV3. There is no
pooler, as in the published checkpoints. The relative stream learns when the gain of that layer norm does.
Source: He et al., DeBERTa (2021), equation 4, and DeBERTaV3 (2023), which shares the projections.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .converted import converted

if TYPE_CHECKING:
    from transformers import BertModel, DebertaV2Model

CACHED = "deberta_from_bert"  # the folder of converted models in the cache
_VERSION = "1"  # of the conversion: a cached one of another version is not used
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def deberta_from_bert(bert: BertModel) -> DebertaV2Model:
    """The same function in DeBERTaV3's architecture; `bert` is left as it is."""
    from transformers import AutoConfig, DebertaV2Model

    was = bert.config
    config: Any = AutoConfig.for_model(
        "deberta-v2",
        **{name: getattr(was, name) for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
            "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
            "initializer_range", "layer_norm_eps", "pad_token_id",
        )},
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm",
        position_buckets=256, max_relative_positions=-1, position_biased_input=True,
        pooler_hidden_size=was.hidden_size, pooler_hidden_act="gelu",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the distances' embeddings, which the layer norm at zero hides
        deberta = DebertaV2Model(config)
    missing, unexpected = deberta.load_state_dict(_converted(bert.state_dict()), strict=False)
    if unexpected or set(missing) != {"encoder.rel_embeddings.weight"}:
        raise RuntimeError(f"the conversion is incomplete: missing {missing}, left over {unexpected}")
    return deberta.eval()


def _converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden = len(state["embeddings.LayerNorm.weight"])
    found = {"encoder.LayerNorm.weight": torch.zeros(hidden), "encoder.LayerNorm.bias": torch.zeros(hidden)}
    for name, value in state.items():
        if name.startswith("pooler.") or name.endswith((".position_ids", ".token_type_ids")):
            continue
        if name.endswith("self.query.weight"):
            value = value * math.sqrt(3)
        elif name.endswith("self.query.bias"):
            value = value * math.sqrt(3) / 2
        for kind in ("query", "key", "value"):
            name = name.replace(f".self.{kind}.", f".self.{kind}_proj.")
        found[name] = value
    return found


def converted_folder(bert_folder: Path) -> Path:
    """The folder of the converted model and its tokenizer, made once and kept in the cache.

    Errors: ValueError where the cache cannot be written.
    """
    import transformers

    def write(folder: Path) -> None:
        bert = transformers.BertModel.from_pretrained(str(bert_folder), dtype=torch.float32, trust_remote_code=False)
        deberta_from_bert(bert).save_pretrained(str(folder))
        for name in _TOKENIZER_FILES:
            if (bert_folder / name).is_file():
                shutil.copy(bert_folder / name, folder)

    sources = sorted([*bert_folder.glob("*.safetensors"), bert_folder / "config.json"])
    return converted(CACHED, _VERSION, sources, write)
