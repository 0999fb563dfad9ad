"""The section of the wrong answers that were the most confident."""

from ...registries import register_section
from ...tasks.columns import least_expected
from ..run_folder import RunFiles, Section

_ROWS = 10  # of the examples that are named


@register_section("Confidently wrong", place=80)
def confidently_wrong(run: RunFiles, title: str) -> Section:
    """The wrong answers that were the most confident."""
    worst = least_expected if run.likelihood is None else run.likelihood.worst
    sentence, table = worst(run.predictions, _ROWS)
    return Section(title, [sentence], tables=[("", table, True)])
