"""The sections of a run's report, in order.

Every section is a function `(run, title) -> Section` under `@register_section("Title", place=NUMBER)`, in a file of
this folder or of a user's (`file.py:function`); sections stand in the order of their places. Where what a section needs
is missing or damaged it raises ValueError with a sentence, which the page shows in its place.
"""

import json
from collections.abc import Callable, Iterable

from ...registries import SECTIONS
from ..run_folder import RunFiles, Section


def sections_of(run: RunFiles, more: Iterable[str] = ()) -> list[Section]:
    """All sections in order but those that mean nothing for the run's outcome; a section that fails shows the reason.

    more: functions in files, `file.py:function`.   Errors: ValueError for one of these that cannot be found.
    """
    found = []
    for title, make in contents(more):
        try:
            section = None if title in run.left_out else make(run, title)
            if section is None:
                continue
            json.dumps([spec for spec, _ in section.charts], allow_nan=False)  # a chart of something else is none
            found.append(section)
        except Exception as error:  # any error of pandas, Altair or this package on an edited file
            reason = f"This run's files have something else where this is kept ({type(error).__name__}: {error})."
            reason = f"This run's files lack {error}." if isinstance(error, KeyError) else reason
            found.append(Section(title, missing=str(error) if isinstance(error, ValueError) else reason))
    return found


def contents(more: Iterable[str] = ()) -> list[tuple[str, Callable[[RunFiles, str], Section]]]:
    """The titles and functions of all sections, in order."""
    for make in map(SECTIONS.resolve, more):
        if make not in map(SECTIONS.resolve, SECTIONS.names()):  # with the decorator it is registered already
            SECTIONS.register(make.__name__.replace("_", " ").capitalize())(make)
    return [(entry.name, SECTIONS.resolve(entry.name)) for entry in SECTIONS.entries()]
