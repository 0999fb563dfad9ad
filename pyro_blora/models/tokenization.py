"""Whether a tokenizer belongs to its model and to the texts: words it knows, ids with an embedding, token types.

transformers makes a tokenizer of five special tokens where a folder has none, and a table of one token type is read out
of bounds: both train and say nothing about it, so that they are refused, or put right, here.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

UNKNOWN_SHARE = 0.2  # of a text's tokens: subword vocabularies leave less than one in a hundred of their language
_LOOKED_AT = 2000  # training rows, evenly spaced: the share is known to a hundredth
_TYPES = "token_type_ids"


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, path: str) -> None:
    """Errors: ValueError where a folder has no file of its tokenizer's, or the tokenizer has no words."""
    files = {file for file in type(tokenizer).vocab_files_names.values() if file}
    if Path(path).is_dir() and files and not any((Path(path) / file).is_file() for file in files):
        raise ValueError(
            f"backbone {name!r} has no tokenizer ({' or '.join(sorted(files))}): save that of its model into the "
            "folder, tokenizer.save_pretrained(FOLDER)"
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"the tokenizer of backbone {name!r} has no words, only its {len(tokenizer)} special tokens: save that of "
            "its model into the folder, tokenizer.save_pretrained(FOLDER)"
        )


def settle_padding(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Pad with the end of a text where there is no token for padding, as decoders were trained without one.

    Errors: ValueError where there is neither.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of backbone {name!r} has no pad token and no end of a text to take for one: set "
                "tokenizer.pad_token, and save it into the folder of its model"
            )
        tokenizer.pad_token = tokenizer.eos_token


def suit(tokenizer: PreTrainedTokenizerBase, model: nn.Module, name: str) -> None:
    """Leave out token types that the model does not tell apart.

    Errors: ValueError for ids that have no row in the model's embedding.
    """
    table = _embedding(model)
    largest = max(tokenizer.get_vocab().values()) if table is not None else -1
    if table is not None and largest >= table.num_embeddings:
        raise ValueError(
            f"the tokenizer of backbone {name!r} has ids up to {largest}, its embedding {table.num_embeddings} rows: "
            "they are of different models, or words were added and the embedding was not resized"
        )
    takes = _TYPES in inspect.signature(model.forward).parameters
    types = getattr(model.config, "type_vocab_size", None)
    if _TYPES in tokenizer.model_input_names and (not takes or (types is not None and types <= 1)):
        kept = [key for key in tokenizer.model_input_names if key != _TYPES]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = kept  # also where it is saved


def require_readable(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, model: nn.Module, name: str) -> None:
    """Errors: ValueError where too many words of tokenized rows are unknown, or a token type has no embedding."""
    chosen = rows.select(range(0, len(rows), -(-len(rows) // _LOOKED_AT)))
    types = getattr(model.config, "type_vocab_size", None)
    if types and _TYPES in chosen.column_names:
        largest = int(_values(chosen, _TYPES).max(initial=0))
        if largest >= types:
            raise ValueError(
                f"the tokenizer of backbone {name!r} gives token type {largest}, its model has {types}: they are of "
                "different models"
            )
    if tokenizer.unk_token_id is None:
        return
    ids = _values(chosen, "input_ids")
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids = ids[~np.isin(ids, list(special))]
    share = float((ids == tokenizer.unk_token_id).mean()) if len(ids) else 0.0
    if share > UNKNOWN_SHARE:
        raise ValueError(
            f"{share:.0%} of the words of the training texts are unknown to the tokenizer of backbone {name!r} (more "
            f"than {UNKNOWN_SHARE:.0%}): it is of another model or another language; give a backbone that reads them"
        )


def _values(rows: datasets.Dataset, column: str) -> np.ndarray:
    """All numbers of a column of lists, of lists of them, too."""
    found = rows.with_format("arrow")[:][column].combine_chunks()
    while hasattr(found, "value_lengths"):
        found = found.flatten()
    return found.to_numpy(zero_copy_only=False)


def _embedding(model: Any) -> nn.Embedding | None:
    """The table of words; None where ids are hashed, as in CANINE."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # what transformers raises for a model without such a table
        return None
    return table if isinstance(table, nn.Embedding) else None
