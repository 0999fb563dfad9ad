"""Scores of a trained program, what they are compared with, and the summary of a run."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .evaluating import Evaluated as Evaluated
    from .evaluating import evaluate as evaluate
    from .evaluating import predicted as predicted
    from .metrics import scores_of as scores_of
    from .summary import summarize as summarize
else:
    __getattr__, __dir__, __all__ = lazily(__name__, __file__)
