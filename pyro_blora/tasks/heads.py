"""The task head of a kind of outcome: transformers' class, PEFT's name, and how the model is called and read."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AUTO = "AutoModelFor"
_ROWS = 16  # windows that a batch of fewer examples may have at once without gradients


def _as_they_are(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return rows


def _is_recorded(x: Tensor, in_step: bool) -> bool:
    return (in_step or torch.is_grad_enabled()) and x.device.type != "cpu"


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
    windows: bool = False
    """Whether an example has several windows, (B, W, T), each of which the model takes as a row of its own."""

    def rows(self, inputs: dict[str, Tensor], *, in_step: bool = False) -> dict[str, Tensor]:
        """What the model itself takes: of windows (B, W, T) those that are no padding, (rows, T).

        All of them where a training step must not wait for the host (CUDA graphs); padding then reads one token.
        in_step: it is one of those, though it takes no gradients.
        """
        if not self._has_windows(inputs):
            return inputs
        mask = inputs["attention_mask"]
        if _is_recorded(mask, in_step):
            first = torch.arange(mask.shape[-1], device=mask.device) == 0
            inputs = {**inputs, "attention_mask": torch.where(first, 1, mask)}
            return {name: x.flatten(0, 1) for name, x in inputs.items()}
        kept = mask.any(-1)
        return {name: x[kept] for name, x in inputs.items()}

    def logits(
        self, call: Callable[[dict[str, Tensor]], Any], inputs: dict[str, Tensor], *, in_step: bool = False
    ) -> Tensor:
        """What `call`, the model, makes of a batch, as the likelihood takes it; of windows (B, W, T, C).

        Without gradients, no more windows are in memory together than a batch of one window each has.  in_step: `rows`.
        """
        if not self._has_windows(inputs):
            return self.read(call(inputs))
        mask, rows = inputs["attention_mask"], self.rows(inputs, in_step=in_step)
        if _is_recorded(mask, in_step):
            every: Tensor = self.read(call(rows))
            return every.view(*mask.shape[:2], *every.shape[1:])
        size = len(rows["input_ids"]) if torch.is_grad_enabled() else max(len(mask), _ROWS)
        parts = zip(*(x.split(size) for x in rows.values()), strict=True)
        found = torch.cat([self.read(call(dict(zip(rows, each, strict=True)))) for each in parts])
        return found.new_zeros(*mask.shape[:2], *found.shape[1:]).index_put((mask.any(-1),), found)

    def groups(self, inputs: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], Tensor | slice]]:
        """A batch in groups that each are one row an example, or one example; and which examples they are."""
        if not self._has_windows(inputs):
            return [(inputs, slice(None))]
        windows = inputs["attention_mask"].any(-1).sum(-1)
        single, several = (windows == 1).nonzero().squeeze(-1), (windows > 1).nonzero().flatten().tolist()
        alone = [({name: x[single, :1] for name, x in inputs.items()}, single)] if len(single) else []
        return [*alone, *(({name: x[i : i + 1] for name, x in inputs.items()}, slice(i, i + 1)) for i in several)]

    def _has_windows(self, inputs: dict[str, Tensor]) -> bool:
        return self.windows and inputs["input_ids"].dim() > 2

    def is_of(self, model: object) -> bool:
        """Whether a model is transformers' own of this kind, by the name of its class."""
        return self.auto_class.removeprefix(_AUTO) in type(model).__name__


SEQUENCE = Head()
"""Rows of tokens in, `logits` out."""
