"""Predictions of a trained program on new texts, as a table; loaded_model.py has what is called for it.

Texts are read as in the run: its tokenizer, its longest input, its columns. What a table has depends on the kind of
outcome (`Likelihood.answers`). Shapes: S draws, E examples; `*` further dimensions of an outcome.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..config.run_config import RunConfig
from ..gates import Gates
from ..posterior.calibration import uncertainty
from ..posterior.draws import draw, draw_weights, one_at_a_time
from ..posterior.prediction import Prediction, predict
from ..posterior.selection import threshold_for
from ..posterior.writing import write
from ..program import Inputs
from ..progress import phase
from ..tasks.batching import lengths_of, longest_first, split_labels
from ..tasks.likelihoods import Rows
from ..tasks.tabular.cells import as_text
from ..tasks.writing import Writer
from ..user_values import coerce, shown, suggest
from .of_fits import OfFits

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from ..tasks.conformal import Conformal

_SHOWN_FROM = 20  # batches, from which progress is shown


class Unreadable(ValueError):
    """A text that the kind of outcome cannot read (`Likelihood.encode`), as a question that leaves no room for one."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What answers: a program, its tokenizer, the configuration of its run.

    held_out: gives the run's held-out rows as a table, texts and labels, perhaps with what was predicted of them.
    others: the further fits of an ensemble.
    """

    program: Any
    """A BayesianLoRA; of a deployed model (deployed_model.py) what has its likelihood, text_columns and log_scale."""
    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    held_out: Callable[[], pd.DataFrame]
    others: tuple[Source, ...] = ()

    @one_at_a_time
    def drawn(self, draws: int | None, seed: int | None) -> dict[str, Any]:
        """What `predict` averages over; None: the run's number and seed."""
        config, program = self.config, self.program
        count, seed = draws or config.draws, config.seed if seed is None else seed
        gates, theta = draw(program, count, seed=seed), draw_weights(program, count, seed=seed)
        return {"gates": gates, "weights": theta, "dropout_seed": seed if config.average_over == "dropout" else None}

    @one_at_a_time
    def predict(self, batches: Iterable[tuple[Inputs, Tensor]], **drawn: Any) -> Prediction:
        """drawn: of `drawn`; without it, of the deployed allocation."""
        return predict(self.program, batches, **drawn)

    @one_at_a_time
    def write(
        self, rows: Rows, batch_size: int, gates: Gates[Tensor] | None = None, theta: Tensor | None = None
    ) -> list[str]:
        """A text for each row, at given gates and weights, or of the deployed allocation."""
        return write(self.program, self.tokenizer, rows, gates, theta, batch_size)


class Answers:
    """Draws, a threshold and sets, made once; called with texts it gives a table.

    remarks: sentences on what the threshold and the sets do on held-out rows.
    Errors: ValueError for an accuracy or a coverage that the held-out rows do not allow.
    """

    def __init__(
        self, source: Source, *, draws: int | None = None, deployed: bool = False, batch_size: int | None = None,
        abstain: float | None = None, coverage: float | None = None, seed: int | None = None,
        confidence: float | None = None,
    ) -> None:  # fmt: skip
        config, self.source, self.kind = source.config, source, source.program.likelihood
        self.columns = source.program.text_columns
        if not self.columns:
            raise ValueError("this model does not know its text columns: it was not made from a task")
        draws, batch_size, seed = (
            coerce(x, int | None, name) for name, x in (("draws", draws), ("batch_size", batch_size), ("seed", seed))
        )
        abstain, coverage, confidence = (
            coerce(x, float | None, name)
            for name, x in (("abstain", abstain), ("coverage", coverage), ("confidence", confidence))
        )
        for name, value in (("draws", draws), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if seed is not None and not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 4294967295, got {seed}: leave it out for the run's")
        for name, share in (("abstain", abstain), ("coverage", coverage), ("confidence", confidence)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name} must be a share between 0 and 1, got {share}: 0.9 for example")
        if None not in (abstain, confidence):
            raise ValueError("abstain finds the confidence from which texts are answered: give one of the two")
        self._as_run = draws in (None, config.draws) and seed is None and not deployed
        self.batch_size = batch_size or 2 * config.batch_size
        self._fits = [source] if deployed else [source, *source.others]
        self.drawn = [{} if deployed else fit.drawn(draws, seed) for fit in self._fits]
        self.remarks: list[str] = []
        if not self.kind.has_confidence and (name := "abstain" if abstain else "confidence" if confidence else ""):
            raise ValueError(f"{name} needs a confidence, there is none ({self.kind.no_confidence}): leave it out")
        self.confidence = confidence if abstain is None else self._threshold(abstain)
        self._sets = None if coverage is None else self._calibrated(coverage)

    def __call__(self, texts: Any) -> pd.DataFrame:
        """A row for each text.  Errors: ValueError for texts that are none, with their number."""
        rows = {name: [*map(as_text, cells)] for name, cells in columns_of(texts, self.columns).items()}
        for name, cells in rows.items():
            for number, cell in enumerate(cells):
                if not self.kind.is_text(cell):
                    raise ValueError(f"row {number} (from 0), {name!r}: {shown(cell)} is no text: leave it out")
        table = self.table(rows, show=True)
        return table.set_index(texts.index) if hasattr(texts, "iloc") else table  # of a frame or a series of pandas

    def table(self, rows: Rows, *, show: bool = False) -> pd.DataFrame:
        """The same of texts by column that are known to be texts."""
        if isinstance(self.kind, Writer):
            import pandas as pd

            return pd.DataFrame(self._written(rows))
        return self.table_of(self.prediction(rows, show=show), rows)

    def table_of(self, prediction: OfFits, rows: Rows) -> pd.DataFrame:
        """The table of what was predicted of texts by column."""
        import pandas as pd

        found = self.in_words(prediction.of_label, rows)
        first = next(iter(found))
        table, mean = {first: found.pop(first)}, prediction.mean
        if self.kind.has_confidence:
            entropy, information = uncertainty(prediction.outputs)
            sure = mean.double().max(-1).values
            table |= {"confidence": sure, "entropy": entropy, "mutual_information": information}
            if self.confidence is not None:
                table["answered"] = sure >= self.confidence
        if self._sets is not None:
            table |= self._sets.columns(mean)
        return pd.DataFrame({name: x.numpy() if isinstance(x, Tensor) else x for name, x in {**table, **found}.items()})

    def in_words(self, answered: tuple[Tensor, Tensor], rows: Rows) -> dict[str, Any]:
        """Columns of answers, of outputs (S, E, *) and the scale of a label."""
        texts = list(zip(*(rows[name] for name in self.columns), strict=True))
        return self.kind.in_words(self.kind.answers(*answered), texts)

    def _written(self, rows: Rows) -> dict[str, list[Any]]:
        """text: of the deployed allocation; drawn: those of every draw, without `deployed`."""
        columns = {name: rows[name] for name in self.columns}
        found: dict[str, list[Any]] = {"text": self.source.write(columns, self.batch_size)}
        each = []
        for fit, draws in zip(self._fits, self.drawn, strict=True):
            for i in range(len(draws["gates"].z) if draws else 0):
                at, theta = Gates(*(x[i] for x in draws["gates"])), draws["weights"]
                each.append(fit.write(columns, self.batch_size, at, None if theta is None else theta[i]))
        return found | ({"drawn": [list(texts) for texts in zip(*each, strict=True)]} if each else {})

    def prediction(self, rows: Rows, labels: Sequence[Any] | None = None, *, show: bool = False) -> OfFits:
        """Of texts by column, (S, E, *).  Errors: Unreadable."""
        known = self._placeholders(rows) if labels is None else list(labels)
        each = [
            self._of_fit(fit, draws, {**rows, "label": known}, show)
            for fit, draws in zip(self._fits, self.drawn, strict=True)
        ]
        return OfFits.of(each, [fit.program.log_scale.detach().exp() for fit in self._fits])

    def unreadable(self, rows: Rows) -> dict[int, str]:
        """Why, by the number of each text by column that is Unreadable: tried one by one, so where one is."""
        rows, found = {**rows, "label": self._placeholders(rows)}, {}
        for number in range(len(rows["label"])):
            try:
                for fit in self._fits:
                    self._encoded(fit, {name: [cells[number]] for name, cells in rows.items()})
            except Unreadable as error:
                found[number] = str(error)
        return found

    def _placeholders(self, rows: Rows) -> list[Any]:
        return [self.kind.placeholder(each) for each in zip(*(rows[name] for name in self.columns), strict=True)]

    def _encoded(self, fit: Source, rows: Rows) -> Rows:
        try:
            found = self.kind.encode(fit.tokenizer, rows, self.columns, fit.config.max_length)
        except ValueError as error:
            raise Unreadable(str(error)) from error
        return {"label": rows["label"], **found}

    def _of_fit(self, fit: Source, draws: dict[str, Any], rows: Rows, show: bool) -> Prediction:
        encoded = self._encoded(fit, rows)
        batches = longest_first(lengths_of(encoded), self.batch_size)
        collate, device = self.kind.collator(fit.tokenizer), fit.program.log_scale.device

        def each() -> Iterator[tuple[Inputs, Tensor]]:
            for batch in batches:
                yield split_labels(collate([{name: x[i] for name, x in encoded.items()} for i in batch]), device)

        if show and len(batches) >= _SHOWN_FROM:
            with phase("predicting", len(batches), unit="batches") as shown_as:
                found = fit.predict(shown_as.over(each()), **draws)
        else:
            found = fit.predict(each(), **draws)
        return found.restored(torch.tensor([i for batch in batches for i in batch]))

    # --- held-out rows ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _held_out(self) -> tuple[Tensor, Tensor]:
        """(averages (E, *), labels (E, *)), as in the run or predicted anew where something else is asked."""
        table = self.source.held_out()
        labels = torch.as_tensor(self.kind.laid_out(table["label"].tolist()))
        if self._as_run and "decision" in table:
            return self.kind.read(table), labels
        rows = columns_of(table, self.columns)
        return self.prediction(rows, table["label"].tolist(), show=True).mean, labels

    def _threshold(self, accuracy: float) -> float:
        found = threshold_for(*self._held_out, accuracy)
        self.remarks.append(
            f"with confidence {found.confidence:.4f} or more {found.answered:,} of {found.rows:,} held-out rows are "
            f"answered, with accuracy {found.accuracy:.3f} ± {found.error:.3f}"
        )
        return found.confidence

    def _calibrated(self, coverage: float) -> Conformal:
        """Sets of all held-out rows, after one half has been checked by the other."""
        mean, labels = self._held_out
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        one, other = order[: len(order) // 2], order[len(order) // 2 :]
        half = self.kind.conformal(mean[one], labels[one], coverage)
        found = half.check(mean[other], labels[other])
        error = (coverage * (1 - coverage) * (1 / len(one) + 1 / len(other))) ** 0.5
        self.remarks.append(
            f"sets for coverage {coverage:g}: calibrated on one half of the held-out rows, they hold the label in "
            f"{found.share:.3f} of the other {found.rows:,} (by chance ± {error:.3f}), {found.size:.2f} {half.unit} on "
            "average; those of the answers are calibrated on both"
        )
        return self.kind.conformal(mean, labels, coverage)


def columns_of(texts: Any, columns: tuple[str, ...]) -> dict[str, list[Any]]:
    """Texts by column, of whatever form they were given in.

    Errors: ValueError for a single string, no texts, columns that are missing, and a row that is no pair.
    """
    wanted = 'predict(["a good film"])' if len(columns) == 1 else 'predict([("one text", "another")])'
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise ValueError(f"texts must be a list, got {type(texts).__name__}: {wanted}")
    frame: Any = texts if hasattr(texts, "columns") else None
    rows = [] if frame is not None else list(texts)
    if not len(rows if frame is None else frame):
        raise ValueError(f"there are no texts to predict: {wanted}")
    if frame is not None:
        _require_columns(columns, [*map(str, frame.columns)], "the frame")
        return {name: [x.tolist() if isinstance(x, np.ndarray) else x for x in frame[name]] for name in columns}
    if isinstance(rows[0], Mapping):
        for number, row in enumerate(rows):
            _require_columns(columns, [*row] if isinstance(row, Mapping) else [], f"row {number} (from 0)")
        return {name: [row[name] for row in rows] for name in columns}
    if len(columns) == 1:
        return {columns[0]: rows}
    for number, row in enumerate(rows):
        if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != len(columns):
            raise ValueError(
                f"row {number} (from 0) must be {len(columns)} texts ({', '.join(columns)}), got {shown(row)}: {wanted}"
            )
    return dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))


def _require_columns(columns: Sequence[str], have: Sequence[str], where: str) -> None:
    for name in columns:
        if name not in have:
            raise ValueError(f"{where} has no column {name!r}: {suggest(name, have)}")
        if have.count(name) > 1:
            raise ValueError(f"{where} has {have.count(name)} columns {name!r}: rename or drop all but one")
