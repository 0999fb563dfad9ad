"""Priors of the gates, by name."""

from . import static  # noqa: F401 (its registrations)
from .base import PRIORS, register_prior
from .budget import Budget
from .explained_variance import ExplainedVariance
from .hierarchical import Hierarchical
from .per_site import Separate, build_prior, parts

__all__ = [
    "PRIORS",
    "Budget",
    "ExplainedVariance",
    "Hierarchical",
    "Separate",
    "build_prior",
    "parts",
    "register_prior",
]
