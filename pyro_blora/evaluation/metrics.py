"""Predictions into the numbers of a summary: the task's metric, and calibration with and without a temperature."""

from ..posterior import calibration
from ..posterior.prediction import ECE_BINS, Prediction
from ..tasks import Task
from . import baselines


def scores_of(task: Task, prediction: Prediction) -> dict:
    """The metric's own numbers, the headline first, calibration, and what every score is read beside (`baselines`).

    `beside` has constant, standard_error and gain_error by score; of `ece` what calibrated predictions have by chance.
    """
    decision, labels, metric, kind = prediction.decision, prediction.labels, task.metric(), prediction.likelihood
    scores = metric.compute(predictions=decision.tolist(), references=labels.tolist())
    found = prediction.calibration()
    mean = prediction.mean if kind.has_confidence else None
    beside: dict[str, dict] = baselines.beside(
        scores, decision.numpy(), labels.numpy(), prediction.log_score.numpy(), kind=kind,
        probabilities=None if mean is None else mean.numpy(), compute=metric.compute,
    )  # fmt: skip
    if mean is not None:
        beside["ece"] = {"chance": calibration.chance_level(mean, ECE_BINS)}
    return {
        "metric": {"name": task.metric_name, "value": scores[task.metric_name]},
        "scores": scores,
        "accuracy": kind.right(decision, labels),
        "nll": prediction.nll,
        "ece": {"value": found["ece"], "bins": ECE_BINS},
        "brier": found["brier"],
        "beside": beside,
        "constant_answer": kind.constant,
        **({} if kind.has_confidence else {"no_confidence": kind.no_confidence}),
        **kind.details(prediction.mean, labels),
    }


def deployed_scores(task: Task, averaged: Prediction, at_mode: Prediction) -> dict:
    """`scores_of` what is deployed, and the standard error of its metric's difference from the averaged one."""
    labels, one, other = (x.numpy() for x in (averaged.labels, averaged.decision, at_mode.decision))
    found, name = scores_of(task, at_mode), task.metric_name
    value = found["metric"]["value"]
    error = baselines.difference_error(name, labels, one, other, averaged.likelihood, value=value)
    return {**found, "difference_error": error}


def calibration_of(pairs: dict[str, tuple[Prediction, Prediction]]) -> dict:
    """Scores of the averaged predictions and of the deployed ones, by name; {} without one confidence each.

    With split `validation` also `scaled`, at the temperature of least NLL there; with split `ood` also
    `out_of_distribution`.
    """
    if not pairs["eval"][0].likelihood.has_confidence:
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
            found[name]["out_of_distribution"] = apart = calibration.out_of_distribution(inside, outside)
            counts = outside.shape[1], inside.shape[1]
            found[name]["errors"]["out_of_distribution"] = {
                key: calibration.auroc_error(value, *counts) for key, value in apart.items()
            }
    return found
