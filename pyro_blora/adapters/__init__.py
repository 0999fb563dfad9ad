"""Gated, quantized low-rank adapters inside a Hugging Face backbone."""

from .adalora import attach_adalora
from .attaching import ADAPTERS, attach
from .gate_context import Observer
from .gated_model import GatedModel, exact_tensors, gates, observed, open_gates
from .ranges import calibrate, clipped, set_ranges

__all__ = [
    "ADAPTERS",
    "GatedModel",
    "Observer",
    "attach",
    "attach_adalora",
    "calibrate",
    "clipped",
    "exact_tensors",
    "gates",
    "observed",
    "open_gates",
    "set_ranges",
]
