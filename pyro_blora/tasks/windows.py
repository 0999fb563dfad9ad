"""A question and a text as overlapping windows of tokens, and where each token of the text stands in them.

A token that several windows have is read in the one where it has most context on its poorer side, so that every token
of a text, however long, has one place.   Source: Devlin et al., BERT (2019), their script for SQuAD.
Shapes: B batch, W windows (of the longest example), T tokens of a window, D tokens of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 60  # characters of a text in a message


class Windows(NamedTuple):
    """inputs: the rows of each window, by name. window, token (D,): the place of each token of the text. starts, ends
    (D,): its first character and the one after its last, without blanks."""

    inputs: dict[str, list[list[int]]]
    window: np.ndarray
    token: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def tokens_of(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and the last token of a span of characters; None where it has none."""
        first, last = int(np.searchsorted(self.ends, start, "right")), int(np.searchsorted(self.starts, end)) - 1
        return (first, last) if first <= last else None


def windows_of(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], texts: Sequence[str], max_length: int, stride: int
) -> Iterator[Windows]:
    """Of each pair. stride: tokens that neighbouring windows share.

    Errors: ValueError for a tokenizer without offsets, a question that leaves no room, a stride that is no less than
    the room, a text without tokens, and a tokenizer that leaves tokens of a long text out (of `tokenizers` 0.23.1 and
    0.23.2).
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where its tokens stand in a text: spans need a fast tokenizer"
        )
    rooms = []
    for question, ids in zip(questions, tokenizer([*questions], add_special_tokens=False)["input_ids"], strict=True):
        room = max_length - len(ids) - tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            raise ValueError(
                f"the question {question[:_SHOWN]!r} has {len(ids)} tokens, which leaves no room for a text within "
                f"--max_length {max_length}: raise it"
            )
        if stride >= room:
            raise ValueError(
                f"stride {stride} is too large: beside the question {question[:_SHOWN]!r} a window of --max_length "
                f"{max_length} has {room} tokens of the text: lower --task.stride, or raise --max_length"
            )
        rooms.append(room)
    found = tokenizer(
        [*questions], [*texts], truncation="only_second", max_length=max_length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
        return_token_type_ids=False,  # which PEFT's wrapper for question answering does not pass on
    )  # fmt: skip
    offsets, owners = found.pop("offset_mapping"), np.array(found.pop("overflow_to_sample_mapping"))
    for example, (text, room) in enumerate(zip(texts, rooms, strict=True)):
        rows = np.flatnonzero(owners == example).tolist()
        each = [np.flatnonzero([owner == 1 for owner in found.sequence_ids(row)]) for row in rows]  # of the text
        if not len(each[0]):
            raise ValueError(f"the text {text[:_SHOWN]!r} has no token: leave it out")
        begins = [w * (room - stride) for w in range(len(rows))]
        if len(each[0]) == room:  # else all of it is there
            _require_all(tokenizer, text, offsets[rows[-1]][each[-1][-1]][1])
        window, token = _places(begins, each)
        spans = np.array([
            _trimmed(text, *offsets[rows[w]][t]) for w, t in zip(window.tolist(), token.tolist(), strict=True)
        ])  # fmt: skip
        yield Windows({name: [x[row] for row in rows] for name, x in found.items()}, window, token, *spans.T)


def _require_all(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> None:
    """Refuse windows whose last token ends at this character, where the text has more."""
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if end < (last := whole["offset_mapping"][-1][1]):
        import tokenizers

        raise ValueError(
            f"the windows of the text {text[:_SHOWN]!r} end at character {end}, its tokens at {last}: tokenizers "
            f"{tokenizers.__version__} leaves the others out, as 0.23.1 and 0.23.2 do: pip install -U tokenizers"
        )


def _places(begins: Sequence[int], each: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(window, token) of each token of a text. begins: its number of each window's first token; each: their places."""
    ends = [begin + len(tokens) for begin, tokens in zip(begins, each, strict=True)]
    number = np.arange(ends[-1])
    context = np.stack([np.minimum(number - begin, end - 1 - number) for begin, end in zip(begins, ends, strict=True)])
    window = context.argmax(0)
    return window, np.array([each[w][i - begins[w]] for i, w in enumerate(window.tolist())])


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Some tokenizers have the blank before a word in its token."""
    own = text[start:end]
    return (start + len(own) - len(own.lstrip()), end) if own.strip() else (end, end)


def stacked(rows: dict[str, Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
    """(sum of counts, T) -> (B, W, T), with windows of zeros where an example has fewer."""
    at = torch.arange(max(counts)) < torch.tensor(counts)[:, None]  # (B, W)
    return {name: x.new_zeros(*at.shape, x.shape[-1]).index_put((at,), x) for name, x in rows.items()}


def padded(rows: Sequence[Sequence[Any]], fill: int) -> Tensor:
    """Lists of numbers as one tensor, the shorter ones filled up."""
    found = np.full((len(rows), max(map(len, rows))), fill)
    for own, row in zip(found, rows, strict=True):
        own[: len(row)] = row
    return torch.from_numpy(found)
