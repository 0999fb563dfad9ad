"""Priors of the gates, by name."""

from ..registries import PRIORS, register_prior
from .base import Prior
from .budget import Budget
from .explained_variance import ExplainedVariance
from .hierarchical import Hierarchical
from .per_site import Separate, build_prior, parts

__all__ = [
    "PRIORS",
    "Budget",
    "ExplainedVariance",
    "Hierarchical",
    "Prior",
    "Separate",
    "build_prior",
    "parts",
    "register_prior",
]
