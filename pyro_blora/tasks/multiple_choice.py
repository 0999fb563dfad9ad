"""One of several options, by the letter that a language model would write next: a categorical over the letters.

Such a task is `Task(kind=MultipleChoice(("A", "B")), text_columns=("question", "options"), ...)`: its second text
column has a list of texts, its column `label` the place of the right one, from 0. The network reads the question, the
options with their letters and `Answer:`; of the logits of the next token those of the letters are kept. Rows may have
fewer options than there are letters.
Shapes: S draws, E examples, B batch, T tokens, C letters, V the vocabulary.
Source: Yang et al., Bayesian low-rank adaptation (Laplace-LoRA, 2024); Wang et al., BLoB (2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from .categorical import Categorical
from .causal_lm import LANGUAGE_MODEL
from .divergences import of_classes
from .fisher import in_eigenbasis
from .likelihoods import IGNORED, PAD_TO, Collate, Rows, register_likelihood
from .prompts import end_of, prompt_ids, text_ids

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NEVER = -1e4  # the logit of a letter that a row does not have: its probability is 0 in float32
_ANSWER = "\nAnswer:"


class NextLetter(dist.TorchDistribution):
    """Of the letter that comes next.  logits (..., B, T, V)

    `log_prob` takes rows (B, 2 + C): the number of the right letter, the place of the token before it, and the tokens
    of all letters, IGNORED where a row does not have that many.
    """

    arg_constraints: ClassVar = {"logits": dist.constraints.real_vector}

    def __init__(self, logits: Tensor):
        self.logits = logits
        super().__init__(logits.shape[:-2], torch.Size([1]), validate_args=False)  # one dimension, of any size

    def expand(self, batch_shape: Any, _instance: Any = None) -> NextLetter:
        return NextLetter(self.logits.expand(*batch_shape, *self.logits.shape[-2:]))

    def letters(self, rows: Tensor) -> dist.Categorical:
        """(..., B) over the letters of the rows."""
        return dist.Categorical(logits=at_letters(self.logits, rows))

    def log_prob(self, value: Tensor) -> Tensor:
        found: Tensor = self.letters(value).log_prob(value[..., 0])
        return found


def at_letters(logits: Tensor, rows: Tensor) -> Tensor:
    """(..., B, T, V) -> (..., B, C)"""
    tokens = rows[..., 2:].expand(*logits.shape[:-2], -1)
    found = logits.take_along_dim(_place_of(logits, rows), -2).squeeze(-2).gather(-1, tokens.clamp(min=0))
    return torch.where(tokens >= 0, found, _NEVER)


def _place_of(logits: Tensor, rows: Tensor) -> Tensor:
    """(..., B, 1, 1)"""
    return rows[..., 1].expand(logits.shape[:-2])[..., None, None]


@register_likelihood("multiple_choice")
@dataclasses.dataclass(frozen=True)
class MultipleChoice(Categorical):
    """The letter of one of several options, by a language model's next token."""

    problem_type: ClassVar[str | None] = None
    head = LANGUAGE_MODEL
    one_row = False
    curvature: ClassVar[str | None] = None
    averaged_in_code: ClassVar[str | None] = None  # letters' tokens and their place are the tokenizer's
    constant = "letter frequencies"
    example_texts: ClassVar[tuple[Any, ...]] = ("a short question", ["yes", "no"])

    @property
    def title(self) -> str:
        return "a choice"

    @property
    def head_settings(self) -> dict[str, Any]:
        return {}

    def card(self, labels: Sequence[str]) -> str:
        return (
            f"It answers a question with the letter of an option: of the logits after `{_ANSWER.strip()}`, those of "
            f"the tokens {', '.join(f'` {x}`' for x in self.names)}."
        )

    def __call__(self, logits: Tensor, *, scale: Tensor | None = None) -> NextLetter:
        return NextLetter(logits.float())

    def is_text(self, cell: object) -> bool:
        """A text, or two or more of them."""
        if isinstance(cell, str):
            return super().is_text(cell)
        if not isinstance(cell, list | tuple | np.ndarray):
            return False
        return 2 <= len(cell) <= len(self.names) and all(map(super().is_text, cell))

    # --- batches ---

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, columns: tuple[str, ...], max_length: int) -> Rows:
        """input_ids, and as `label` rows of `NextLetter`; of a question that is too long the beginning is cut.

        Errors: ValueError for options that do not fit, that are no list of texts or lack the answer, and where two
        letters look alike.
        """
        letters = [text_ids(tokenizer, f" {letter}")[-1:] for letter in self.names]
        tokens = [token for one in letters for token in one]
        if len(set(tokens)) < len(self.names):
            raise ValueError(
                f"{type(tokenizer).__name__} has no token of its own for each of the letters {', '.join(self.names)}: "
                "choose a backbone whose tokenizer has"
            )
        found: dict[str, list[list[int]]] = {"input_ids": [], "label": []}
        for question, options, label in zip(*(rows[column] for column in columns), rows["label"], strict=True):
            if not isinstance(question, str):
                raise ValueError(f"the question {str(question)[:60]!r} is a list: give a text, and a list of options")
            if isinstance(options, str) or not self.is_text(options):
                raise ValueError(f"the question {question[:60]!r} has no options: give a list of two or more texts")
            if int(label) >= len(options):
                raise ValueError(
                    f"the question {question[:60]!r} has {len(options)} options, and the answer {self.names[label]}, "
                    "which is none of them: correct it or drop the question"
                )
            listed = zip(self.names, options, strict=False)
            rest = text_ids(tokenizer, "".join(f"\n{letter}. {option}" for letter, option in listed) + _ANSWER)
            whole = prompt_ids(tokenizer, question) + rest
            if len(rest) >= max_length:
                raise ValueError(
                    f"the options of {question[:60]!r} have {len(rest)} tokens, more than --max_length {max_length} "
                    "lets in: raise it"
                )
            read, missing = whole[-max_length:], [IGNORED] * (len(self.names) - len(options))
            found["input_ids"].append(read)
            found["label"].append([int(label), len(read) - 1, *tokens[: len(options)], *missing])
        return found

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate:
        filling = end_of(tokenizer)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            longest = -(-max(len(row["input_ids"]) for row in rows) // PAD_TO) * PAD_TO
            spare = [longest - len(row["input_ids"]) for row in rows]
            inputs = [row["input_ids"] + [filling] * n for n, row in zip(spare, rows, strict=True)]
            return {
                "input_ids": torch.tensor(inputs), "labels": torch.tensor([row["label"] for row in rows]),
                "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in spare]),
            }  # fmt: skip

        return collate

    # --- predictions ---

    def averaged(self, distribution: NextLetter, labels: Tensor) -> Tensor:
        return distribution.letters(labels).probs

    def scored(self, labels: Tensor) -> Tensor:
        return labels[..., 0]

    def worst(self, table: pd.DataFrame, count: int) -> tuple[str, pd.DataFrame]:
        """With the options as one text."""
        text = table.columns[: list(table.columns).index("label")]
        lists = {name: table[name].map(self._in_words) for name in text}
        return super().worst(table.assign(**lists), count)

    def _in_words(self, cell: Any) -> str:
        if isinstance(cell, str):
            return cell
        return " ".join(f"{letter}. {option}" for letter, option in zip(self.names, cell, strict=False))

    # --- gates, distillation ---

    def fisher_directions(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        own = at_letters(logits.float(), labels)
        directions = in_eigenbasis(lambda x: dist.Categorical(logits=x), own)
        tokens, place = labels[..., 2:], _place_of(logits, labels)
        at_place = torch.zeros_like(logits[..., :1, :], dtype=own.dtype).scatter_add(
            -1, tokens[..., None, :].clamp(min=0), torch.where(tokens >= 0, directions, 0.0)[..., None, :]
        )
        found = torch.zeros_like(logits, dtype=own.dtype)
        return found.scatter(-2, place.expand_as(at_place), at_place)

    def divergence(self, teacher: Any, student: Any, labels: Tensor) -> Tensor:
        return of_classes(teacher.letters(labels), student.letters(labels))
