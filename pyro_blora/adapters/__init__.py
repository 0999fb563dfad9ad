"""Gated, quantized low-rank adapters inside a Hugging Face backbone."""

from ..registries import ADAPTERS, register_adapter
from .adalora import AdaLoRAModel
from .attaching import attach
from .gate_context import Observer
from .gated_model import GatedModel, exact_tensors, gates, observed, open_gates, use_gates, without_dropout
from .lora import gated
from .ranges import calibrate, clipped, set_ranges, start_smoothing

__all__ = [
    "ADAPTERS",
    "AdaLoRAModel",
    "GatedModel",
    "Observer",
    "attach",
    "calibrate",
    "clipped",
    "exact_tensors",
    "gated",
    "gates",
    "observed",
    "open_gates",
    "register_adapter",
    "set_ranges",
    "start_smoothing",
    "use_gates",
    "without_dropout",
]
