"""A trained adapter out, as PEFT reads it; a run folder in, and predictions on new texts."""

from .answering import Answers
from .loaded_model import Model
from .loading import load
from .peft import export, plain_backbone, require_exportable

__all__ = ["Answers", "Model", "export", "load", "plain_backbone", "require_exportable"]
