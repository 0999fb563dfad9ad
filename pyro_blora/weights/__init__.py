"""Distributions of the adapter's weights, by name."""

from ..registries import WEIGHTS, register_weights
from .base import Head, Parameters, Point, RandomWeights, Weights, build_weights
from .gaussian import Gaussian, LowRank
from .laplace import Laplace
from .swag import Swag

__all__ = [
    "WEIGHTS",
    "Gaussian",
    "Head",
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
