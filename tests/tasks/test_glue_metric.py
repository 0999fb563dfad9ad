"""The score of every task is the official formula, offline."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import torch
from sklearn.metrics import f1_score, matthews_corrcoef

from pyro_blora.registry import REQUIRED
from pyro_blora.tasks import TASKS, MultiLabel, get_task, task_names
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.glue_metric import SCORES, GlueScore

BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
SIMILARITIES = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=60)

# By hand: predictions 1 1 0 1 0 0, references 1 0 0 1 1 0, so TP 2, FP 1, FN 1, TN 2.
PREDICTIONS, REFERENCES = [1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0]
BY_HAND = {
    "cola": {"matthews_correlation": (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)},
    "mrpc": {"accuracy": 4 / 6, "f1": 4 / 6},
    "qqp": {"accuracy": 4 / 6, "f1": 4 / 6},
    **{
        name: {"accuracy": 4 / 6}
        for name in ("sst2", "mnli", "mnli_mismatched", "qnli", "rte", "wnli", "acceptability")
    },
    "pairs": {
        "matthews_correlation": 1 / 3,
        "sensitivity": 2 / 3,
        "specificity": 2 / 3,
        "accuracy": 4 / 6,
        "f1": 4 / 6,
    },
    "stsb": {"pearson": 1 / 3, "spearmanr": 1 / 3},  # of two binary vectors both are Matthews'
}


def counts(pairs: list[tuple[int, int]]) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives of (prediction, reference) pairs."""
    return pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((0, 0))


def ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0  # the mean of equal numbers need not be that number to the last bit
    x, y = x - x.mean(), y - y.mean()
    return ratio(float(x @ y), math.sqrt(float(x @ x) * float(y @ y)))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; ties share the mean of theirs."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_hand_computed_values(name):
    assert GlueScore(name).compute(predictions=PREDICTIONS, references=REFERENCES) == pytest.approx(BY_HAND[name])


@pytest.mark.parametrize("name", SCORES)
def test_batches_score_as_the_whole(name):
    score = GlueScore(name)
    for start in (0, 4):
        score.add_batch(predictions=PREDICTIONS[start : start + 4], references=REFERENCES[start : start + 4])
    assert score.compute() == pytest.approx(BY_HAND[name])
    assert score.compute(predictions=REFERENCES, references=REFERENCES) != pytest.approx(
        BY_HAND[name]
    )  # nothing is left over


@given(BINARY)
def test_matthews_is_its_formula(pairs):
    tp, fp, fn, tn = counts(pairs)
    expected = ratio(tp * tn - fp * fn, math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    predictions, references = zip(*pairs, strict=True)
    found = GlueScore("cola").compute(predictions=predictions, references=references)
    assert found == pytest.approx({"matthews_correlation": expected}, abs=1e-12)


@given(BINARY)
def test_accuracy_and_f1_are_their_formulas(pairs):
    tp, fp, fn, tn = counts(pairs)
    predictions, references = zip(*pairs, strict=True)
    found = GlueScore("mrpc").compute(predictions=predictions, references=references)
    assert found == pytest.approx(
        {"accuracy": (tp + tn) / len(pairs), "f1": ratio(2 * tp, 2 * tp + fp + fn)}, abs=1e-12
    )


@given(SIMILARITIES)
def test_correlations_are_their_formulas(pairs):
    predictions, references = np.array(pairs, dtype=np.float64).T / 10
    found = GlueScore("stsb").compute(predictions=predictions, references=references)
    expected = {
        "pearson": pearson(predictions, references),
        "spearmanr": pearson(*map(mean_ranks, (predictions, references))),
    }
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["cola", "stsb", "mrpc"])
def test_a_constant_prediction_scores_zero_and_stays_finite(name):
    found = GlueScore(name).compute(predictions=[0, 0, 0, 0], references=[0, 1, 1, 0])
    found.pop("accuracy", None)
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_plain_json_numbers(name):
    json.dumps(GlueScore(name).compute(predictions=PREDICTIONS, references=REFERENCES), allow_nan=False)


def test_an_unknown_score_names_the_known_ones():
    with pytest.raises(ValueError, match="known: cola"):
        GlueScore("sst")


def test_kinds_of_outcome_have_the_scores_of_sklearn():
    labels, answers = np.array([0, 1, 2, 2, 1]), np.array([0, 2, 2, 2, 1])
    found = GlueScore("categorical").compute(predictions=answers, references=labels)
    assert found == pytest.approx({"accuracy": 0.8, "macro_f1": f1_score(labels, answers, average="macro"),
                                   "matthews_correlation": matthews_corrcoef(labels, answers)})  # fmt: skip
    numbers = GlueScore("normal").compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 3.0, 2.0])
    assert numbers["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert {*numbers} == {"pearson", "spearmanr", "rmse"}


def test_a_table_by_label_has_the_worst_first():
    kind = Categorical(("a", "b", "c", "never"))
    mean = torch.eye(4)[[0, 1, 2, 0, 1, 1]]
    ((caption, rows),) = kind.details(mean, torch.tensor([0, 1, 2, 1, 1, 1]))["tables"].items()
    assert caption == "Scores by label, worst first" and [row["label"] for row in rows] == ["a", "b", "c"]
    assert [*rows[1].values()] == ["b", 1.0, 0.75, pytest.approx(6 / 7), 4]
    several = MultiLabel(("a", "b")).details(torch.tensor([[0.9, 0.2], [0.9, 0.7]]), torch.tensor([[1, 1], [0, 1]]))
    assert [row["f1"] for row in several["tables"][caption]] == pytest.approx([2 / 3, 2 / 3])
    many = Categorical(tuple(map(str, range(150))))
    ((caption, rows),) = many.details(torch.eye(150), torch.arange(150))["tables"].items()
    assert caption == "Scores by label, the worst 100 of 150" and len(rows) == 100


def test_a_score_of_nothing_says_so():
    with pytest.raises(ValueError, match="at least one prediction"):
        GlueScore("sst2").compute()
    with pytest.raises(ValueError, match="at least one prediction"):
        GlueScore("sst2").compute(predictions=[], references=[])


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        GlueScore("stsb").compute(predictions=[1.0, float("nan")], references=[1.0, 2.0])


NEED_NOTHING = [
    name for name in task_names() if REQUIRED not in TASKS.entry(name).settings.values() and name != "squad"
]  # which scores its texts


@pytest.mark.parametrize("name", NEED_NOTHING)
def test_the_headline_number_is_among_the_scores(name):
    task = get_task(name)
    assert task.metric_name in task.metric().compute(predictions=PREDICTIONS, references=REFERENCES)
