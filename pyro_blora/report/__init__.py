"""A run folder or a grid as a page, and as lines in a terminal."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .cards import headline as headline
    from .page import render as render
    from .page import write_report as write_report
    from .run_folder import Link as Link
    from .run_folder import RunFiles as RunFiles
    from .run_folder import Section as Section
    from .sections.contents import sections_of as sections_of
    from .terminal import show_run as show_run
else:
    __getattr__, __dir__, __all__ = lazily(__name__, __file__)
