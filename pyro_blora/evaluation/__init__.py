"""Scores of a trained program, what they are compared with, and the summary of a run."""

from ..lazily import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "Evaluated": "evaluating",
        "evaluate": "evaluating",
        "predicted": "evaluating",
        "scores_of": "metrics",
        "summarize": "summary",
    },
)
