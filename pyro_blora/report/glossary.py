"""The words of a report, each explained in a sentence or two."""

from pathlib import Path

import pandas as pd

from ..interval import PERCENT
from .run_folder import Section, docs_link

GLOSSARY = {
    "adapted, model": (
        "The two denominators of bit operations. adapted: the projections with adapters, at 32 x 32 bit with "
        "all ranks. model: every matrix product of one forward, at 32 x 32 bit."
    ),
    "averaged, deployed": (
        "Predictions averaged over draws of everything that is random, and those of the one allocation that is "
        "exported, in which every gate takes its more probable side."
    ),
    "BOPs, E[BOPs]": (
        "Bit operations of one forward: multiplications times the bits of both factors. E[BOPs] is their mean "
        f"under the posterior, its interval is central, {PERCENT}."
    ),
    "constant answer": (
        "The one answer for every example that scores best, seen with hindsight; for the NLL, the label "
        "frequencies as probabilities. A score that does not beat it shows nothing."
    ),
    "chance (of an ECE)": (
        "The ECE that perfectly calibrated predictions have with as many examples: mean, and the value that 95 % "
        "stay below. Labels are drawn from the predictions themselves."
    ),
    "ECE": (
        "Expected calibration error: the mean distance between confidence and accuracy, in equal bins of confidence."
    ),
    "gate, ladder": (
        "A gate is open or closed. Gates of one tensor form a ladder of bit widths (2, 4, 8, 16, 32 unless told), "
        "those of one adapter a ladder of ranks; a gate can only be open where the one below it is."
    ),
    "KL to prior": (
        "How far the posterior of a ladder moved from its prior, in nats. Near 0 the data had no influence."
    ),
    "NLL": ("Negative log-likelihood of the labels, nats per example; lower is better."),
    "Pareto k": ("Shape of the tail of importance weights. Above 0.7 they cannot be trusted."),
    "R-hat": ("Spread between restarts against the spread within each. 1 where they agree."),
    "Shapley value": ("What closing a gate saves, averaged over the orders in which the gates could have been closed."),
    "± (standard error)": (
        "What another sample of as many held-out examples would change; not what another seed would."
    ),
    "temperature": (
        "One number that divides the logits, fitted on rows held out of training: the simplest calibration."
    ),
}


def glossary(folder: Path, title: str = "Glossary") -> Section:
    """The glossary of a page in that folder, with a link to the tutorial."""
    table = pd.DataFrame({"word": list(GLOSSARY), "meaning": list(GLOSSARY.values())})
    link = docs_link(folder)
    elsewhere = "`docs/tutorial/reading-the-posterior.md` of the project explains a whole page, section by section."
    text = [] if link else [elsewhere]
    return Section(title, text, links=[link] if link else [], tables=[("What the words mean", table, False)])
