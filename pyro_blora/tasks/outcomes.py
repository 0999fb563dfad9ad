"""The kind of outcome of a finished run: written into its summary, and found again by what reads its folder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .categorical import Categorical
from .likelihoods import LIKELIHOODS, Likelihood
from .multi_label import MultiLabel
from .normal import Normal

if TYPE_CHECKING:
    import pandas as pd


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
