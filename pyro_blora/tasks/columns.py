"""Columns of tables: labels as numbers, those beside a user's, and the examples whose labels were least expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def numbers(labels: np.ndarray) -> np.ndarray:
    """(E,) float64 of labels that should be one number each; nan for those that are something else."""
    try:
        found = np.asarray(labels, dtype=np.float64)
    except (TypeError, ValueError):  # words, or lists of several lengths
        found = np.array([x if isinstance(x, int | float | np.number) else np.nan for x in labels], dtype=np.float64)
    return found if found.ndim == 1 else np.full(len(found), np.nan)


def beside(table: pd.DataFrame, columns: Mapping[str, Any]) -> pd.DataFrame:
    """The table and further columns; one of its own that has the name of one of these is called `NAME (text)`."""
    return table.rename(columns={name: f"{name} (text)" for name in columns}).assign(**columns)


def least_expected(table: pd.DataFrame, count: int) -> tuple[str, pd.DataFrame]:
    """The examples of predictions.parquet whose labels had the lowest probability, of whatever kind they are."""
    answers = ("idx", "label", "decision", "deployed_decision")
    own = table.columns[: list(table.columns).index("decision")]
    text = [name for name in own if table[name].dtype.kind not in "fiub" and name not in answers]
    worst = table.sort_values("log_likelihood").head(count)
    return "The examples whose value was least expected.", worst[[*text, "label", "decision"]].round(2)
