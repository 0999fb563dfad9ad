"""The distribution of an answer's first and last token over all of a text, however many windows the text has.

A token of the text has one place among the windows (windows.py), hence one logit a to be the answer's first and one b
to be its last: p(first, last) is proportional to exp(a[first] + b[last]) where first <= last, whatever window they are
in. So an example is a question, in the likelihood, in N and in a batch; no window has to answer "not here".
Shapes: B batch, W windows, T tokens of a window, M tokens of a text (of the longest).
Source: Devlin et al., BERT (2019); Clark and Gardner (2018) for one normalization over all parts of a text.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

NEVER = -1e4  # the logit of a token that a text does not have: its probability is 0 in float32
HEAD, PLACES, STARTS, ENDS = range(4)  # rows of an example's labels, padded with IGNORED
OWN = slice(2, 4)  # in the head, after number and words: first and last token of the answer; then the references


class SpanOfText(dist.TorchDistribution):
    """Of the first and the last token of an answer.  logits (..., B, W, T, 2)

    `log_prob` takes labels as the collator makes them, (B, 4, M).
    """

    arg_constraints: ClassVar = {"logits": dist.constraints.real_vector}

    def __init__(self, logits: Tensor):
        self.logits = logits
        super().__init__(logits.shape[:-3], torch.Size([4, 1]), validate_args=False)  # the last of any size

    def expand(self, batch_shape: Any, _instance: Any = None) -> SpanOfText:
        return SpanOfText(self.logits.expand(*batch_shape, *self.logits.shape[-3:]))

    def edges(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The logits a and b of the text's tokens, (..., B, M) each."""
        places = labels[..., PLACES, :]
        found = self.logits.flatten(-3, -2).take_along_dim(places.clamp(min=0)[..., None].expand(
            *self.logits.shape[:-3], -1, 2), -2)  # fmt: skip
        a, b = torch.where(places[..., None] >= 0, found, NEVER).unbind(-1)
        return a, b

    def log_prob(self, value: Tensor) -> Tensor:
        a, b = self.edges(value)
        first, last = value[..., HEAD, OWN].expand(*a.shape[:-1], 2).unbind(-1)
        own = a.gather(-1, first[..., None]) + b.gather(-1, last[..., None])
        return own.squeeze(-1) - log_total(a, b)

    def drawn(self, labels: Tensor) -> Tensor:
        """The labels with answers that are drawn."""
        a, b = self.edges(labels)
        first = dist.Categorical(logits=a + _from(b)).sample()
        place = torch.arange(b.shape[-1], device=b.device)
        last = dist.Categorical(logits=torch.where(place >= first[..., None], b, NEVER)).sample()
        found = labels.clone()
        found[..., HEAD, OWN] = torch.stack([first, last], -1)
        return found


def _from(b: Tensor) -> Tensor:
    """Log of the sum of exp(b) from each token on."""
    return b.flip(-1).logcumsumexp(-1).flip(-1)


def log_total(a: Tensor, b: Tensor) -> Tensor:
    return (a + _from(b)).logsumexp(-1)


def marginals(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of every token to be the first, and to be the last."""
    total = log_total(a, b)[..., None]
    return (a + _from(b) - total).exp(), (b + a.logcumsumexp(-1) - total).exp()
