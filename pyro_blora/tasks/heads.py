"""The task head of a kind of outcome: transformers' class, PEFT's name, and how the model is called and read."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_AUTO = "AutoModelFor"


def _as_they_are(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return rows


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a network needs to know of the kind of its outcome; the default is transformers' sequence classification."""

    auto_class: str = "AutoModelForSequenceClassification"
    """Class of transformers that puts the head on a pretrained model."""
    task_type: str | None = "SEQ_CLS"
    """PEFT's name of such models, whose wrapper it selects; None: PEFT has none for them."""
    peft_heads: tuple[str, ...] = ("classifier", "score")
    """Names of modules that this wrapper takes for the head."""
    pipeline: str | None = "text-classification"
    """transformers' pipeline that takes such a model, which is also the hub's tag; None: there is none."""
    is_new: bool = True
    """Whether the head is learned for the task, from an untrained one where the checkpoint has none. False: it is part
    of the pretrained model, stays frozen, and must be in the checkpoint."""
    read: Callable[[Any], Tensor] = operator.attrgetter("logits")
    """The model's output -> what the likelihood takes as logits, (B, ...)."""
    example: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _as_they_are
    """Rows of tokens (B, T) -> inputs of B examples, where an example is more than one row."""

    def is_of(self, model: object) -> bool:
        """Whether a model is transformers' own of this kind, by the name of its class."""
        return self.auto_class.removeprefix(_AUTO) in type(model).__name__


SEQUENCE = Head()
"""Rows of tokens in, `logits` out."""
