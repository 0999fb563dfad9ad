"""The section of all scores, and of whatever else a kind of outcome scores: tables that its summary carries."""

import pandas as pd

from ...evaluation.verdicts import beside, plus_minus
from ...registries import register_section
from ..run_folder import RunFiles, Section

_SCORES = "Scores of the averaged predictions, on the rows to validate on"
_OPEN = 20  # rows of a table that is shown at once; a longer one opens on a click


@register_section("In detail", place=45)
def details(run: RunFiles, title: str) -> Section | None:
    """Every score beside that of the best constant answer, and tables that the kind of outcome adds to the summary."""
    summary, tables = run.summary, run.summary.get("tables", {})
    scores = {**summary.get("scores", {}), "nll": summary["nll"]}
    if len(scores) > 2:  # the page's first line has one
        tables = {_SCORES: [_beside(summary, name, value) for name, value in scores.items()], **tables}
    if not tables:
        return None
    shown = [(caption, pd.DataFrame(rows).round(4), len(rows) <= _OPEN) for caption, rows in tables.items()]
    return Section(title, tables=shown)


def _beside(summary: dict, name: str, value: float) -> dict[str, str]:
    constant = beside(summary, name, "constant")
    shown = "" if constant is None else f"{constant:.4f}"
    return {"score": name, "value": plus_minus(value, beside(summary, name)), "constant answer": shown}
