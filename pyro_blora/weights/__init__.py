"""Distributions of the adapter's weights, by name."""

from .base import WEIGHTS, Parameters, Point, RandomWeights, build_weights, register_weights
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
    "build_weights",
    "register_weights",
]
