"""The section in plain words, with the warnings."""

from ..run_folder import RunFiles, Section
from ..warnings import in_words, warnings


def plain_words(run: RunFiles, title: str) -> Section:
    try:
        posterior = run.posterior
    except ValueError as error:
        return Section(title, in_words(run.summary), [*warnings(run.summary, None), str(error)])
    return Section(title, in_words(run.summary), warnings(run.summary, posterior))
