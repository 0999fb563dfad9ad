"""The section of whatever else a kind of outcome scores: tables that its summary carries."""

import pandas as pd

from ...registries import register_section
from ..run_folder import RunFiles, Section


@register_section("In detail", place=45)
def details(run: RunFiles, title: str) -> Section | None:
    """Tables that the kind of outcome adds to the summary."""
    tables = run.summary.get("tables")
    if not tables:
        return None
    return Section(title, tables=[(caption, pd.DataFrame(rows).round(4), True) for caption, rows in tables.items()])
