"""Fake quantization: the grids of a bit ladder, and a tensor rounded to a mixture of them, in PyTorch, C and Triton."""

from ..bit_widths import LADDER
from .fake_quantize import kernels, quantize, quantize_mixture, quantize_on
from .grid import Grid, Rows, grids, grids_of_rows, integer_codes, mixture_weights, rounded, squared_errors

__all__ = [
    "LADDER",
    "Grid",
    "Rows",
    "grids",
    "grids_of_rows",
    "integer_codes",
    "kernels",
    "mixture_weights",
    "quantize",
    "quantize_mixture",
    "quantize_on",
    "rounded",
    "squared_errors",
]
