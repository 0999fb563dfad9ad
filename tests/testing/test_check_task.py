"""`check_task` finds what is wrong with a task and says it."""

import random

import datasets
import pytest
from models import torch  # noqa: F401 (one thread)

from pyro_blora.tasks import TASKS, MultiLabel, Task, register_task
from pyro_blora.tasks.glue_metric import GlueScore, LabelF1
from pyro_blora.testing import check_task

WORDS = [f"film {number} is {'fine' if number % 2 else 'dull'}" for number in range(40)]


def table(numbers):
    return datasets.Dataset.from_dict(
        {"sentence": [WORDS[number] for number in numbers], "label": [number % 2 for number in numbers]}
    )


def good(*, glue_dir=None, seed=0, n_train=None):
    numbers = random.Random(seed).sample(range(30), n_train or 30)
    return {"train": table(numbers), "eval": table(range(30, 40))}


def made(load=good, **changes):
    settings = {
        "name": "films", "text_columns": ("sentence",), "labels": ("dull", "fine"), "metric_name": "accuracy",
        "make_metric": lambda: GlueScore("sst2"), "load": load,
    }  # fmt: skip
    return Task(**{**settings, **changes})


def no_eval(**settings):
    return {"train": good(**settings)["train"]}


def empty(**settings):
    return {**good(**settings), "eval": table([])}


def wordless(**settings):
    rows = good(**settings)["eval"].to_dict()
    return {**good(**settings), "eval": datasets.Dataset.from_dict({**rows, "sentence": [""] * 10})}


def wrong_label(**settings):
    rows = good(**settings)["eval"].to_dict()
    return {**good(**settings), "eval": datasets.Dataset.from_dict({**rows, "label": [2] * 10})}


def everything(*, glue_dir=None, seed=0, n_train=None):
    return good(seed=seed)


def unseeded(*, glue_dir=None, seed=0, n_train=None):
    return good(seed=random.random(), n_train=n_train)


def one_order(*, glue_dir=None, seed=0, n_train=None):
    return {**good(), "train": table(range(n_train or 30))}


def other_eval(*, glue_dir=None, seed=0, n_train=None):
    return {**good(seed=seed, n_train=n_train), "eval": table(random.Random(seed).sample(range(30, 40), 5))}


def failing(*, glue_dir=None, seed=0, n_train=None):
    raise KeyError("sentence")


class Error:
    """A metric that is smaller for better predictions."""

    def compute(self, predictions, references):
        return {"error": sum(p != r for p, r in zip(predictions, references, strict=True)) / len(references)}


class Undefined:
    def compute(self, predictions, references):
        return {"score": 1.0 if len(references) < 5 else float("nan")}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (made(lambda glue_dir: {}), r"load\(.*: define load\(\*, glue_dir=None, seed=0, n_train=None\)"),
        (made(no_eval), r"has no split 'eval', only \['train'\]: return both from load"),
        (made(text_columns=("text",)), r"lacks the columns \['text'\]"),
        (made(wrong_label), "split 'eval', row 0 has label 2; allowed are 0"),
        (made(empty), "task 'films': the data, split 'eval' has no rows"),
        (made(wordless), "split 'eval' has '' in its text column 'sentence'"),
        (made(everything), r"load\(n_train=8\) gave 30 training rows: keep n_train of them, drawn with seed"),
        (made(unseeded), "two loads with the same seed gave other rows of 'train'"),
        (made(one_order), "gave the same training rows for two seeds: draw them with seed"),
        (made(other_eval), "split 'eval' depends on seed"),
        (made(failing), "'films': load fails: KeyError: 'sentence'"),
        (made(make_metric=Error, metric_name="error"), "is 0 for perfect predictions and 0.5 for a constant answer"),
        (made(make_metric=Undefined, metric_name="score"), "of perfect predictions is nan"),
    ],
)
def test_what_is_wrong_is_said(task, message):
    with pytest.raises(ValueError, match=message):
        check_task(task)


def test_a_function_that_returns_no_task_is_refused():
    def nothing():
        return 3

    with pytest.raises(ValueError, match="task 'nothing' must return a Task, got int"):
        check_task(nothing)


def test_a_good_one_is_returned(forget):
    task = made()
    assert check_task(task) is task and check_task(lambda: task) is task
    register_task(task)
    assert check_task("films") is task
    answers = {"kind": MultiLabel(("fine", "long")), "labels": (), "metric_name": "micro_f1", "make_metric": LabelF1}

    def two_labels(**settings):
        return {name: rows.map(lambda row: {"label": [row["label"], 1]}) for name, rows in good(**settings).items()}

    assert check_task(made(two_labels, **answers)).num_labels == 2


def test_the_demo_passes():
    check_task("acceptability")


PAIRS = [(f"protein {number}", f"protein {number + 1}", "yes" if number % 3 == 0 else "no") for number in range(30)]


def test_pairs_of_ones_own_pass(tmp_path):
    for file, rows in (("train.csv", PAIRS[:20]), ("dev.csv", PAIRS[20:])):
        lines = "".join(f"{','.join(row)}\n" for row in rows)
        (tmp_path / file).write_text(f"first,second,label\n{lines}", encoding="utf-8")
    check_task("pairs", glue_dir=tmp_path)


@pytest.mark.parametrize("name", sorted({*TASKS.names()} & {"cola", "mrpc", "rte", "sst2", "stsb", "wnli"}))
def test_glue_passes(name, glue_dir):
    check_task(name, glue_dir=glue_dir)
