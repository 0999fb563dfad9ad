"""The kind of outcome of a finished run: written into its summary, and found again by what reads its folder.

What a trained program needs of its task is a `Form`, which is exported with the adapter: the task's code is not needed.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from .categorical import Categorical
from .likelihoods import LIKELIHOODS, Likelihood
from .multi_label import MultiLabel
from .normal import Normal

if TYPE_CHECKING:
    import pandas as pd


class Form(NamedTuple):
    """What of a task its trained program needs; a Task has both, too."""

    text_columns: tuple[str, ...]
    likelihood: Likelihood

    def to_json(self) -> str:
        kind = type(self.likelihood)
        of_class = f"{kind.__module__}.{kind.__qualname__}"
        stored = {"text_columns": self.text_columns, "outcome": described(self.likelihood), "class": of_class}
        return json.dumps(stored, default=repr)

    @classmethod
    def from_json(cls, text: str) -> Form:
        """Errors: ValueError for a kind of outcome that is not registered in this process."""
        stored = json.loads(text)
        kind = kind_of(stored["outcome"])
        if kind is None:
            registered = stored["outcome"]["kind"]
            remedy = (
                f"import the module that has it, in which @register_likelihood({registered!r}) stands above it"
                if registered else "put @register_likelihood('NAME') above it and export again, or register the task"
            )  # fmt: skip
            raise ValueError(f"the kind of outcome {stored['class']} is not registered here: {remedy}")
        return cls(tuple(stored["text_columns"]), kind)


def described(kind: Likelihood) -> dict[str, Any]:
    """{"kind": its registered name, **its fields}; of one that is not registered, the name alone is None."""
    names = [name for name in LIKELIHOODS.names() if LIKELIHOODS.resolve(name) is type(kind)]
    fields: dict[str, Any] = dataclasses.asdict(kind) if dataclasses.is_dataclass(kind) else {}
    return {"kind": names[0] if names else None, **fields}


def kind_of(outcome: dict[str, Any]) -> Likelihood | None:
    """The kind that `described` gave; None for one that is not registered in this process, or of other fields."""
    try:
        fields = {key: tuple(x) if isinstance(x, list) else x for key, x in outcome.items() if key != "kind"}
        return LIKELIHOODS.resolve(outcome["kind"])(**fields) if outcome["kind"] in LIKELIHOODS.names() else None
    except (AttributeError, KeyError, TypeError, ValueError):  # somebody has edited it
        return None


def older_kind(predictions: pd.DataFrame) -> Likelihood:
    """That of a run whose summary has none, by the columns of its predictions: there were three."""
    for kind, prefix in ((Categorical, "p_"), (MultiLabel, "probability_")):
        if names := tuple(name.removeprefix(prefix) for name in map(str, predictions) if name.startswith(prefix)):
            return kind(names)
    label = predictions["label"]
    return Normal(float(label.min()) - 1, float(label.max()) + 1)
