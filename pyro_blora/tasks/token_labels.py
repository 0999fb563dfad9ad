"""A label of every word, as of named entities or parts of speech: independent categoricals, one a word.

Such a task is `Task(kind=TokenLabels(("O", "B-PER", "I-PER")), text_columns=("words",), metric_name="f1", ...)`: its
text column has a list of words, its column `label` a list of as many class numbers, IGNORED where nothing is asked. The
network answers at a word's first token. Words beyond --max_length are not asked.
Shapes: S draws, E examples, B batch, T tokens, W words that are asked (of the longest example), C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from .divergences import of_classes
from .heads import Head
from .likelihoods import IGNORED, PAD_TO, Collate, Likelihood, Rows, register_likelihood
from .token_scores import TokenScores

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    from transformers import PreTrainedTokenizerBase


class _OfTokens(dist.Independent):
    base_dist: dist.Categorical

    def log_prob(self, value: Tensor) -> Tensor:
        asked = value != IGNORED
        each = self.base_dist.log_prob(torch.where(asked, value, 0))  # (..., B, T)
        return torch.where(asked, each, 0.0).sum(-1)


@register_likelihood("token_labels")
@dataclasses.dataclass(frozen=True)
class TokenLabels(Likelihood):
    """A class for every word; the log-probability of an example is the sum over its words."""

    names: tuple[str, ...]
    head = Head(
        auto_class="AutoModelForTokenClassification", task_type="TOKEN_CLS", pipeline="token-classification"
    )  # fmt: skip
    one_row = False
    no_confidence = "a label of every word: no single confidence"
    averaged_in_code = "logits.softmax(-1)"  # of every token; those of words are among them
    left_out = ("Calibration",)
    dims: ClassVar = {"label": ("example", "word"), "probability": ("example", "word", "class")}

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(f"labels {self.names!r}: give a tuple of two or more different class names")

    @property
    def outputs(self) -> int:
        return len(self.names)

    def __call__(self, logits: Tensor, *, scale: Tensor | None = None) -> _OfTokens:
        self.require_outputs(logits)
        return _OfTokens(dist.Categorical(logits=logits.float()), 1)

    def card(self, labels: Sequence[str]) -> str:
        return f"{super().card(labels)[:-1]}, for every token. A word's label is that of its first token."

    def allows(self, labels: np.ndarray) -> np.ndarray:
        known = (*range(self.outputs), IGNORED)
        return np.array([np.ndim(x) == 1 and len(x) > 0 and bool(np.isin(x, known).all()) for x in labels])

    @property
    def allowed_labels(self) -> str:
        each = ", ".join(f"{index} ({label})" for index, label in enumerate(self.names))
        return f"allowed are lists of numbers, one a word: {each}, or {IGNORED} where nothing is asked"

    @property
    def feature(self) -> datasets.Features:
        import datasets

        return datasets.Sequence(datasets.Value("int64"))

    @property
    def examples(self) -> list[list[int]]:
        return [[*range(self.outputs)], [*reversed(range(self.outputs)), IGNORED]]

    def laid_out(self, labels: Sequence[Any]) -> np.ndarray:
        rows = np.full((len(labels), max(map(len, labels))), IGNORED)
        for row, given in zip(rows, labels, strict=True):
            asked = [label for label in given if label != IGNORED]
            row[: len(asked)] = asked
        return rows

    def is_text(self, cell: object) -> bool:
        return _is_list_of_words(cell) and all(map(super().is_text, cell))

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, columns: tuple[str, ...], max_length: int) -> Rows:
        """Errors: ValueError for a tokenizer that cannot tell words, and for a word without a label or a token."""
        words = rows[columns[0]]
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} does not tell words: labels of words need a fast tokenizer")
        for text, labels in zip(words, rows["label"], strict=True):
            if len(text) != len(labels):
                raise ValueError(f"{len(text)} words ({' '.join(text)[:60]}) have {len(labels)} labels: give each one")
        found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        labels = []
        for row, (text, given) in enumerate(zip(words, rows["label"], strict=True)):
            places, seen = found.word_ids(row), 0
            labels.append([IGNORED] * len(places))
            for token, place in enumerate(places):
                if place is not None and place >= seen:
                    if place > seen:
                        raise ValueError(f"the word {text[seen]!r} ({' '.join(text)[:60]}) has no token: leave it out")
                    labels[row][token], seen = given[place], place + 1
        return {**found, "label": labels}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate:
        from transformers import DataCollatorForTokenClassification

        padded = DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=PAD_TO, label_pad_token_id=IGNORED)
        return lambda rows: padded([{"labels": row["label"], **_without(row, "label")} for row in rows])

    def averaged(self, distribution: _OfTokens, labels: Tensor) -> Tensor:
        """Probabilities at the words, (..., B, W, C)."""
        places, asked = asked_first(labels)
        probs: Tensor = distribution.base_dist.probs
        probs = torch.take_along_dim(probs, places.expand(*probs.shape[:-2], -1)[..., None], -2)
        return torch.where(asked[..., None], probs, 0.0)

    def divergence(self, teacher: Any, student: Any, labels: Tensor) -> Tensor:
        return torch.where(labels != IGNORED, of_classes(teacher.base_dist, student.base_dist), 0.0).sum(-1)

    def scored(self, labels: Tensor) -> Tensor:
        places, _ = asked_first(labels)
        return labels.gather(-1, places)

    def decision(self, mean: Tensor) -> Tensor:
        return torch.where(_asked(mean), mean.argmax(-1), IGNORED)

    def cells(self, answers: Tensor) -> list[list[int]]:
        return [row[row != IGNORED].tolist() for row in answers]

    def columns(self, outputs: Tensor) -> dict[str, list[list[float]]]:
        mean = outputs.mean(0)
        rows = [each[asked].T.tolist() for each, asked in zip(mean, _asked(mean), strict=True)]  # C lists of words
        return {f"probability_{name}": [row[index] for row in rows] for index, name in enumerate(self.names)}

    def read(self, table: pd.DataFrame) -> Tensor:
        columns = zip(*(table[f"probability_{name}"] for name in self.names), strict=True)
        rows = [torch.tensor(np.stack(row, -1)) for row in columns]  # (words, C) each
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def placeholder(self, texts: Sequence[Any]) -> list[int]:
        return [0] * len(texts[0])

    def answers(self, outputs: Tensor, scale: Tensor) -> dict[str, Any]:
        """labels: of the words, as many as --max_length lets in."""
        decisions = self.cells(self.decision(outputs.mean(0)))
        return {"labels": [[self.names[index] for index in row] for row in decisions], **self.columns(outputs)}

    def predicted(self, outputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """label: IGNORED, and probability: nan, beyond the words of an example."""
        asked = _asked(outputs)
        drawn = torch.multinomial(outputs[asked], 1, generator=generator).squeeze(-1)
        label = torch.full(asked.shape, IGNORED, dtype=torch.short)
        label[asked] = drawn.short()
        return {"label": label, "probability": torch.where(asked[..., None], outputs, torch.nan)}

    def metric(self) -> TokenScores:
        return TokenScores(self.names)

    def constants(self, labels: np.ndarray) -> list[np.ndarray]:
        return [np.where(labels == IGNORED, IGNORED, c) for c in np.unique(labels[labels != IGNORED])]

    def constant_log_scores(self, labels: np.ndarray) -> np.ndarray:
        asked = labels != IGNORED
        counts = np.bincount(labels[asked], minlength=self.outputs)
        shares = np.log(np.maximum(counts, 1) / counts.sum())
        return np.asarray(np.where(asked, shares[np.where(asked, labels, 0)], 0.0).sum(1))

    def right(self, decision: Tensor, labels: Tensor) -> float:
        """Share of the words."""
        return float((decision == labels)[labels != IGNORED].double().mean())

    def details(self, mean: Tensor, labels: Tensor) -> dict[str, Any]:
        decision = self.decision(mean).tolist()
        return {"tables": {self.metric().caption: self.metric().each(decision, labels.tolist())}}

    def worst(self, table: pd.DataFrame, count: int) -> tuple[str, pd.DataFrame]:
        """The wrong words that were the most confident."""
        import pandas as pd

        words = next(name for name in table if name != "label" and _is_list_of_words(table[name].iloc[0]))
        found, total = [], 0
        probabilities = zip(*(table[f"probability_{name}"] for name in self.names), strict=True)
        rows = zip(table[words], table["label"], table["decision"], probabilities, strict=True)
        for text, labels, decisions, probs in rows:
            asked = [place for place, label in enumerate(labels) if label != IGNORED]
            total += len(decisions)
            for n, (place, answer) in enumerate(zip(asked, decisions, strict=False)):  # later words are cut off
                if labels[place] != answer:
                    found.append((" ".join(text), text[place], self.names[labels[place]], self.names[answer],
                                  float(probs[answer][n])))  # fmt: skip
        wrong = pd.DataFrame(found, columns=["text", "word", "label", "answer", "confidence"])
        shown = wrong.sort_values("confidence", ascending=False).head(count)
        sentence = f"{len(wrong)} of {total} words are answered wrong; these are the most confident."
        return sentence, shown.assign(confidence=shown["confidence"].map("{:.3f}".format))

    def fisher_directions(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return self.in_eigenbasis(logits, scale) * (labels != IGNORED)[..., None]


def _without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def _is_list_of_words(cell: object) -> TypeGuard[Sequence[str]]:
    return isinstance(cell, list | np.ndarray) and len(cell) > 0 and isinstance(cell[0], str)


def _asked(outputs: Tensor) -> Tensor:
    """(..., W) where there is a word: probabilities are filled up with 0."""
    return outputs.sum(-1) > 0


def asked_first(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(places of the labels that are asked, then of others; which of them are), (B, W) each."""
    asked = labels != IGNORED
    most = int(asked.sum(-1).max())
    places = (~asked).byte().argsort(dim=-1, stable=True)[..., :most]
    return places, asked.gather(-1, places)
