"""The section of whatever else a kind of outcome scores: tables that its summary carries."""

import pandas as pd

from ..run_folder import RunFiles, Section


def details(run: RunFiles, title: str) -> Section | None:
    tables = run.summary.get("tables")
    if not tables:
        return None
    return Section(title, tables=[(caption, pd.DataFrame(rows).round(4), True) for caption, rows in tables.items()])
