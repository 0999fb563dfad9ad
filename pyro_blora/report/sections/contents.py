"""The sections of a run's report, in order.

Every section is a function of `RunFiles` and its title; where what it needs is missing or damaged it raises ValueError
with a sentence, which the page shows in its place.
"""

import json
from collections.abc import Callable

from ..glossary import glossary
from ..run_folder import RunFiles, Section
from .bit_operations import bit_operations
from .calibration import calibration
from .confidently_wrong import confidently_wrong
from .details import details
from .gates import gate_map, ranks
from .plain_words import plain_words
from .repeat import repeat
from .restarts import restarts
from .training import training


def sections_of(run: RunFiles) -> list[Section]:
    """All sections in order but those that mean nothing for the run's outcome; one that cannot be made says why."""
    found = []
    for title, make in _SECTIONS.items():
        try:
            section = None if title in run.left_out else make(run, title)
            if section is None:
                continue
            json.dumps([spec for spec, _ in section.charts], allow_nan=False)  # a chart of something else is none
            found.append(section)
        except Exception as error:  # whatever pandas, Altair and we make of files that somebody has edited
            said = f"This run's files have something else where this is kept ({type(error).__name__}: {error})."
            said = f"This run's files lack {error}." if isinstance(error, KeyError) else said
            found.append(Section(title, missing=str(error) if isinstance(error, ValueError) else said))
    return found


def _glossary(run: RunFiles, title: str) -> Section:
    return glossary(run.folder, title)


_SECTIONS: dict[str, Callable[[RunFiles, str], Section | None]] = {
    "In plain words": plain_words,
    "Gate map": gate_map,
    "Ranks": ranks,
    "Calibration": calibration,
    "In detail": details,
    "Bit operations": bit_operations,
    "Training": training,
    "Restarts": restarts,
    "Confidently wrong": confidently_wrong,
    "Repeat this run": repeat,
    "Glossary": _glossary,
}
