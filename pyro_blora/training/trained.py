"""What `fit` returns."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..build import Parts
from ..deploy.answering import Answers, Source
from ..program import BayesianLoRA

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Trained:
    """The parts with a trained program, the logged lines, and the seconds that training took."""

    parts: Parts
    metrics: list[dict]
    seconds: float

    @property
    def program(self) -> BayesianLoRA:
        return self.parts.program

    def predict(self, texts: Any, **options: Any) -> pd.DataFrame:
        """A table with a row for each text: texts and options as in `deploy.Model.predict`, which `load` gives."""
        return self.answers(**options)(texts)

    def answers(self, **options: Any) -> Answers:
        """The same in two steps, for many tables."""
        parts = self.parts
        return Answers(Source(self.program, parts.config, parts.tokenizer, parts.rows["eval"].to_pandas), **options)
