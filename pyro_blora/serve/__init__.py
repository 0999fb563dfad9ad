"""A model over HTTP: a queue whose texts share forward passes, limits, metrics, and a page to try it."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .app import app_of as app_of
    from .desk import Desk as Desk
    from .server import serve as serve
else:
    __getattr__, __dir__, __all__ = lazily(__name__, __file__)
