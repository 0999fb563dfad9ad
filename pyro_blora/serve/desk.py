"""Texts in, answers as JSON out: what a model says of a text, and which draws of its posterior disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..bops import expected_bops
from ..deploy.answering import Answers, columns_of
from ..layout import AdapterLayout
from ..tasks.writing import Writer
from ..user_values import shown

if TYPE_CHECKING:
    import pandas as pd

    from ..deploy.deployed_model import DeployedModel
    from ..deploy.loaded_model import Model

_PREFIXES = ("p_", "probability_")  # of the columns with a class's or a label's probability
_WORDS = ("a", "short", "example")


class Asked(NamedTuple):
    """The texts of one request, and whether it wants what every draw says.  texts: a tuple of columns for each."""

    texts: list[tuple[Any, ...]]
    draws: bool


class TooLong(ValueError):
    """A text, or a list of texts, above a limit."""


class Desk:
    """Checks texts and answers them; in one thread at a time.

    name: what clients are told that the model is called.
    """

    def __init__(self, model: Model | DeployedModel, name: str, **options: Any):
        self.answers: Answers = model.answers(**options)
        self.model, self.name, self.kind = model, name, self.answers.kind
        if isinstance(self.kind, Writer):
            raise ValueError(f"{name} is a language model, whose texts are not served: use pyro-blora predict")
        self.columns: tuple[str, ...] = self.answers.columns
        self.batch_size = self.answers.batch_size
        text = " ".join(_WORDS)
        each = text if self.kind.is_text(text) else list(_WORDS)
        self._example = self.kind.example_texts or (each,) * len(self.columns)
        self.answer([Asked([self._example], draws=False)])  # what fails, fails now

    def read(self, texts: Any, *, max_texts: int, max_characters: int) -> list[tuple[Any, ...]]:
        """The texts of a request, as `Model.predict` takes them.

        Errors: TooLong; ValueError for what is no text, with its number.
        """
        if isinstance(texts, list) and len(texts) > max_texts:
            raise TooLong(f"{len(texts):,} texts are more than the {max_texts:,} of a request: send them in several")
        rows = columns_of(texts, self.columns)
        for name, cells in rows.items():
            for number, cell in enumerate(cells):
                where = f"text {number} (from 0)" + (f", {name!r}" if len(rows) > 1 else "")
                if not self.kind.is_text(cell):
                    raise ValueError(f"{where}: {shown(cell)} is no text{self._wanted()}")
                length = len(cell) if isinstance(cell, str) else sum(map(len, cell))
                if length > max_characters:
                    raise TooLong(f"{where} has {length:,} characters, at most {max_characters:,} are read: shorten it")
        return list(zip(*(rows[name] for name in self.columns), strict=True))

    def _wanted(self) -> str:
        return "" if self.kind.is_text("a") else ", a list of words is"

    def answer(self, asked: Sequence[Asked]) -> list[list[dict[str, Any]]]:
        """For each request a table for each of its texts, which are predicted together."""
        texts = [text for each in asked for text in each.texts]
        by_column = dict(zip(self.columns, map(list, zip(*texts, strict=True)), strict=True))
        prediction = self.answers.prediction(by_column)
        found = self._tables(self.answers.table_of(prediction, by_column))
        if any(each.draws for each in asked) and len(prediction.outputs) > 1:
            by_draw = [self._tables(self.answers.in_words(one, by_column)) for one in prediction.alone()]
            for number, own in enumerate(found):
                own["draws"] = [_of_draw(each[number], own) for each in by_draw]
                if not isinstance(_first(own), float):
                    own["disagree"] = [i for i, each in enumerate(own["draws"]) if _first(each) != _first(own)]
        parts, start = [], 0
        for each in asked:
            rows = found[start : start + len(each.texts)]
            start += len(each.texts)
            parts.append(rows if each.draws else [_without_draws(row) for row in rows])
        return parts

    def _tables(self, columns: pd.DataFrame | dict[str, Any]) -> list[dict[str, Any]]:
        """A table of columns as one of JSON for each row, the probabilities by name in one of its own."""
        cells = {str(name): [_json(x) for x in column] for name, column in columns.items()}
        named = {f"{prefix}{name}": name for prefix in _PREFIXES for name in self.kind.names}
        rows = []
        for row in zip(*cells.values(), strict=True):
            values = dict(zip(cells, row, strict=True))
            probabilities = {named[name]: values.pop(name) for name in cells if name in named}
            rows.append({**values, **({"probabilities": probabilities} if probabilities else {})})
        return rows

    def about(self) -> dict[str, Any]:
        """What a client may know of the model: no path."""
        program, drawn = self.answers.source.program, self.answers.drawn
        layout: AdapterLayout | None = getattr(program, "layout", None)
        return {
            "model": self.name, "task": _task(self.model), "form": self._form(),
            "columns": list(self.columns), "words": not self.kind.is_text("a"), "lists": self._lists(),
            "labels": list(self.kind.names),
            "answered_from": self.answers.confidence, "batch_size": self.batch_size,
            "draws": _costs(layout, drawn[0]["gates"]) if layout is not None and len(drawn) == 1 and drawn[0] else [],
        }  # fmt: skip

    def _lists(self) -> list[str]:
        """The columns whose texts are lists."""
        return [name for name, cell in zip(self.columns, self._example, strict=True) if not isinstance(cell, str)]

    def _form(self) -> str:
        return getattr(self.model, "form", "posterior" if self.answers.drawn[0] else "deployed")


def _task(model: Model | DeployedModel) -> str | None:
    return getattr(model, "task", None) or getattr(getattr(model, "config", None), "task", None)


def _costs(layout: AdapterLayout, gates: Any) -> list[dict[str, float]]:
    """Bit operations of every draw, as a share of the model's at 32 bit."""
    return [
        {"bops": float(expected_bops(layout, z.float(), g.float()).model_ratio)} for z, g in zip(*gates, strict=True)
    ]


def _first(row: dict[str, Any]) -> Any:
    return next(iter(row.values()))


def _of_draw(row: dict[str, Any], averaged: dict[str, Any]) -> dict[str, Any]:
    """The answer of one draw: its first column, and the probabilities."""
    name = next(iter(averaged))
    return {name: row[name], **({"probabilities": row["probabilities"]} if "probabilities" in row else {})}


def _without_draws(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("draws", "disagree")}


def _json(cell: Any) -> Any:
    """What JSON has for it; None for nan and infinities."""
    if isinstance(cell, torch.Tensor | np.ndarray | np.generic):
        cell = cell.tolist()
    if isinstance(cell, list | tuple):
        return [_json(x) for x in cell]
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell
