"""Hugging Face models: what they are made of, their costs, and how a backbone and its tokenizer are loaded."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .architectures import head_modules as head_modules
    from .layout import layout_of as layout_of
    from .loading import load_backbone as load_backbone
    from .loading import load_tokenizer as load_tokenizer
    from .names import backbone_path as backbone_path
    from .names import commit_of as commit_of
    from .names import public_name as public_name
    from .targets import TARGETS as TARGETS
else:
    __getattr__, __dir__, __all__ = lazily(__name__, __file__)
