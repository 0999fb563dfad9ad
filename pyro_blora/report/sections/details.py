"""The section of whatever else a kind of outcome scores: tables that its summary carries."""

import pandas as pd

from ...registries import register_section
from ..run_folder import RunFiles, Section

_OPEN = 20  # rows of a table that is shown at once; a longer one opens on a click


@register_section("In detail", place=45)
def details(run: RunFiles, title: str) -> Section | None:
    """Tables that the kind of outcome adds to the summary."""
    tables = run.summary.get("tables")
    if not tables:
        return None
    shown = [(caption, pd.DataFrame(rows).round(4), len(rows) <= _OPEN) for caption, rows in tables.items()]
    return Section(title, tables=shown)
