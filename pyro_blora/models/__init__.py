"""Hugging Face models: what they are made of, their costs, and how a backbone and its tokenizer are loaded."""

from .architectures import head_modules
from .attention import set_attention
from .layout import layout_of
from .loading import backbone_path, commit_of, load_backbone, load_tokenizer, public_name
from .targets import TARGETS

__all__ = [
    "TARGETS",
    "backbone_path",
    "commit_of",
    "head_modules",
    "layout_of",
    "load_backbone",
    "load_tokenizer",
    "public_name",
    "set_attention",
]
