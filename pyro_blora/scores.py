"""Predictions into the numbers of a summary: the task's metric, and calibration with and without a temperature."""

from . import calibration
from .posterior import ECE_BINS, Prediction
from .tasks import Task


def scores_of(task: Task, prediction: Prediction) -> dict:
    """The metric's own numbers, the headline first, and calibration."""
    decision, labels = prediction.decision.tolist(), prediction.labels.tolist()
    scores = task.metric().compute(predictions=decision, references=labels)
    correct = None if task.is_regression else float((prediction.decision == prediction.labels).double().mean())
    found = prediction.calibration()
    return {
        "metric": {"name": task.metric_name, "value": scores[task.metric_name]},
        "scores": scores,
        "accuracy": correct,
        "nll": prediction.nll,
        "ece": {"value": found["ece"], "bins": ECE_BINS},
        "brier": found["brier"],
    }


def calibration_of(pairs: dict[str, tuple[Prediction, Prediction]]) -> dict:
    """Scores of the averaged predictions and of the deployed ones, by name; {} for regression.

    With split `validation` also `scaled`, at the temperature of least NLL there; with split `ood` also
    `out_of_distribution`.
    """
    if pairs["eval"][0].is_regression:
        return {}
    found = {}
    for which, name in enumerate(("averaged", "deployed")):
        prediction = pairs["eval"][which]
        found[name] = calibration.scores(prediction.outputs, prediction.labels)
        if "validation" in pairs:
            held_out = pairs["validation"][which]
            temperature = calibration.fit_temperature(held_out.mean, held_out.labels)
            scaled = calibration.at_temperature(prediction.mean, temperature)[None]
            found[name]["temperature"] = temperature
            found[name]["scaled"] = calibration.scores(scaled, prediction.labels)
        if "ood" in pairs:
            inside, outside = prediction.outputs, pairs["ood"][which].outputs
            found[name]["out_of_distribution"] = calibration.out_of_distribution(inside, outside)
    return found
