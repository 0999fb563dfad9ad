"""Above which confidence are answers right often enough?  Selective prediction with a stated accuracy.

Shapes: E examples, C classes; mean (E, C) probabilities, labels (E,).
Source: Geifman and El-Yaniv, Selective classification for deep neural networks (2017).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .calibration import share_error

FEWEST = 10  # answered rows of which an accuracy is measured


class Threshold(NamedTuple):
    """The least confidence to answer with; how many held-out rows reach it, their accuracy and its standard error."""

    confidence: float
    answered: int
    rows: int
    accuracy: float
    error: float


def threshold_for(mean: Tensor, labels: Tensor, accuracy: float) -> Threshold:
    """The lowest threshold of the confidence above which held-out rows have at least this accuracy.

    Errors: ValueError where none has, naming the best.
    """
    confidence, decision = mean.double().max(-1)
    order = confidence.argsort(descending=True, stable=True)
    confidence, right = confidence[order], (decision == labels)[order]
    counts = torch.arange(1, len(order) + 1)
    found = right.cumsum(0) / counts  # accuracy of the first rows
    last = torch.ones_like(right)  # of those with the same confidence: a threshold cannot part them
    last[:-1] = confidence[1:] < confidence[:-1]
    allowed = last & (counts >= min(FEWEST, len(order)))
    best = int(torch.where(allowed, found, -1.0).argmax())
    reached = (allowed & (found >= accuracy)).nonzero()
    if not len(reached):
        error = share_error(float(found[best]), best + 1)
        raise ValueError(
            f"an accuracy of {accuracy:g} is not reached on the {len(order)} held-out rows, down to {FEWEST} that are "
            f"answered; the best is {float(found[best]):.3f} ± {error:.3f}, on {best + 1} of them: ask for less"
        )
    at = int(reached[-1])
    share = float(found[at])
    return Threshold(float(confidence[at]), at + 1, len(order), share, share_error(share, at + 1))
