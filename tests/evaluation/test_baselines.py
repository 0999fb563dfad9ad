"""Constant answers, standard errors and chance levels: against closed forms and brute force."""

import math
import time

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, recall_score

from pyro_blora.evaluation.baselines import beside, difference_error
from pyro_blora.posterior.calibration import auroc_error, chance_level, ece, share_error
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.multi_label import MultiLabel
from pyro_blora.tasks.normal import Normal

RNG = np.random.default_rng(0)
LABELS = (RNG.random(800) < 0.3).astype(int)
BINARY = Categorical(("0", "1"))
DECISION = np.where(RNG.random(800) < 0.8, LABELS, 1 - LABELS)
BY_SKLEARN = {
    "accuracy": lambda y, x: float((x == y).mean()), "f1": f1_score, "matthews_correlation": matthews_corrcoef,
    "macro_f1": lambda y, x: f1_score(y, x, average="macro"), "sensitivity": recall_score,
    "specificity": lambda y, x: recall_score(y, x, pos_label=0),
}  # fmt: skip


def of(scores, decision=DECISION, labels=LABELS, classes=2, **more):
    kind = Categorical(tuple(map(str, range(classes)))) if classes else Normal(-9.0, 9.0)
    return beside(scores, decision, labels, np.full(len(labels), -0.5), kind=kind, **more)


@pytest.mark.parametrize("name", BY_SKLEARN)
def test_errors_of_scores_are_those_of_a_bootstrap_by_sklearn(name):
    score = BY_SKLEARN[name]
    found = of({name: score(LABELS, DECISION)})[name]
    rng, each, constants = np.random.default_rng(1), [], [np.full(800, c) for c in (0, 1)]
    best = max(constants, key=lambda x: score(LABELS, x))
    for _ in range(200):
        i = rng.integers(800, size=800)
        each.append((score(LABELS[i], DECISION[i]), score(LABELS[i], best[i])))
    one, other = np.transpose(each)
    assert found["constant"] == pytest.approx(score(LABELS, best), abs=1e-12)
    assert found["standard_error"] == pytest.approx(one.std(), rel=0.2)
    assert found["gain_error"] == pytest.approx((one - other).std(), rel=0.2)


def test_macro_f1_of_many_classes_leaves_out_those_that_nobody_has_or_names():
    labels = RNG.integers(0, 5, size=400)
    decision = np.where(RNG.random(400) < 0.6, labels, RNG.integers(0, 5, size=400))
    value = f1_score(labels, decision, average="macro")
    found = of({"macro_f1": value}, decision, labels, classes=9)["macro_f1"]  # 4 of them do not occur
    i = [np.random.default_rng(seed).integers(400, size=400) for seed in range(200)]
    errors = np.std([f1_score(labels[each], decision[each], average="macro") for each in i])
    assert found["standard_error"] == pytest.approx(errors, rel=0.2)
    constants = [f1_score(labels, np.full(400, c), average="macro", zero_division=0.0) for c in range(5)]
    assert found["constant"] == pytest.approx(max(constants))


def test_the_best_constant_of_an_error_has_the_lowest():
    labels = RNG.normal(2, 3, size=500)
    decision = labels + RNG.normal(0, 1, size=500)
    value = float(np.sqrt(np.square(labels - decision).mean()))
    found = of({"rmse": value}, decision, labels, classes=0)["rmse"]
    assert found["constant"] == pytest.approx(labels.std())
    assert found["standard_error"] == pytest.approx(value / math.sqrt(2 * 500), rel=0.2)  # of a normal's spread
    assert 0 < found["gain_error"] < 0.3

    class OrZero(Normal):
        def constants(self, labels):
            return [np.zeros(len(labels)), *super().constants(labels)]

    kind = OrZero(float(labels.min()), float(labels.max()))
    scores = beside({"rmse": value}, decision, labels, np.zeros(500), kind=kind)
    assert scores["rmse"]["constant"] == pytest.approx(labels.std())  # not that of zero, which is larger


def test_the_best_constant_of_an_error_that_is_asked_of_its_metric_has_the_lowest():
    def compute(predictions, references):
        return {"mae": float(np.abs(np.subtract(predictions, references)).mean())}

    found = of({"mae": compute(DECISION.tolist(), LABELS.tolist())["mae"]}, compute=compute)["mae"]
    assert found["constant"] == pytest.approx(LABELS.mean())  # that of 0, the label of most


def test_the_constant_answer_has_known_scores():
    share = LABELS.mean()
    found = of({name: score(LABELS, DECISION) for name, score in BY_SKLEARN.items()},
               probabilities=np.full((800, 2), 0.5))  # fmt: skip
    assert found["accuracy"]["constant"] == pytest.approx(1 - share)
    assert found["f1"]["constant"] == pytest.approx(2 * share / (1 + share))
    assert found["matthews_correlation"]["constant"] == 0
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found["nll"]["constant"] == pytest.approx(entropy)
    assert found["nll"]["standard_error"] == 0  # all log scores are alike, the constant's are not
    assert found["nll"]["gain_error"] > 0
    assert found["brier"]["constant"] == pytest.approx(2 * share * (1 - share))


def test_an_accuracy_of_one_has_an_error_all_the_same():
    found = of({"accuracy": 1.0}, decision=LABELS)["accuracy"]
    assert 0.0005 < found["standard_error"] < 0.002
    assert share_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)


def test_correlations_have_the_error_of_normal_theory():
    x = RNG.normal(size=2000)
    y = 0.6 * x + 0.8 * RNG.normal(size=2000)
    scores = {"pearson": pearsonr(x, y).statistic, "spearmanr": spearmanr(x, y).statistic}
    found = of(scores, decision=x, labels=y, classes=0)
    for name, value in scores.items():
        assert found[name]["constant"] == 0
        assert found[name]["standard_error"] == pytest.approx((1 - value**2) / 2000**0.5, rel=0.25)
    assert found["nll"]["constant"] == pytest.approx(0.5 * math.log(2 * math.pi * math.e * y.var()))


@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_correlations_of_few_values_have_the_error_of_a_bootstrap_by_scipy(unit):
    """Of grades from 0 to 5, mostly 0, in whatever unit: pairs of label and answer repeat."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 4, 5], p=[0.8, 0.04, 0.04, 0.04, 0.04, 0.04], size=800).astype(float)
    decision = np.clip(labels + rng.choice([-1, 0, 1], size=800, p=[0.2, 0.6, 0.2]), 0, 5)
    for name, score in (("pearson", pearsonr), ("spearmanr", spearmanr)):
        found = of({name: score(labels, decision).statistic}, decision * unit, labels * unit, classes=0)[name]
        resamples = [rng.integers(800, size=800) for _ in range(300)]
        error = np.std([score(labels[i], decision[i]).statistic for i in resamples])
        assert found["constant"] == 0 and found["standard_error"] == pytest.approx(error, rel=0.2)


def test_more_classes_than_two():
    labels = RNG.integers(5, size=600)
    decision = np.where(RNG.random(600) < 0.5, labels, RNG.integers(5, size=600))
    value = matthews_corrcoef(labels, decision)
    found = of({"matthews_correlation": value}, decision, labels, classes=5)["matthews_correlation"]
    assert found["constant"] == 0 and 0.01 < found["standard_error"] < 0.04


def test_a_name_that_means_something_else_is_asked_of_its_metric():
    def compute(predictions, references):
        return {"f1": f1_score(references, predictions, average="macro", zero_division=0.0)}

    value = compute(DECISION.tolist(), LABELS.tolist())["f1"]
    found = of({"f1": value}, compute=compute)["f1"]
    assert found["constant"] == pytest.approx(f1_score(LABELS, np.zeros(800), average="macro", zero_division=0.0))
    assert found["standard_error"] == pytest.approx(0.016, rel=0.3)
    assert of({"f1": value})["f1"] == dict.fromkeys(("constant", "standard_error", "gain_error"))

    def moody(predictions, references):
        raise RuntimeError("not today")

    assert of({"f1": value}, compute=moody)["f1"] == dict.fromkeys(("constant", "standard_error", "gain_error"))


def test_the_best_constant_of_several_labels_is_that_of_all_that_are_asked():
    labels = (np.random.default_rng(0).random((300, 30)) < 0.3).astype(int)
    kind = MultiLabel(tuple(f"label {number}" for number in range(30)))
    decision = (labels + (np.random.default_rng(1).random(labels.shape) < 0.2)) % 2

    def compute(predictions, references):
        return {"micro_f1": f1_score(references, predictions, average="micro", zero_division=0.0)}

    value = compute(decision.tolist(), labels.tolist())["micro_f1"]
    found = beside({"micro_f1": value}, decision, labels, np.zeros(300), kind=kind, compute=compute)["micro_f1"]
    of_all = compute(np.ones_like(labels).tolist(), labels.tolist())["micro_f1"]
    assert found["constant"] >= of_all > 0.45  # 0.3 of the cells are labels: without any, 0.7 are right and F1 is 0
    best = max(compute(x.tolist(), labels.tolist())["micro_f1"] for x in kind.constants(labels))
    assert found["constant"] == pytest.approx(best)


def test_differences_are_paired_by_example():
    other = DECISION.copy()
    other[:8] = 1 - other[:8]
    value = float((other == LABELS).mean())
    error = difference_error("accuracy", LABELS, DECISION, other, BINARY, value=value)
    assert error == pytest.approx(8**0.5 / 800, rel=0.1)  # eight examples differ, each by one
    assert difference_error("accuracy", LABELS, other, other, BINARY, value=value) == 0
    assert difference_error("loveliness", LABELS, DECISION, other, BINARY, value=value) is None


def test_a_difference_of_another_score_of_the_same_name_has_no_known_error():
    labels = RNG.integers(0, 3, size=300)
    one, kind = np.where(RNG.random(300) < 0.7, labels, RNG.integers(0, 3, size=300)), Categorical(("a", "b", "c"))
    other = np.where((one != 1) & (labels != 1) & (RNG.random(300) < 0.5), 2 - one, one)  # alike where 1 is either
    value = f1_score(labels, other, average="weighted")
    assert difference_error("f1", labels, one, other, kind, value=value) is None  # binary F1 of class 1 would have 0
    value = f1_score(labels == 1, other == 1)
    assert difference_error("f1", labels, one, other, kind, value=value) == 0


def test_a_name_of_numbers_is_not_known_of_several_labels():
    kind, labels = MultiLabel(("a", "b")), np.array([[0, 1], [1, 1], [1, 0]])
    found = beside({"pearson": 0.5}, labels, labels, np.zeros(3), kind=kind)
    assert found["pearson"] == dict.fromkeys(("constant", "standard_error", "gain_error"))


# --- chance ----------------------------------------------------------------------------------------------------------


def two_classes(confidence):
    return torch.stack([confidence, 1 - confidence], 1)


@pytest.mark.parametrize("equal_counts", [False, True])
def test_chance_in_one_bin_is_the_mean_of_a_folded_normal(equal_counts):
    found = chance_level(two_classes(torch.full((2000,), 0.77)), 1 if equal_counts else 15, equal_counts=equal_counts)
    spread = (0.77 * 0.23 / 2000) ** 0.5
    assert found["mean"] == pytest.approx(spread * (2 / math.pi) ** 0.5, rel=0.1)
    assert found["high"] == pytest.approx(1.96 * spread, rel=0.1)


def test_chance_is_what_calibrated_predictions_have():
    """At 872 examples about 0.028, below 0.042 in 95 %."""
    generator = torch.Generator().manual_seed(0)
    mean = two_classes(torch.sigmoid(2 * torch.randn(872, generator=generator)).double())
    found, errors = chance_level(mean, 15), []
    for _ in range(150):
        labels = (torch.rand(872, generator=generator) > mean[:, 0]).long()
        errors.append(ece(mean, labels, 15))
    assert found["mean"] == pytest.approx(np.mean(errors), rel=0.06) == pytest.approx(0.028, abs=0.003)
    assert found["high"] == pytest.approx(np.quantile(errors, 0.95), rel=0.12)
    assert chance_level(two_classes(torch.ones(50)), 15)["high"] < 1e-5  # sure, and calibrated: always right


def test_a_large_evaluation_takes_no_time():
    labels = RNG.integers(2, size=40_000)
    start = time.process_time()
    of({"accuracy": 1.0, "f1": 1.0}, labels, labels)
    chance_level(two_classes(torch.rand(40_000)), 15)
    assert time.process_time() - start < 20


def test_the_error_of_an_auroc_is_that_of_hanley_and_mcneil():
    assert auroc_error(0.5, 100, 100) == pytest.approx((201 / (12 * 100 * 100)) ** 0.5, rel=1e-2)  # Mann and Whitney's
    assert auroc_error(1.0, 10, 10) == 0 and auroc_error(None, 0, 10) is None


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (1, 0), (40, 2)])
def test_where_an_error_cannot_be_estimated_there_is_none(rows, classes):
    """Of one row, and of a bootstrap in which every resample is right; Jeffreys' is that of the accuracy."""
    labels = np.arange(rows) % 2 if classes else np.arange(rows, dtype=float)
    names = {"macro_f1": 1.0, "accuracy": 1.0} if classes else {"rmse": 0.0}
    found = of(names, labels, labels, classes)
    for name in names:
        assert (found[name]["standard_error"] is None) is (name != "accuracy")
        assert (found[name]["gain_error"] is None) is (rows == 1)
    calls = of({"odd": 0.5}, labels, labels, classes, compute=lambda **_: {"odd": 0.5})["odd"]
    assert calls["standard_error"] is None and calls["gain_error"] == (None if rows == 1 else 0.0)
    error = difference_error("rmse", labels, labels, labels + 1.0, Normal(-9.0, 99.0), value=1.0)
    assert (error is None) is (rows == 1)
