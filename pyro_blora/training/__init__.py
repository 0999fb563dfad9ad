"""Stochastic variational inference of gates and adapters, from the first batch to the best epoch."""

from ..lazily import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "Schedule": "schedule",
        "Trained": "loop",
        "fit": "loop",
        "make_optimizer": "optimizer",
    },
)
