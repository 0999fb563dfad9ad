"""Distributions of the adapter's weights, by name."""

from ..registries import WEIGHTS, register_weights
from .base import Parameters, Point, RandomWeights, Weights, build_weights
from .gaussian import Gaussian, LowRank
from .laplace import Laplace
from .swag import Swag

__all__ = [
    "WEIGHTS",
    "Gaussian",
    "Laplace",
    "LowRank",
    "Parameters",
    "Point",
    "RandomWeights",
    "Swag",
    "Weights",
    "build_weights",
    "register_weights",
]
