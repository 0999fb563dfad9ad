"""Several labels an example: a kind of outcome in one file, from the data to a report."""

import json
from functools import partial

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import load
from pyro_blora.posterior.arviz_compat import group, read
from pyro_blora.run import train_run
from pyro_blora.tasks import MultiLabel, Task, get_task, register_task
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.likelihoods import LIKELIHOODS

pytestmark = pytest.mark.usefixtures("eager", "drawn")
NAMES = ("the", "and", "long")


def rows(*, glue_dir=None, seed=0, n_train=None):
    """The demo's sentences; what they are labelled by can be read off their words."""
    found = {}
    for split, table in get_task("acceptability").load(seed=seed, n_train=n_train or 300).items():
        words = [sentence.lower().split() for sentence in table["sentence"]]
        labels = [[int("the" in w), int("and" in w), int(len(w) > 6)] for w in words]
        features = datasets.Features({"sentence": datasets.Value("string"), "label": MultiLabel(NAMES).feature})
        found[split] = datasets.Dataset.from_dict({"sentence": table["sentence"], "label": labels}, features=features)
    return found


@pytest.fixture(scope="module")
def task():
    held = Task(
        name="words", text_columns=("sentence",), kind=MultiLabel(NAMES), metric_name="micro_f1", load=rows,
    )  # fmt: skip
    return register_task(held)


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi_label")
    config = tiny_config(
        save_tiny_backbone(folder / "backbone"), task="words", max_train=300, epochs=12, lr=5e-3, kl_warmup=0.8,
        output_dir=str(folder / "runs"), draws=4, validation=0.1,
    )  # fmt: skip
    return train_run(config)


def test_it_is_registered_and_one_file_knows_it():
    assert LIKELIHOODS.resolve("multi_label") is MultiLabel


def test_its_distribution_is_that_of_independent_labels():
    logits, labels = torch.randn(5, 3), torch.randint(0, 2, (5, 3))
    kind = MultiLabel(NAMES)
    distribution = kind(logits)
    expected = -torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").sum(-1)
    torch.testing.assert_close(distribution.log_prob(labels), expected)
    assert distribution.batch_shape == (5,) and torch.equal(kind.averaged(distribution, labels), logits.sigmoid())
    assert kind.decision(kind.averaged(distribution, labels)).equal((logits > 0).long())


def test_constants_and_their_scores_are_those_of_frequencies():
    labels = (np.random.default_rng(0).random((400, 3)) < (0.9, 0.5, 0.1)).astype(int)
    kind = MultiLabel(NAMES)
    best = max(f1_score(labels, answer, average="micro", zero_division=0.0) for answer in kind.constants(labels))
    every = [np.tile([i >> 2 & 1, i >> 1 & 1, i & 1], (400, 1)) for i in range(8)]
    assert best == max(f1_score(labels, answer, average="micro", zero_division=0.0) for answer in every)
    shares = labels.mean(0)
    entropy = -(shares * np.log(shares) + (1 - shares) * np.log(1 - shares)).sum()
    assert -kind.constant_log_scores(labels).mean() == pytest.approx(entropy, rel=1e-4)


def test_the_most_frequent_set_is_a_constant_answer():
    """It matches most often, where no number of the most frequent labels matches at all."""
    labels = np.array([[0, 1, 0, 0]] * 4 + [[1, 0, 1, 0]] * 3 + [[1, 0, 0, 1]] * 3)
    constants = MultiLabel(tuple("abcd")).constants(labels)
    matches = [(x == labels).all(1).mean() for x in constants]
    assert max(matches) == 0.4 and constants[int(np.argmax(matches))][0].tolist() == [0, 1, 0, 0]


def test_the_constant_score_is_of_the_frequencies_also_of_labels_that_nobody_has():
    labels = np.zeros((50, 1000), int)
    labels[np.arange(50), np.arange(50) % 10] = 1
    found = -MultiLabel(tuple(map(str, range(1000)))).constant_log_scores(labels)
    expected = -10 * (0.1 * np.log(0.1) + 0.9 * np.log(0.9))
    assert np.isfinite(found).all() and found.mean() == pytest.approx(expected)


def test_the_divergence_of_far_logits_is_finite_and_has_a_gradient():
    kind = MultiLabel(tuple("abc"))
    teacher, student = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[17.0, 40.0, -40.0]], requires_grad=True)
    found = kind.divergence(kind(teacher), kind(student), torch.zeros(1, 3))
    a, b = teacher.double(), student.detach().double()
    p, log = a.sigmoid(), torch.nn.functional.logsigmoid
    expected = (p * (log(a) - log(b)) + (1 - p) * (log(-a) - log(-b))).sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0.0)
    (slope,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(slope.double(), b.sigmoid() - p, rtol=1e-4, atol=1e-6)
    classes = Categorical(tuple("abc"))
    far = classes.divergence(classes(torch.tensor([[0.0, 0.0, 0.0]])), classes(torch.tensor([[0.0, 500.0, 0.0]])), None)
    assert far.item() == pytest.approx(2 / 3 * 500 - np.log(3), rel=1e-5)


def test_constants_of_a_thousand_labels_are_few_and_take_no_memory():
    labels = (np.random.default_rng(0).random((200, 1000)) < 0.3).astype(int)
    constants = MultiLabel(tuple(map(str, range(1000)))).constants(labels)
    assert len(constants) == 52 and all(x.shape == labels.shape and x.strides[0] == 0 for x in constants)
    counts = [int(x[0].sum()) for x in constants[1:]]
    assert counts[0] < labels.sum(1).mean() < counts[-1]


@pytest.mark.parametrize("names", [("one",), "ab", ("a", "a")])
def test_names_that_are_none_are_refused(names):
    with pytest.raises(ValueError, match="two or more different names"):
        MultiLabel(names)


@pytest.mark.parametrize("label", [[0, 1], [0, 1, 2], [0.5, 0, 1]])
def test_a_label_that_is_none_is_refused_with_its_row(task, label):
    table = rows(n_train=20)
    plain = datasets.Dataset.from_dict({"sentence": ["x"] * 3, "label": [[0, 0, 1], [1, 1, 1], label]})
    with pytest.raises(ValueError, match=r"row 2 has label .*lists of 3 numbers, 0 or 1 for each of the, and, long"):
        task.validate({**table, "train": plain})


def test_a_task_has_one_kind_of_outcome():
    with pytest.raises(ValueError, match="only one"):
        Task(name="two", text_columns=("x",), labels=("a", "b"), kind=MultiLabel(NAMES), metric_name="f", load=rows)


def test_it_is_learned_and_its_scores_stand_beside_the_constant_answer(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metric"]["name"] == "micro_f1" and set(summary["scores"]) == {"micro_f1", "macro_f1", "exact_match"}
    beside = summary["beside"]
    assert summary["metric"]["value"] > beside["micro_f1"]["constant"] + 2 * (
        beside["micro_f1"]["standard_error"] or 0.0
    )
    assert summary["nll"] < beside["nll"]["constant"]
    assert summary["ece"]["value"] is None and summary["accuracy"] is None and summary["calibration"] == {}
    assert set(summary["nll_per_label"]) == set(NAMES)
    assert sum(summary["nll_per_label"].values()) == pytest.approx(summary["nll"], rel=0.05)


def test_predictions_posterior_and_page_have_every_label(run):
    table = pd.read_parquet(run / "predictions.parquet")
    probabilities = table[[f"probability_{name}" for name in NAMES]].to_numpy()
    assert (np.stack(table["decision"]) == (probabilities > 0.5)).all()
    f1 = f1_score(np.stack(table["label"]), np.stack(table["decision"]), average="micro")
    assert f1 == pytest.approx(json.loads((run / "summary.json").read_text())["metric"]["value"])
    data = read(run)
    predicted = group(data, "predictions")
    assert predicted["labels"].dims == ("chain", "draw", "example", "class")
    assert list(predicted["class"].values) == list(NAMES)
    assert group(data, "predictions_constant_data")["labels"].shape == (len(table), len(NAMES))
    assert "least expected" in (run / "report.html").read_text()


def test_what_is_exported_is_read_back_with_its_labels(run):
    program = load(run)
    assert program.likelihood == MultiLabel(NAMES)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] > 0
    card = (run / "adapter" / "README.md").read_text()
    assert all(f"`{name}`" in card for name in NAMES)


@pytest.mark.parametrize(("changes", "said"), [
    ({"weights": "laplace"}, "no curvature for multi_label_classification"),
    ({"ood_task": "sst2"}, "must have a confidence"),
])  # fmt: skip
def test_what_has_no_meaning_for_it_is_refused(task, tmp_path, changes, said):
    config = partial(tiny_config, save_tiny_backbone(tmp_path / "backbone"), task="words", max_train=64)
    with pytest.raises(ValueError, match=said):
        train_run(config(output_dir=str(tmp_path / "runs"), **changes))
