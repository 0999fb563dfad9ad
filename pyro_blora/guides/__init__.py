"""Variational families of the gates, by name."""

from . import fixed_rank  # noqa: F401 (its registrations)
from .base import GUIDES, build_guide, components, draw_gates, log_prob, register_guide
from .mean_field import MeanField, Point
from .mixture import Mixture

__all__ = [
    "GUIDES",
    "MeanField",
    "Mixture",
    "Point",
    "build_guide",
    "components",
    "draw_gates",
    "log_prob",
    "register_guide",
]
