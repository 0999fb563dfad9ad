"""What `load` returns: a program that predicts on texts.

model = load("runs/...")
table = model.predict(["a good film", "a dull one"])
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config.run_config import RunConfig
from ..files import require_whole
from ..program import BayesianLoRA
from .answering import Answers, Source

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

PREDICTIONS = "predictions.parquet"  # of the held-out rows of a run


class Model(BayesianLoRA):
    """The program of a folder, which predicts on texts."""

    config: RunConfig
    _adapter: Path
    _run: Path | None
    _others: Callable[[], tuple[Source, ...]]

    def is_of(
        self, config: RunConfig, adapter: Path, run: Path | None, others: Callable[[], tuple[Source, ...]]
    ) -> None:
        """adapter: the folder of the exported files; run: that of the run, where there is one. others: as in Source."""
        self.config, self._adapter, self._run, self._others = config, adapter, run, others

    def predict(
        self, texts: Any, *, draws: int | None = None, deployed: bool = False, batch_size: int | None = None,
        abstain: float | None = None, coverage: float | None = None, seed: int | None = None,
        confidence: float | None = None,
    ) -> pd.DataFrame:  # fmt: skip
        """A table with a row for each text, averaged over draws.

        texts: a list of strings; for pairs of lists of two strings, for labels of words of lists of words; or a pandas
        frame, or a list of dicts, with the columns `text_columns`.
        draws: of gates and random weights; None: as many as in the run. deployed: the one allocation that is exported,
        in place of draws. batch_size: texts in a forward; None: twice the run's. seed: of the draws; None: the run's,
        which gives the held-out rows the predictions that they have in the run.
        abstain: the accuracy that answered texts should have, by the run's held-out rows: `answered` says which are.
        confidence: in its place, the probability from which a text is answered.
        coverage: the share of new texts whose set should hold the label, calibrated on these rows.

        Columns, of classes: label, confidence (its probability), entropy and mutual_information (nats: all uncertainty
        of the label, and that by the draws), answered, set (names), p_NAME. Of numbers, in the label's units: mean,
        std_over_draws (of the mean), std (of a label), low and high (94 %), set_low and set_high. Of several labels:
        labels (those that are on), probability_NAME. Of words: labels, probability_NAME, a list each.
        Errors: ValueError for what is no text, with its number; for an accuracy or a coverage that cannot be reached.
        """
        return self.answers(
            draws=draws, deployed=deployed, batch_size=batch_size, abstain=abstain, coverage=coverage, seed=seed,
            confidence=confidence,
        )(texts)  # fmt: skip

    def answers(self, **options: Any) -> Answers:
        """The same in two steps, for many tables: `answers = model.answers(coverage=0.9)`, `answers(texts)`."""
        return Answers(self.source, **options)

    @property
    def run(self) -> Path | None:
        """The folder of its run; None of one that was exported without it."""
        return self._run

    @functools.cached_property
    def source(self) -> Source:
        others = self._others()
        for other in others:
            other.program.to(self.log_scale.device)
        return Source(self, self.config, self._tokenizer(), self._held_out, others)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        """What `to`, `cuda` and the like do to every tensor; the other fits of an ensemble follow."""
        super()._apply(fn, recurse)
        for other in self.source.others if "source" in vars(self) else ():
            other.program._apply(fn, recurse)
        return self

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        if not any(self._adapter.glob("tokenizer*")):
            raise ValueError(
                f"{self._adapter} has no tokenizer: export it with export(program, folder, config=..., tokenizer=...)"
            )
        return AutoTokenizer.from_pretrained(str(self._adapter), trust_remote_code=False)

    def _held_out(self) -> pd.DataFrame:
        import pandas as pd

        if self._run is None or not (self._run / PREDICTIONS).is_file():
            raise ValueError(
                f"{self._run or self._adapter} has no held-out rows ({PREDICTIONS}), which abstain and coverage are "
                "calibrated on: load the folder of a run"
            )
        require_whole(self._run, [PREDICTIONS])
        return pd.read_parquet(self._run / PREDICTIONS)
