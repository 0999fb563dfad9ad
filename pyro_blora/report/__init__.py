"""A run folder or a grid as a page, and as lines in a terminal."""

from ..lazily import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "Link": "run_folder",
        "RunFiles": "run_folder",
        "Section": "run_folder",
        "headline": "cards",
        "render": "page",
        "sections_of": "sections.contents",
        "show_run": "terminal",
        "write_report": "page",
    },
)
