"""A run's configuration: its fields, methods, presets and command line. Imports no torch."""

from .command_line import load_preset, preset_names, run_fields, take_settings
from .fields import RANGES
from .methods import METHODS
from .naming import NOT_IN_DIGEST
from .run_config import OWNERS, PRESETS, RunConfig, field_names

__all__ = [
    "METHODS",
    "NOT_IN_DIGEST",
    "OWNERS",
    "PRESETS",
    "RANGES",
    "RunConfig",
    "field_names",
    "load_preset",
    "preset_names",
    "run_fields",
    "take_settings",
]
