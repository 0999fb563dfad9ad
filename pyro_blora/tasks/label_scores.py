"""Precision, recall and F1 of every label: a table for `Likelihood.details`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

_MOST = 100  # rows of the table


def by_label(names: Sequence[str], decision: Tensor, labels: Tensor) -> dict[str, list[dict[str, Any]]]:
    """Rows by caption, the lowest F1 first, of labels that occur.

    decision, labels: classes (E,), or 0 and 1 of several labels (E, C).
    """
    from sklearn.metrics import precision_recall_fscore_support  # now, as it takes a second

    precision, recall, f1, support = precision_recall_fscore_support(
        labels.numpy(), decision.numpy(), labels=range(len(names)), zero_division=0.0
    )
    order = sorted((int(c) for c in np.flatnonzero(support)), key=lambda c: float(f1[c]))
    rows = [
        {"label": names[c], "precision": float(precision[c]), "recall": float(recall[c]), "f1": float(f1[c]),
         "number": int(support[c])} for c in order[:_MOST]
    ]  # fmt: skip
    caption = "worst first" if len(order) <= _MOST else f"the worst {_MOST} of {len(order):,}"
    return {f"Scores by label, {caption}": rows} if rows else {}
