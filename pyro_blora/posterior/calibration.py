"""Is the confidence right? Scores of predicted probabilities, and temperature scaling, which any claim has to beat.

Shapes: S draws, E examples, C classes; outputs (S, E, C) probabilities of each draw, mean (E, C), labels (E,).
Units: nats. Sources: Naeini et al. (2015) for ECE; Nixon et al. (2019) for equal counts; Guo et al. (2017) for the
temperature; Depeweg et al. (2018) for the two parts of the entropy; Geifman and El-Yaniv (2017) for selection; Geifman,
Uziel and El-Yaniv (2019) for its area; Bröcker and Smith (2007) for what a calibrated model has by chance; Hanley and
McNeil (1982) for the error of an AUROC.
"""

import math

import numpy as np
import torch
from torch import Tensor

BINS = (15, 20)  # equal ones of confidence: the peers', and B-LoRA-XS's; the first is a summary's `ece`
ADAPTIVE_BINS = 15  # of equally many examples
COVERAGES = (0.5, 0.8, 0.9, 0.95)  # shares of the examples that are answered, the most confident first
CHANCE = 0.95  # of the calibration errors of calibrated models; an error below it does not show miscalibration
_RESAMPLES = 1000  # of the labels, for that
_AT_ONCE = 4_000_000  # numbers of a block of resamples
_TINY = 1e-12  # in place of a probability of 0
_BELOW_ONE = 1 - 1e-6  # a confidence of 1 is in the last bin
TEMPERATURES = (-3.0, 5.0)  # natural logarithms of the coldest and the hottest that are tried


def scores(outputs: Tensor, labels: Tensor) -> dict:
    """Everything about one set of predictions, by name; `errors` are standard errors, `chance` as in `chance_level`."""
    mean = outputs.mean(0)
    entropy, information = uncertainty(outputs)
    wrong = mean.argmax(-1) != labels
    missed = auroc(entropy[wrong], entropy[~wrong])
    selected = selective_accuracy(mean, labels)
    each = -mean.double().clamp(min=_TINY).log().gather(-1, labels[:, None]), _brier_each(mean, labels).double()
    return {
        "nll": nll(mean, labels),
        "brier": brier(mean, labels),
        **{f"ece_{bins}": ece(mean, labels, bins) for bins in BINS},
        "ece_adaptive": adaptive_ece(mean, labels),
        "entropy": entropy.mean().item(),
        "mutual_information": information.mean().item(),
        "selective_accuracy": selected,
        "auroc_of_errors": missed,
        "errors": {
            **{name: _error_of_mean(x) for name, x in zip(("nll", "brier"), each, strict=True)},
            "selective_accuracy": {
                share: share_error(value, _answered(float(share), len(labels))) for share, value in selected.items()
            },
            "auroc_of_errors": auroc_error(missed, int(wrong.sum()), int((~wrong).sum())),
        },
        "chance": {
            **{f"ece_{bins}": chance_level(mean, bins) for bins in BINS},
            "ece_adaptive": chance_level(mean, ADAPTIVE_BINS, equal_counts=True),
        },
    }


def nll(mean: Tensor, labels: Tensor) -> float:
    """Mean negative log probability of the labels."""
    return -mean.double().clamp(min=_TINY).log().gather(-1, labels[:, None]).mean().item()


def brier(mean: Tensor, labels: Tensor) -> float:
    """Mean squared distance from the label's unit vector, the sum over classes (Brier, 1950)."""
    return _brier_each(mean, labels).mean().item()


def _error_of_mean(each: Tensor) -> float | None:
    return (each.std() / len(each) ** 0.5).item() if len(each) > 1 else None


def _brier_each(mean: Tensor, labels: Tensor) -> Tensor:
    return (mean - torch.nn.functional.one_hot(labels, mean.shape[-1])).square().sum(-1)


def ece(mean: Tensor, labels: Tensor, bins: int) -> float:
    """Expected calibration error in equal bins [a, b) of the confidence, the last with 1.

    In float64: torchmetrics sums in float32, and at a million examples is off by more than a calibrated model is.
    """
    confidence, decision = mean.double().max(-1)
    confidence = confidence.clamp(max=_BELOW_ONE)
    excess = confidence - (decision == labels).double()
    return excess.new_zeros(bins).index_add_(0, (confidence * bins).long(), excess).abs().sum().item() / len(labels)


def adaptive_ece(mean: Tensor, labels: Tensor, bins: int = ADAPTIVE_BINS) -> float:
    """The same in bins of equally many examples, sorted by confidence."""
    confidence, decision = mean.double().max(-1)
    order = confidence.argsort(stable=True)
    right = (decision == labels).double()
    parts = zip(confidence[order].tensor_split(bins), right[order].tensor_split(bins), strict=True)
    return sum(abs(float(c.sum() - r.sum())) for c, r in parts) / len(labels)


def chance_level(mean: Tensor, bins: int, *, equal_counts: bool = False) -> dict[str, float]:
    """{"mean", "high"}: the calibration error that predictions have by chance where they are perfectly calibrated.

    Labels are drawn from the predictions themselves, as often as needed; `high` is the 95 % quantile. A parametric
    bootstrap: an error below `high` does not show miscalibration.
    """
    confidence = np.sort(mean.double().max(-1).values.clamp(max=_BELOW_ONE).cpu().numpy())
    if equal_counts:
        starts = np.cumsum([0] + [len(part) for part in np.array_split(confidence, bins)])[:-1]
    else:
        starts = np.searchsorted((confidence * bins).astype(int), np.arange(bins))
    starts = np.unique(starts[starts < len(confidence)])
    promised = np.add.reduceat(confidence, starts)
    rng, found = np.random.default_rng(0), []
    block = max(1, min(_RESAMPLES, _AT_ONCE // len(confidence)))
    for start in range(0, _RESAMPLES, block):
        right = rng.random((min(block, _RESAMPLES - start), len(confidence))) < confidence
        kept = np.add.reduceat(right.astype(float), starts, axis=1)
        found.append(np.abs(kept - promised).sum(1) / len(confidence))
    errors = np.concatenate(found)
    return {"mean": float(errors.mean()), "high": float(np.quantile(errors, CHANCE))}


def share_error(share: float, n: int) -> float:
    """Standard deviation of a share of n under Jeffreys' prior: not 0 where all or none are right."""
    a, b = share * n + 0.5, (1 - share) * n + 0.5
    return float(np.sqrt(a * b / (a + b + 1)) / (a + b))


def uncertainty(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """(entropy of the mean, mutual information of label and draw), (E,): all uncertainty, and what the draws add."""
    mean = outputs.mean(0, dtype=torch.float64)
    entropy = torch.special.entr(mean).sum(-1)
    each = sum((torch.special.entr(p.double()).sum(-1) for p in outputs), torch.zeros_like(entropy)) / len(outputs)
    return entropy, (entropy - each).clamp(min=0.0)


def selective_accuracy(mean: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy on the share of the examples with the highest confidence, by share."""
    confidence, decision = mean.max(-1)
    right = _in_order((decision == labels).double(), confidence)
    return {f"{share:g}": right[: _answered(share, len(right))].mean().item() for share in COVERAGES}


def aurc(confidence: Tensor, right: Tensor) -> float:
    """Area under the risk-coverage curve: the share of wrong answers among the k most confident, averaged over all k.

    confidence, right: (E,). 0 where everything is right; where the confidence says nothing, about the share of wrong
    answers. Of equal confidences each counts as their mean, as if they came in a random order.
    """
    wrong = 1 - _in_order(right.double(), confidence)
    return (wrong.cumsum(0) / torch.arange(1, len(wrong) + 1, device=wrong.device)).mean().item()


def _in_order(x: Tensor, confidence: Tensor) -> Tensor:
    """(E,) from the most to the least confident; of equal ones their mean."""
    order = confidence.argsort(descending=True, stable=True)
    _, group, count = confidence[order].unique_consecutive(return_inverse=True, return_counts=True)
    sums = x.new_zeros(len(count)).index_add(0, group, x[order])
    return (sums / count)[group]


def _answered(share: float, n: int) -> int:
    return max(1, round(share * n))


def auroc(positive: Tensor, negative: Tensor) -> float | None:
    """Probability that a positive has the larger value than a negative, ties counted half; None without one of them."""
    if not len(positive) or not len(negative):
        return None
    from sklearn.metrics import roc_auc_score

    values = torch.cat([positive, negative]).cpu().numpy()
    return float(roc_auc_score(np.r_[np.ones(len(positive)), np.zeros(len(negative))], values))


def auroc_error(value: float | None, positive: int, negative: int) -> float | None:
    """Standard error of an AUROC of that many examples."""
    if value is None:
        return None
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    spread = value * (1 - value) + (positive - 1) * (q1 - value**2) + (negative - 1) * (q2 - value**2)
    return float(np.sqrt(max(spread, 0.0) / (positive * negative)))


def out_of_distribution(inside: Tensor, outside: Tensor) -> dict[str, float | None]:
    """AUROC of telling foreign examples by their uncertainty.  outputs (S, E, C) of the task's and of the others."""
    names, pairs = ("entropy", "mutual_information"), zip(uncertainty(outside), uncertainty(inside), strict=True)
    return {name: auroc(there, here) for name, (there, here) in zip(names, pairs, strict=True)}


def fit_temperature(mean: Tensor, labels: Tensor) -> float:
    """The temperature of least NLL: probabilities to the power of 1 / T, normalised."""
    low, high = TEMPERATURES
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: nll(at_temperature(mean, float(np.exp(log_t))), labels), bounds=(low, high), method="bounded"
    )
    return float(np.exp(found.x))


def at_temperature(mean: Tensor, temperature: float) -> Tensor:
    """Probabilities (..., C) at a temperature; 1 leaves them, and 0 stays 0, as of a letter that a question lacks."""
    logits = mean.double().clamp(min=_TINY).log() / temperature
    return logits.masked_fill(mean == 0, -math.inf).softmax(-1)
