"""What a language model reads, in tokens: texts with the tokenizer's own beginning, and without its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text.  Errors: ValueError for a tokenizer that has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no token that ends a text, which a language model must write: set tokenizer.eos_token, "
            "and save it into the folder of its model"
        )
    return int(tokenizer.eos_token_id)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's own tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The same after what the tokenizer puts first, as Llama's does."""
    own, whole = text_ids(tokenizer, text), tokenizer(text)["input_ids"]
    before = next((n for n in range(len(whole)) if whole[n : n + len(own)] == own), 0)
    return [*whole[:before], *own]
