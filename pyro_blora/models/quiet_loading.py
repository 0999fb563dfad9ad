"""transformers without its progress bars and tables, while what it reports is read."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers, and not its table of what is new: its caller reads what is reported."""
    from transformers.utils import logging as talk

    bars = talk.is_progress_bar_enabled()
    level = talk.get_verbosity()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(level)
        if bars:
            talk.enable_progress_bar()
