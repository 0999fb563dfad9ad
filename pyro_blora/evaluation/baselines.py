"""What a score is read beside: the best constant answer, a standard error, and the error of their difference.

Numbers of one set of predictions, from their decisions and labels alone. Standard errors are over examples: of means
from their spread, of other scores from a bootstrap; that of an accuracy is Jeffreys', which is not 0 where no example
was wrong; a bootstrap has none there, and of one example. Differences are paired by example.
Shapes: E examples, B resamples, U different pairs of label and decisions, C classes.   Units: the score's; nats (NLL).
Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993); Brown, Cai and DasGupta (2001) for Jeffreys.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from ..posterior.calibration import share_error
from ..tasks.likelihoods import Likelihood
from .weighted_scores import as_scored, known_scores, weighted_score

NOISE = 2.0  # standard errors, within which a difference is noise
_RESAMPLES = 1000
_CALLS = 50  # of a metric that is not known here, which may be slow; the error is then known to a tenth
_KEYS = ("constant", "standard_error", "gain_error")
ERRORS = ("nll", "brier", "rmse", "mse", "mae", "mape", "smape", "wer", "cer", "ter", "perplexity")  # less is better
_AT_ONCE = 4_000_000  # numbers of a block of resamples


def beside(
    scores: Mapping[str, float], decision: np.ndarray, labels: np.ndarray, log_scores: np.ndarray, *,
    kind: Likelihood, probabilities: np.ndarray | None = None, compute: Callable[..., Mapping] | None = None,
) -> dict[str, dict[str, float | None]]:  # fmt: skip
    """constant, standard_error and gain_error of every score, of `nll`, and with `probabilities` (E, C) of `brier`.

    scores: the metric's own, by name. kind: the likelihood. compute: the metric, asked about names that are not known
    here or that mean something else there.
    gain_error: standard error of score minus constant. None where an error cannot be estimated.
    """
    decision, labels = np.asarray(decision), np.asarray(labels)
    known = {name: _of_score(name, value, decision, labels, kind) for name, value in scores.items()}
    if compute is not None and None in known.values():
        known |= _by_calls([name for name, held in known.items() if held is None], decision, labels, kind, compute)
    found = {name: held or dict.fromkeys(_KEYS) for name, held in known.items()}
    found["nll"] = _of_means(-np.asarray(log_scores, float), -kind.constant_log_scores(labels))
    if probabilities is not None:
        unit, shares = np.eye(kind.classes)[labels], np.bincount(labels, minlength=kind.classes) / len(labels)
        each = (np.square(x - unit).sum(-1) for x in (np.asarray(probabilities, float), shares))
        found["brier"] = _of_means(*each)
    return found


def gain(name: str, value: float, other: float) -> float:
    """How much better a score is than another one of its name, in its unit; negative where it is worse."""
    return other - value if name in ERRORS else value - other


def difference_error(
    name: str, labels: np.ndarray, one: np.ndarray, other: np.ndarray, kind: Likelihood, *, value: float
) -> float | None:
    """Standard error of a score's difference between two sets of decisions on the same examples.

    value: the metric's own of `other`. None for a score that is not known here, or by that name is another one there.
    """
    labels, one, other = map(np.asarray, (labels, one, other))
    if not _is_known(name, value, other, labels, kind):
        return None
    each = _resampled(name, labels, [one, other], kind.classes)
    return float((each[0] - each[1]).std()) if len(labels) > 1 else None


def _of_means(each: np.ndarray, constant: np.ndarray) -> dict[str, float | None]:
    """Of a mean over examples, and of the constant answer's."""
    E = len(each)
    errors = [float(x.std(ddof=1) / E**0.5) if E > 1 else None for x in (each, each - constant)]
    return {"constant": float(constant.mean()), "standard_error": errors[0], "gain_error": errors[1]}


def _of_score(name: str, value: float, decision, labels, kind: Likelihood) -> dict | None:
    """None for a score that is not known here, or by that name is another one there."""
    if not _is_known(name, value, decision, labels, kind):
        return None
    best = min if name in ERRORS else max
    each_constant = ((_whole(name, x, labels, kind), x) for x in kind.constants(labels))
    constant, answer = best(each_constant, key=lambda pair: pair[0])
    each = _resampled(name, labels, [decision, answer], kind.classes)
    error = share_error(value, len(labels)) if name == "accuracy" else float(each[0].std()) or None
    gain_error = float((each[0] - each[1]).std()) if len(labels) > 1 else None
    return dict(zip(_KEYS, (constant, error, gain_error), strict=True))


def _is_known(name: str, value: float, decision, labels, kind: Likelihood) -> bool:
    """Whether a metric's value of a name is that of the score which has the name here."""
    if name not in known_scores(kind.classes) or labels.ndim > 1:
        return False
    return math.isclose(_whole(name, decision, labels, kind), value, rel_tol=1e-6, abs_tol=1e-6)


def _whole(name: str, decision, labels, kind: Likelihood) -> float:
    true, given = as_scored(name, labels, decision)
    counts: np.ndarray = np.ones(len(true))
    if kind.classes:  # of C^2 pairs at most, whatever the number of examples
        pairs, counts = np.unique(true * kind.classes + given, return_counts=True)
        true, given = pairs // kind.classes, pairs % kind.classes
    return float(weighted_score(name, counts[None], true, given, kind.classes)[0])


def _by_calls(names: list[str], decision, labels, kind: Likelihood, compute: Callable) -> dict[str, dict]:
    """Of a metric that is a function of predictions and references only."""

    def scores(x, y=labels) -> np.ndarray:
        try:
            found = compute(predictions=x.tolist(), references=y.tolist())
            return np.array([float(found[name]) for name in names])
        except Exception:  # a metric may refuse a resample or a constant: nothing is known of it then
            return np.full(len(names), np.nan)

    answers = sorted(kind.constants(labels), key=lambda x: -(labels == x).sum())  # of equal ones the most frequent
    of_answers = np.stack([scores(x) for x in answers])  # (answers, names)
    signs = np.where(np.isin(names, ERRORS), -1.0, 1.0)
    best = np.nan_to_num(signs * of_answers, nan=-np.inf).argmax(0)
    rng, resamples = np.random.default_rng(0), []
    for _ in range(_CALLS):
        i = rng.integers(len(labels), size=len(labels))
        constant = {k: scores(answers[k][i], labels[i]) for k in set(best.tolist())}
        resamples.append((scores(decision[i], labels[i]), [constant[k][n] for n, k in enumerate(best)]))
    one, other = np.array(resamples).swapaxes(0, 1)  # (calls, names)
    errors = one.std(0), (one - other).std(0) if len(labels) > 1 else np.full(len(names), np.nan)
    columns = of_answers[best, range(len(names))], np.where(errors[0] > 0, errors[0], np.nan), errors[1]
    return {
        name: {key: float(x[n]) if np.isfinite(x[n]) else None for key, x in zip(_KEYS, columns, strict=True)}
        for n, name in enumerate(names)
    }  # fmt: skip


def _resampled(name: str, labels: np.ndarray, decisions: list[np.ndarray], classes: int) -> np.ndarray:
    """(number of decisions, B): the score of each in the same bootstrap samples of the examples."""
    rows, counts = np.unique(np.stack(as_scored(name, labels, *decisions), 1), axis=0, return_counts=True)
    rows = rows.astype(int) if classes else rows
    rng, done = np.random.default_rng(0), []
    block = max(1, min(_RESAMPLES, _AT_ONCE // len(rows)))
    for start in range(0, _RESAMPLES, block):
        weights = rng.multinomial(len(labels), counts / counts.sum(), size=min(block, _RESAMPLES - start))
        done.append([weighted_score(name, weights, rows[:, 0], rows[:, 1 + d], classes) for d in range(len(decisions))])
    return np.concatenate(done, 1)
