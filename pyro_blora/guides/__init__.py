"""Variational families of the gates, by name."""

from ..registries import GUIDES, register_guide
from .base import Guide, build_guide, components, draw_gates, log_prob
from .mean_field import MeanField, Point
from .mixture import Mixture

__all__ = [
    "GUIDES",
    "Guide",
    "MeanField",
    "Mixture",
    "Point",
    "build_guide",
    "components",
    "draw_gates",
    "log_prob",
    "register_guide",
]
