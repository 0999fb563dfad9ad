"""Scores in words: with their standard errors, beside the best constant answer, and beside chance.

All from a summary (or its part `deployed`), whose `beside` older versions lack: then a score stands alone.
"""

from ..posterior.calibration import CHANCE
from .baselines import NOISE, gain


def plus_minus(value: float, error: float | None, digits: int = 4) -> str:
    """A score with its standard error, where that is known."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def beside(scores: dict, name: str, what: str = "standard_error") -> float | None:
    """What a score is read beside; None in summaries of older versions."""
    return scores.get("beside", {}).get(name, {}).get(what)


def ece_by_chance(scores: dict) -> dict[str, float] | None:
    """`mean` and `high` of the ECE that calibrated predictions have by chance; None where that is not known."""
    return scores.get("beside", {}).get("ece", {}).get("chance")


def of_score(scores: dict, name: str, digits: int = 4) -> str:
    """`0.8452 ± 0.0123`: a summary's metric, or its `nll`."""
    return plus_minus(_value(scores, name), beside(scores, name), digits)


def _value(scores: dict, name: str) -> float:
    value: float = scores[name] if name in ("nll", "brier") else scores["metric"]["value"]
    return value


def is_better(scores: dict, name: str) -> bool | None:
    """Whether a score beats the constant answer by more than noise; None where that is not known."""
    constant, error = beside(scores, name, "constant"), beside(scores, name, "gain_error")
    if constant is None or error is None:
        return None
    return gain(name, _value(scores, name), constant) > NOISE * error


def nothing_learned(summary: dict) -> str | None:
    """A sentence where the metric is not better than the best constant answer, beyond the noise of the examples."""
    name = summary["metric"]["name"]
    if is_better(summary, name) is not False:
        return None
    against = (
        f"{name} is {of_score(summary, name, 3)}, and one answer for every example has "
        f"{beside(summary, name, 'constant'):.3f}"
    )
    if is_better(summary, "nll"):
        return (
            f"Decisions are not better than a constant answer: {against}. Probabilities are: the NLL is "
            f"{summary['nll']:.3f}, that of the label frequencies {beside(summary, 'nll', 'constant'):.3f}."
        )
    return f"Nothing was learned: {against}. Train longer, on more rows or at another --lr before reading on."


def of_chance(scores: dict) -> str | None:
    """How an ECE compares with what calibrated predictions have by chance; None where that is not known."""
    chance = ece_by_chance(scores)
    if chance is None:
        return None
    verdict = "no evidence of" if scores["ece"]["value"] <= chance["high"] else "more than chance, so evidence of"
    return (
        f"perfectly calibrated predictions have {chance['mean']:.3f} by chance, and below {chance['high']:.3f} in "
        f"{CHANCE:.0%} of the cases: {verdict} miscalibration"
    )
