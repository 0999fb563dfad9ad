"""A trained adapter out, as PEFT reads it, and a run folder in."""

from .loading import load
from .peft import export, plain_backbone, require_exportable

__all__ = ["export", "load", "plain_backbone", "require_exportable"]
