"""Which columns of a table are texts and which is the label: as a user says, or by their usual names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...user_values import nearest

_PAIRS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("text1", "text2"),
    ("text_a", "text_b"), ("first", "second"), ("question", "sentence"), ("question", "context"), ("query", "passage"),
    ("query", "document"),
)  # fmt: skip
_TEXTS = (  # a name of the second row counts where there is none of the first
    (("text",), ("sentence",), *_PAIRS),
    tuple((name,) for name in (
        "review", "content", "body", "document", "comment", "tweet", "message", "utterance", "query", "question",
    )),
)  # fmt: skip
_LABELS = (
    (("label",), ("labels",)),
    tuple((name,) for name in (
        "category", "categories", "class", "intent", "sentiment", "stars", "rating", "score", "target", "gold_label",
    )),
)  # fmt: skip
RESERVED = ("label", "idx", "decision", "deployed_decision", "log_likelihood", "deployed_log_likelihood")
"""Columns of predictions.parquet, which no text may have."""
_SHOWN = 20  # columns in a message


class Columns(NamedTuple):
    """texts: one name, or two of pairs. guessed: a sentence for the user, "" where both were given."""

    texts: tuple[str, ...]
    label: str
    guessed: str


def choose(source: str, columns: Sequence[str], text: str | tuple[str, ...] | None, label: str | None) -> Columns:
    """The columns of texts and of the label.

    text: a name, or two, as a tuple or with a comma between; None: guessed, as is label.

    Errors: ValueError for a name that is no column, one column for both, and where no guess fits or more than one.
    """
    texts = () if text is None else _given_texts(source, columns, text)
    labels: tuple[str, ...] = () if label is None else (_present(source, columns, label, "label"),)
    if not labels:
        labels = _guess(columns, _LABELS, texts) or _other(columns, texts or _guess(columns, _TEXTS, ()))
        if not labels:
            raise _unclear(source, columns, "has the labels", "--label NAME")
    if not texts:
        texts = _guess(columns, _TEXTS, labels) or _other(columns, labels)
        if not texts:
            raise _unclear(source, columns, "has the texts", "--text NAME, or --text NAME,NAME for pairs")
    if labels[0] in texts:
        raise ValueError(f"{source}: column {labels[0]!r} is both text and label: give two columns, --text and --label")
    for name in texts:
        if name in RESERVED:
            raise ValueError(f"{source}: a column of texts must not be called {name!r}: rename it")
    said = [f"texts from {' and '.join(map(repr, texts))}"] if text is None else []
    said += [f"labels from {labels[0]!r}"] if label is None else []
    return Columns(texts, labels[0], f"{' and '.join(said)}, by their names" if said else "")


def require_columns(source: str, columns: Sequence[str], chosen: Columns, training: str) -> None:
    """Errors: ValueError for a table of validation rows that lacks one of the training rows' columns."""
    missing = [name for name in (*chosen.texts, chosen.label) if name not in columns]
    if missing:
        raise ValueError(f"{source} lacks the columns {missing} of {training}; it has {_listed(columns)}: rename them")


def _given_texts(source: str, columns: Sequence[str], text: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(text, str):
        names = (text,) if text in columns else tuple(name.strip() for name in text.split(","))
    else:
        names = tuple(text)
    if len(names) > 2 or not all(names):
        raise ValueError(f"{source}: --text {text!r} must be one column, or two with a comma between for pairs")
    for name in names:
        _present(source, columns, name, "text")
    if len(set(names)) < len(names):
        raise ValueError(f"{source}: --text {text!r} names one column twice: give two different ones for pairs")
    return names


def _present(source: str, columns: Sequence[str], name: str, what: str) -> str:
    if name not in columns:
        near = nearest(name, columns)
        raise ValueError(f"{source} has no column {name!r} for --{what}: {near} It has {_listed(columns)}")
    return name


def _guess(
    columns: Sequence[str], rows: Iterable[Iterable[tuple[str, ...]]], taken: tuple[str, ...]
) -> tuple[str, ...]:
    """The only usual name of the first row that has any; () where there is none, or more than one."""
    by_name = {name.lower(): name for name in columns if name not in taken}
    for names in rows:
        found = [tuple(by_name[x] for x in each) for each in names if all(x in by_name for x in each)]
        inside = {name for each in found if len(each) > 1 for name in each}  # "sentence" with "question" is a pair
        found = [each for each in found if len(each) > 1 or each[0] not in inside]
        if found:
            return found[0] if len(found) == 1 else ()
    return ()


def _other(columns: Sequence[str], taken: tuple[str, ...]) -> tuple[str, ...]:
    """The only column that is left."""
    left = tuple(name for name in columns if name not in taken)
    return left if taken and len(left) == 1 else ()


def _unclear(source: str, columns: Sequence[str], what: str, remedy: str) -> ValueError:
    return ValueError(f"{source}: which column {what} is not clear from {_listed(columns)}: give {remedy}")


def _listed(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return f"the column{'' if len(columns) == 1 else 's'} {', '.join(repr(x[:40]) for x in columns[:_SHOWN])}{more}"
