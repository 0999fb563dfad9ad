"""Exact match and F1 of answers that are parts of a text, as SQuAD 1.1's own script defines them.

Both are taken of normalized texts: lower case, without punctuation, without the articles a, an, the, blanks as one.
Of several references the one counts that gives most; scores are means over questions, as shares where the script has
per cent.   Source: Rajpurkar et al., SQuAD (2016), evaluate-v1.1.py.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from .likelihoods import IGNORED

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, references: Sequence[str]) -> float:
    return float(any(normalized(text) == normalized(reference) for reference in references))


def f1(text: str, references: Sequence[str]) -> float:
    """Of the words that both have, as often as both have them."""
    words = normalized(text).split()
    best = 0.0
    for reference in references:
        own = normalized(reference).split()
        same = sum((Counter(words) & Counter(own)).values())
        best = max(best, 2 * same / (len(words) + len(own)) if same else 0.0)
    return best


class SpanScores:
    """`exact_match` and `f1` of spans of characters, given the texts by their numbers (spans.py has the rows)."""

    def __init__(self, texts: Mapping[int, str]):
        self.texts = texts
        self._known: dict[tuple[int, ...], tuple[float, float]] = {}  # resamples ask for the same again

    def compute(self, *, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, float]:
        """Of each prediction the first span is taken.  Errors: ValueError for no answers."""
        if not predictions:
            raise ValueError("answers cannot be scored: there are none")
        each = [self._of(*pair) for pair in zip(predictions, references, strict=True)]
        return {
            name: sum(x) / len(each) for name, x in zip(("exact_match", "f1"), zip(*each, strict=True), strict=True)
        }

    def _of(self, prediction: Sequence[int], reference: Sequence[int]) -> tuple[float, float]:
        number, _, *edges = (x for x in reference if x != IGNORED)
        key = (number, *prediction[2:4], *edges)
        if key not in self._known:
            text = self.texts[number]
            answer, *true = (text[start:end] for start, end in zip(key[1::2], key[2::2], strict=True))
            self._known[key] = exact_match(answer, true), f1(answer, true)
        return self._known[key]


class SameSpan:
    """`same_span`: the share of answers whose characters are those of the first reference."""

    def compute(self, *, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        same = [list(prediction[2:4]) == list(reference[2:4]) for prediction, reference in pairs]
        return {"same_span": sum(same) / len(same)}
