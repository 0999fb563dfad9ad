"""The section that explains the words of the page."""

from ...registries import register_section
from ..glossary import glossary
from ..run_folder import RunFiles, Section


@register_section("Glossary", place=110)
def words(run: RunFiles, title: str) -> Section:
    """Every term of the page in a sentence or two."""
    return glossary(run.folder, title)
