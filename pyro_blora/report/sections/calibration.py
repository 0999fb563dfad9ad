"""The section of a report on calibration: reliability, and scores of averaged, deployed and scaled predictions."""

import numpy as np
import pandas as pd

from ...evaluation.verdicts import beside, of_chance, of_score, plus_minus
from ...interval import INTERVAL, PERCENT
from ...registries import register_section
from .. import charts
from ..run_folder import RunFiles, Section
from ..warnings import is_over_draws

_LINES = {  # of the table of calibration
    "NLL": "nll", "Brier score": "brier", "ECE, 15 bins": "ece_15", "ECE, 20 bins": "ece_20",
    "ECE, bins of equal counts": "ece_adaptive", "predictive entropy": "entropy",
    "mutual information": "mutual_information", "AUROC of its errors by entropy": "auroc_of_errors",
}  # fmt: skip


def reliability_bins(run: RunFiles) -> pd.DataFrame:
    """Accuracy and confidence in equal bins of confidence, those of ECE, with Jeffreys intervals of the accuracy."""
    from scipy.stats import beta

    probabilities = run.probabilities.to_numpy()
    bins = run.summary["ece"]["bins"]
    confidence, right = probabilities.max(1), (run.predictions["decision"] == run.predictions["label"]).to_numpy()
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    lines = []
    for i in np.unique(index):
        mine = index == i
        n, hits = int(mine.sum()), int(right[mine].sum())
        low, high = beta.ppf(INTERVAL, hits + 0.5, n - hits + 0.5)
        lines.append({
            "bin": f"{i / bins:.2f} to {(i + 1) / bins:.2f}", "confidence": confidence[mine].mean(),
            "accuracy": hits / n, "low": low, "high": high, "examples": n,
        })  # fmt: skip
    return pd.DataFrame(lines)


@register_section("Calibration", place=40)
def calibration(run: RunFiles, title: str) -> Section:
    """Reliability, and scores of averaged, deployed and temperature-scaled predictions."""
    bins = reliability_bins(run)
    gap = (bins["examples"] * (bins["accuracy"] - bins["confidence"]).abs()).sum() / bins["examples"].sum()
    chance = of_chance(run.summary)
    text = [
        f"Points below the diagonal: overconfident. ECE {gap:.4f} is the mean distance from it, weighted by examples."
        + (f" For comparison, {chance}." if chance else ""),
        f"The Brier score is {of_score(run.summary, 'brier')}.",
    ]
    made = [
        (
            charts.reliability(bins),
            f"A point is a bin, as large as its share of the examples. Bars: {PERCENT} intervals.",
        )
    ]
    tables = [("The bins as a table", bins.round(4), False)]
    if found := run.summary.get("calibration"):  # older runs have none
        caption = f"Averaged: {run.summary['averaging']}." if is_over_draws(run.summary) else ""
        if any("scaled" in scores for scores in found.values()):
            caption += " Scaled: at the temperature of least NLL on rows held out of training."
        tables.insert(0, (caption.strip(), calibration_table(found, run.summary), True))
    return Section(title, text, charts=made, tables=tables)


def calibration_table(found: dict, summary: dict) -> pd.DataFrame:
    """Averaged and deployed predictions, both at their temperatures, and the constant answer, as columns of text.

    Scores have standard errors, calibration errors the chance level of the averaged predictions.
    """
    columns = {}
    for name, scores in found.items():
        columns[name] = _column({key: value for key, value in scores.items() if key != "temperature"})
        if "scaled" in scores:
            columns[f"{name}, scaled"] = _column(scores["scaled"] | {"temperature": scores["temperature"]})
    constants = {name: beside(summary, key, "constant") for name, key in (("NLL", "nll"), ("Brier score", "brier"))}
    if None not in constants.values():
        columns["constant answer"] = {name: f"{value:.4f}" for name, value in constants.items()}
    chance = found["averaged"].get("chance")  # older runs have none
    if chance:
        columns["by chance, 95 %"] = {
            name: f"{chance[key]['mean']:.4f}, {chance[key]['high']:.4f}"
            for name, key in _LINES.items() if key in chance
        }  # fmt: skip
    lines = dict.fromkeys(line for column in columns.values() for line in column)
    table = pd.DataFrame({name: {line: column.get(line, "") for line in lines} for name, column in columns.items()})
    return table.rename_axis("").reset_index()


def _column(scores: dict) -> dict[str, str]:
    errors = scores.get("errors", {})
    column = {line: _cell(scores[key], errors.get(key)) for line, key in _LINES.items()}
    if "temperature" in scores:
        column["temperature"] = f"{scores['temperature']:.4f}"
    for share, value in scores["selective_accuracy"].items():
        error = errors.get("selective_accuracy", {}).get(share)
        column[f"accuracy on the most confident {float(share):.0%}"] = _cell(value, error)
    for name, value in scores.get("out_of_distribution", {}).items():
        error = errors.get("out_of_distribution", {}).get(name)
        column[f"AUROC of other sentences by {name.replace('_', ' ')}"] = _cell(value, error)
    return column


def _cell(value: float | None, error: float | None) -> str:
    return "-" if value is None else plus_minus(value, error)
