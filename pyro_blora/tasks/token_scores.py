"""Scores of labels of words: accuracy, and precision, recall and F1 of whole entities, in any of the usual schemes.

A name is a prefix and a type: B- begins an entity, I- (M-) continues it, E- (L-) is its last word, S- (U-) its only
one, as in IOB, IOBES (BIOES, BMES) and BILOU. A label that continues nothing of its type begins an entity, as CoNLL's
own script reads it.   Source: Tjong Kim Sang and De Meulder, CoNLL-2003; Ratinov and Roth (2009) for the schemes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .likelihoods import IGNORED

Lists = Iterable[Iterable[int]]  # class numbers of the words of each example
Entity = tuple[int, int, int, str]  # (example, first word, word after the last, type)
_BEGINS, _CONTINUES, _ENDS, _OUTSIDE = "BSU", "IMEL", "ELSU", "O"
_PREFIXED = re.compile(r"([A-Z])-(.*)", re.DOTALL)


class TokenScores:
    """`accuracy` of the words, and of whole entities `precision`, `recall` and `f1`, averages over all (micro).

    names: of the classes. Where no name begins with B- or I-, nor all but `O` with a prefix, every word is an entity.
    Errors: ValueError for a prefix of no known scheme among names of entities.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        prefixes = [found.group(1) for name in names if name != _OUTSIDE and (found := _PREFIXED.fullmatch(name))]
        all_have = _OUTSIDE in names and len(prefixes) == len(self.names) - 1
        self.of_entities = not {"B", "I"}.isdisjoint(prefixes) or (
            all_have and set(prefixes) <= {*_BEGINS, *_CONTINUES}
        )
        unknown = {prefix for prefix in prefixes if prefix not in _BEGINS + _CONTINUES + _OUTSIDE}
        if self.of_entities and unknown:
            raise ValueError(
                f"labels of words with the prefix {', '.join(f'{x}-' for x in sorted(unknown))} are of no known scheme "
                "of entities: write B- and I-, with E- (L-) and S- (U-) where they are marked, and no such prefix else"
            )
        self.caption = "Entities by type" if self.of_entities else "Words by label"

    def compute(self, *, predictions: Lists, references: Lists) -> dict[str, float]:
        """Lists of class numbers; where a reference is IGNORED nothing is scored.  Errors: ValueError for no word."""
        answers, truth = self._asked(predictions, references)
        words = [a == b for one, other in zip(answers, truth, strict=True) for a, b in zip(one, other, strict=True)]
        if not words:
            raise ValueError("labels of words cannot be scored: no word is asked")
        return {"accuracy": sum(words) / len(words), **_of_sets(*map(self._entities, (answers, truth)))}

    def each(self, predictions: Lists, references: Lists) -> list[dict[str, Any]]:
        """The same of every type (or label), with their number among the references."""
        found, true = map(self._entities, self._asked(predictions, references))
        rows = []
        for kind in sorted({entity[-1] for entity in true | found}):
            mine = [{entity for entity in every if entity[-1] == kind} for every in (found, true)]
            rows.append({"label": kind, **_of_sets(*mine), "number": len(mine[1])})
        return rows

    def _asked(self, predictions: Lists, references: Lists) -> tuple[list[list[int]], list[list[int]]]:
        pairs = [
            [(int(a), int(b)) for a, b in zip(one, other, strict=True) if b != IGNORED]
            for one, other in zip(predictions, references, strict=True)
        ]
        return [[a for a, _ in row] for row in pairs], [[b for _, b in row] for row in pairs]

    def _entities(self, rows: list[list[int]]) -> set[Entity]:
        found = set()
        for example, row in enumerate(rows):
            start, kind = 0, None
            for place, (prefix, of) in enumerate([*(self._parts(self.names[label]) for label in row), (_OUTSIDE, "")]):
                if kind is not None and (prefix not in _CONTINUES or of != kind):
                    found.add((example, start, place, kind))
                    kind = None
                if kind is None and prefix in _BEGINS + _CONTINUES:
                    start, kind = place, of
                if kind is not None and prefix in _ENDS:
                    found.add((example, start, place + 1, kind))
                    kind = None
        return found

    def _parts(self, name: str) -> tuple[str, str]:
        """(prefix, type)"""
        if not self.of_entities:
            return _BEGINS[0], name
        prefixed = _PREFIXED.fullmatch(name)
        return (prefixed[1], prefixed[2]) if prefixed else (_OUTSIDE, "")


def _of_sets(found: set[Entity], true: set[Entity]) -> dict[str, float]:
    """0 where undefined."""
    hits = len(found & true)
    return {
        "precision": hits / max(len(found), 1), "recall": hits / max(len(true), 1),
        "f1": 2 * hits / max(len(found) + len(true), 1),
    }  # fmt: skip
