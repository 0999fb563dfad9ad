"""The section of what was found in the rows before the training."""

import pandas as pd

from ...registries import register_section
from ..run_folder import RunFiles, Section

_OPEN = 20  # rows of a table that is shown at once; a longer one opens on a click


@register_section("Data", place=15)
def data(run: RunFiles, title: str) -> Section | None:
    """How the rows were read, classes, duplicates, doubtful labels, cut texts."""
    found = run.summary.get("data")
    if not found:
        return None
    tables = [
        (caption, pd.DataFrame(rows).round(4), len(rows) <= _OPEN) for caption, rows in found.get("tables", {}).items()
    ]
    return Section(title, ["; ".join(found["sentences"]) + "."], found["warnings"], tables=tables)
