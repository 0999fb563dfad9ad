"""What an exported model answers on the held-out rows of its run, beside what the run deployed there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..posterior.prediction import Prediction
from ..program import BayesianLoRA
from ..progress import phase
from ..tasks.base import has_glue_score, metric_of
from ..tasks.batching import lengths_of, longest_first, split_labels
from .answering import Source
from .loaded_model import PREDICTIONS

Answer = Callable[[dict[str, Tensor]], Tensor]  # inputs of a batch -> what the likelihood takes as logits, (B, *, C)


def answer_of(model: nn.Module, program: BayesianLoRA) -> Answer:
    """A network of transformers or PEFT, called on a batch as the program's own is."""
    settings, head = ({"use_cache": False} if program.net.has_cache else {}), program.net.head
    return lambda inputs: head.logits(lambda rows: model(**settings, **rows), inputs).cpu()


class Measured(NamedTuple):
    """Of held-out rows: how many, the metric and the NLL (nats per example) of an export and of the run's deployed
    allocation. metric: its name, None where it is not known here; its values are None then.

    differ: rows with another decision; of numbers `gap`, the largest difference, in the label's units.
    """

    rows: int
    metric: str | None
    value: float | None
    deployed: float | None
    nll: float
    deployed_nll: float
    differ: int | None = None
    gap: float | None = None

    def __str__(self) -> str:
        score = ""
        if self.metric is not None:
            score = f"{self.metric} {self.value:.4f}, where the run's deployed allocation has {self.deployed:.4f}; "
        nll = f"NLL {self.nll:.4f} nats per example, there {self.deployed_nll:.4f}"
        differ = f"{self.differ:,} decisions differ" if self.gap is None else f"answers differ by up to {self.gap:.2g}"
        return f"{self.rows:,} held-out rows: {score}{nll}; {differ}"


def _plain(cell: Any) -> Any:
    """A list in place of the array that Parquet has for one."""
    return cell.tolist() if isinstance(cell, np.ndarray) else cell


class HeldOut:
    """The held-out rows of a run, encoded and in batches as the run evaluated them.

    measured: of the last export.
    Errors: ValueError where the folder is no run's.
    """

    def __init__(self, source: Source, run: Path):
        self.source, self.run = source, run
        self.kind, self.table = source.program.likelihood, source.held_out()
        columns, tokenizer, config = source.program.text_columns, source.tokenizer, source.config
        rows = {name: [*map(_plain, self.table[name])] for name in columns}
        labels = {"label": [*map(_plain, self.table["label"])]}
        self._encoded = {**labels, **self.kind.encode(tokenizer, {**rows, **labels}, columns, config.max_length)}
        self._batches = longest_first(lengths_of(self._encoded), 2 * config.batch_size)
        self.measured: Measured | None = None
        self._collate = self.kind.collator(tokenizer)

    def batch(self, which: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs, labels) of one batch; the first has the longest rows."""
        rows = [{name: x[i] for name, x in self._encoded.items()} for i in self._batches[which]]
        return split_labels(self._collate(rows), torch.device("cpu"))

    @torch.no_grad()
    def measure(self, answer: Answer, *others: Answer) -> Measured:
        """Of one network, or of several whose predictions are averaged."""
        scale, parts = self.source.program.log_scale.detach().cpu().exp(), []
        with phase("predicting held-out rows", len(self._batches), unit="batches") as shown:
            for which in shown.over(range(len(self._batches))):
                inputs, labels = self.batch(which)
                logits = torch.stack([each(inputs).float() for each in (answer, *others)])
                distribution = self.kind(logits, scale=scale)
                outputs, scores = self.kind.averaged(distribution, labels), distribution.log_prob(labels)
                parts.append(Prediction(outputs, scores, self.kind.scored(labels), self.kind))
        order = torch.tensor([i for batch in self._batches for i in batch])
        self.measured = self._compared(Prediction.joined(parts).restored(order))
        return self.measured

    def _compared(self, prediction: Prediction) -> Measured:
        name: str = json.loads((self.run / "summary.json").read_text(encoding="utf-8"))["metric"]["name"]
        was = torch.as_tensor(self.kind.laid_out(self.table["deployed_decision"].tolist()))
        apart, is_number = prediction.decision.double() - was.double(), prediction.decision.is_floating_point()
        value, deployed = (self._score(name, x, prediction.labels) for x in (prediction.decision, was))
        return Measured(
            rows=len(self.table), metric=None if value is None else name, value=value, deployed=deployed,
            nll=prediction.nll, deployed_nll=-float(self.table["deployed_log_likelihood"].mean()),
            differ=None if is_number else int((apart != 0).view(len(apart), -1).any(1).sum()),
            gap=apart.abs().max().item() if is_number else None,
        )  # fmt: skip

    def _score(self, name: str, decision: Tensor, labels: Tensor) -> float | None:
        """By the task's own scores or those of its kind; None where these do not have it."""
        task, columns = self.source.config.task, self.source.program.text_columns
        own = has_glue_score(task)
        metric = metric_of(task, self.kind) if own else self.kind.metric_on(self.table, columns)
        found: float | None = metric.compute(predictions=decision.tolist(), references=labels.tolist()).get(name)
        return found


def held_out_of(source: Source, run: Path | None) -> HeldOut | None:
    """None for a folder that was exported without its run, and for a run without such rows.

    Errors: ValueError where they are damaged.
    """
    if run is None or not all((run / name).is_file() for name in (PREDICTIONS, "summary.json")):
        return None
    return HeldOut(source, run) if "deployed_decision" in source.held_out() else None
