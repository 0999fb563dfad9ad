"""The section in plain words, with the warnings."""

from ...registries import register_section
from ..run_folder import RunFiles, Section
from ..warnings import in_words, warnings


@register_section("In plain words", place=10)
def plain_words(run: RunFiles, title: str) -> Section:
    """What the run shows in a few sentences, and reliability warnings."""
    try:
        posterior = run.posterior
    except ValueError as error:
        return Section(title, in_words(run.summary), [*warnings(run.summary, None), str(error)])
    return Section(title, in_words(run.summary), warnings(run.summary, posterior))
