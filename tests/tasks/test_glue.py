"""The nine GLUE tasks: the official files' rows and traps, the hub's columns, and errors that name their remedy."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from tiny import save_tiny_backbone, tiny_config

from pyro_blora.build import build
from pyro_blora.registries import TASKS as REGISTERED
from pyro_blora.registry import REQUIRED
from pyro_blora.run import train_run
from pyro_blora.tasks import Task, get_task, register_task, task_names
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.glue import REMEDY, TASKS
from pyro_blora.tasks.glue_metric import GlueScore

ROWS = {  # the data folder's README
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "qnli": (8999, 5463),
    "rte": (2490, 277),
    "wnli": (635, 71),
}
FOLDERS = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
}
MNLI_FILES = ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")
PAIR_FILES = ("train.tsv", "dev.tsv")


@pytest.fixture
def sampled_dir(glue_dir: Path, tmp_path: Path) -> Path:
    """The 200-row samples of MNLI and QQP in the official layout."""
    for folder, files in (("MNLI", MNLI_FILES), ("QQP", PAIR_FILES)):
        (tmp_path / folder).mkdir()
        for file in files:
            shutil.copy(glue_dir / folder / "sample200.tsv", tmp_path / folder / file)
    return tmp_path


def release(folder: Path, name: str, lines: list[str], *, end: str = "\n") -> Path:
    """A release with one task whose files all hold these lines."""
    (folder / FOLDERS[name]).mkdir()
    for file in MNLI_FILES if name == "mnli" else PAIR_FILES:
        (folder / FOLDERS[name] / file).write_text("\n".join(lines) + end, encoding="utf-8")
    return folder


# The official files


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_read(glue_dir, name):
    task = get_task(name)
    splits = task.validate(task.load(glue_dir=glue_dir))
    assert (len(splits["train"]), len(splits["eval"])) == ROWS[name]
    for rows in splits.values():
        assert rows.column_names == [*task.text_columns, "label"]
        assert all(text for column in task.text_columns for text in rows[column])


@pytest.mark.parametrize("name", ["mnli", "qqp"])
def test_samples_in_the_official_layout_are_read(sampled_dir, name):
    task = get_task(name)
    splits = task.validate(task.load(glue_dir=sampled_dir))
    assert set(splits) == {"train", "eval"} | ({"eval_mismatched"} if name == "mnli" else set())
    assert {len(rows) for rows in splits.values()} == {200}


def test_cola_has_no_header_and_its_sentence_is_the_fourth_column(glue_dir):
    rows = get_task("cola").load(glue_dir=glue_dir)
    assert rows["eval"][0] == {"sentence": "The sailors rode the breeze clear of the rocks.", "label": 1}
    assert rows["train"][0]["sentence"].startswith("Our friends won't buy this analysis")


def test_mrpc_is_read_past_its_byte_order_mark_and_its_quotes_are_text(glue_dir):
    row = get_task("mrpc").load(glue_dir=glue_dir)["train"][0]
    assert row["label"] == 1
    assert row["sentence1"].startswith('Amrozi accused his brother , whom he called " the witness " ,')


def test_a_lone_quote_does_not_swallow_the_next_rows(tmp_path):
    lines = ["sentence\tlabel", 'a "lone quote\t1', 'and "another\t0', "plain\t1"]
    rows = get_task("sst2").load(glue_dir=release(tmp_path, "sst2", lines))["train"]
    assert rows["sentence"][:] == ['a "lone quote', 'and "another', "plain"]
    assert rows["label"][:] == [1, 0, 1]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("sentence\tlabel\nfine\t1\n".encode("utf-16"), "is UTF-16, not UTF-8 text: convert it: iconv"),
        ("sentence\tlabel\nfiné\t1\n".encode("latin-1"), "line 2: byte 0xe9 is no UTF-8.* iconv -f WINDOWS-1252"),
        (
            gzip.compress(b"sentence\tlabel\nfine\t1\n", mtime=0),
            "is compressed by gzip, not UTF-8 text: unpack it: gunzip",
        ),
        (b"sentence\tlabel\tsentence\nfine\t1\tbad\n", "the header line names 'sentence' twice: rename or drop one"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_with_the_remedy(tmp_path, raw, message):
    folder = release(tmp_path, "sst2", ["sentence\tlabel", "fine\t1"])
    (folder / "SST-2" / "dev.tsv").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{folder / 'SST-2' / 'dev.tsv'}.*{message}"):
        get_task("sst2").load(glue_dir=folder)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("qqp", ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\ta?\tb?\t0", "1\tx", "2\tx"]),
        ("mnli", ["sentence1\tsentence2\tgold_label", "a\tb\tneutral", "a\tb\t-", "a\tb\t-"]),
    ],
)
def test_a_release_of_which_most_rows_are_left_out_is_refused(tmp_path, name, lines):
    message = r"train\.tsv: 2 of 3 rows are broken or have no label, the first of them in line 3; .* download it again"
    with pytest.raises(ValueError, match=message):
        get_task(name).load(glue_dir=release(tmp_path, name, lines))


def test_windows_line_ends_are_read(tmp_path):
    rows = get_task("sst2").load(glue_dir=release(tmp_path, "sst2", ["sentence\tlabel\r", "fine\t1\r"]))["train"]
    assert rows[0] == {"sentence": "fine", "label": 1}


def test_stsb_labels_are_numbers_from_0_to_5(glue_dir):
    rows = get_task("stsb").load(glue_dir=glue_dir)
    assert rows["eval"][1] == {
        "sentence1": "A young child is riding a horse.",
        "sentence2": "A child is riding a horse.",
        "label": 4.75,
    }
    assert (min(rows["train"]["label"]), max(rows["train"]["label"])) == (0.0, 5.0)


def test_word_labels_become_the_hubs_integers(glue_dir, sampled_dir):
    assert get_task("rte").load(glue_dir=glue_dir)["eval"]["label"][:2] == [1, 0]  # not_entailment, entailment
    assert get_task("qnli").load(glue_dir=glue_dir)["eval"]["label"][:2] == [0, 1]
    labels = get_task("mnli").load(glue_dir=sampled_dir)["eval"]["label"][:]
    assert [labels.count(label) for label in range(3)] == [68, 59, 73]  # entailment, neutral, contradiction


def test_official_mnli_columns_are_found_by_name_and_rows_without_gold_label_are_dropped(tmp_path):
    header = (
        "index\tpromptID\tpairID\tgenre\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label"
    )
    lines = [
        header,
        *(f"0\t1\t2\tfiction\tp1\tp2\tA\tB\tneutral\t{gold}" for gold in ("-", "contradiction", "entailment")),
    ]
    rows = get_task("mnli").load(glue_dir=release(tmp_path, "mnli", lines))["eval_mismatched"]
    assert list(rows) == [{"premise": "A", "hypothesis": "B", "label": label} for label in (2, 0)]


def test_malformed_qqp_rows_are_skipped_and_counted_once(tmp_path, caplog):
    lines = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"]
    lines += ["0\t1\t2\tWhy?\tHow come?\t1", "1\t3\t4\tWhat is", "this?\tThat?\t0", "2\t5\t6\tWho?\tWhom?\t"]
    lines += [lines[1]] * 2  # most rows are whole
    with caplog.at_level(logging.WARNING, logger="pyro_blora"):
        rows = get_task("qqp").load(glue_dir=release(tmp_path, "qqp", lines))["train"]
    assert list(rows) == [{"question1": "Why?", "question2": "How come?", "label": 1}] * 3
    warnings = [record.getMessage() for record in caplog.records if "train.tsv" in record.getMessage()]
    assert len(warnings) == 1
    assert "skipped 3 malformed rows" in warnings[0]


def test_n_train_draws_training_rows_by_seed_and_leaves_eval_whole(glue_dir):
    load = get_task("rte").load
    first, again, other = (load(glue_dir=glue_dir, n_train=100, seed=seed) for seed in (0, 0, 1))
    assert len(first["train"]) == 100
    assert len(first["eval"]) == ROWS["rte"][1]
    assert list(first["train"]) == list(again["train"])
    assert list(first["train"]) != list(other["train"])
    assert len(load(glue_dir=glue_dir, n_train=10**6)["train"]) == ROWS["rte"][0]


# Errors


def test_a_missing_folder_names_the_path_and_the_flag(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*SST-2.* --glue_dir"):
        get_task("sst2").load(glue_dir=tmp_path)


def test_a_missing_file_names_the_path(tmp_path):
    folder = release(tmp_path, "sst2", ["sentence\tlabel", "fine\t1"])
    (folder / "SST-2" / "dev.tsv").unlink()
    with pytest.raises(ValueError, match=r"no file .*SST-2/dev\.tsv"):
        get_task("sst2").load(glue_dir=folder)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_truncated_last_line_names_file_line_and_remedy(glue_dir, tmp_path, name):
    source = (glue_dir / FOLDERS[name] / "dev.tsv").read_text(encoding="utf-8").split("\n")[:20]
    cut = source[-1][: len(source[-1]) // 4] if name != "cola" else source[-1].rsplit("\t", 1)[0]
    folder = release(tmp_path, name, [*source[:-1], cut], end="")
    with pytest.raises(ValueError, match=rf"train\.tsv, line 20: .*{REMEDY}"):
        get_task(name).load(glue_dir=folder)


@pytest.mark.parametrize(("name", "label"), [("sst2", "2"), ("sst2", ""), ("sst2", "positive"), ("wnli", "-1")])
def test_a_label_outside_the_task_names_line_label_and_allowed(tmp_path, name, label):
    texts = "0\ta\tb\t" if name == "wnli" else "a\t"
    header = "index\tsentence1\tsentence2\tlabel" if name == "wnli" else "sentence\tlabel"
    folder = release(tmp_path, name, [header, f"{texts}1", f"{texts}{label}"])
    with pytest.raises(ValueError, match=rf"train\.tsv, line 3: label '{label}'; allowed are 0 \(.*1 \("):
        get_task(name).load(glue_dir=folder)


@pytest.mark.parametrize("label", ["5.2", "-0.1", "nan", "high", ""])
def test_a_similarity_out_of_range_is_refused(tmp_path, label):
    folder = release(tmp_path, "stsb", ["sentence1\tsentence2\tscore", f"a\tb\t{label}"])
    with pytest.raises(ValueError, match=rf"line 2: label '{label}'; allowed are numbers from 0 to 5"):
        get_task("stsb").load(glue_dir=folder)


def test_an_unknown_word_label_names_the_words(tmp_path):
    folder = release(tmp_path, "rte", ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailmen"])
    with pytest.raises(ValueError, match="allowed are entailment, not_entailment"):
        get_task("rte").load(glue_dir=folder)


def test_a_header_without_the_label_names_the_column(tmp_path):
    folder = release(tmp_path, "rte", ["index\tsentence1\tsentence2", "0\ta\tb"])
    with pytest.raises(ValueError, match=r"lacks the columns \['label'\]"):
        get_task("rte").load(glue_dir=folder)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        get_task("cola").load(glue_dir=release(tmp_path, "cola", [], end=""))


@pytest.mark.parametrize("n_train", [0, -1])
def test_no_training_rows_are_refused(n_train):
    with pytest.raises(ValueError, match="at least one training row"):
        get_task("sst2").load(n_train=n_train)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_an_unreachable_hub_says_so_in_one_sentence(task, tmp_path, monkeypatch):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # a user's cached copy would be read, rightly
    with pytest.raises(
        ValueError, match=r"hub's nyu-mll/glue cannot be read .* --glue_dir FOLDER .* go online once"
    ) as caught:
        task.load()
    assert caught.value.__suppress_context__
    assert "\n" not in str(caught.value)


# Tasks by name


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"unknown task 'sst': did you mean 'sst2'\? Known: acceptability, choice.*, e2e, files, mnli",
    ):
        get_task("sst")


def test_the_demo_and_the_nine_tasks_are_known():
    assert set(FOLDERS) | {"acceptability"} <= set(task_names())
    assert all(get_task(name).name == name for name in task_names() if needs_nothing(name))


def test_a_registered_task_is_found_and_takes_the_place_of_one_before_and_not_of_the_packages(forget):
    mine = replace(TASKS["cola"], name="mine", make_metric=partial(GlueScore, "cola"))
    assert register_task(mine) is mine
    assert get_task("mine") is mine
    assert register_task(mine) is mine
    other = register_task(replace(mine, text_columns=("other",)))  # as where a notebook's cell is edited and runs again
    assert get_task("mine") is other and get_task("mine") != mine
    with pytest.raises(ValueError, match="'cola' is taken"):
        register_task(replace(mine, name="cola"))
    assert get_task("cola") is TASKS["cola"]


def test_the_tasks_of_the_package_could_be_registered():
    for name in filter(needs_nothing, task_names()):
        get_task(name).require_usable()


def needs_nothing(name):
    """Whether a task has all its settings: `files` and `e2e` want to know where the data is, `squad` scores texts."""
    return REQUIRED not in REGISTERED.entry(name).settings.values() and name != "squad"


def broken():
    raise RuntimeError("no network\nat all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_name": "auc"}, r"gives no number 'auc', but 'accuracy', 'macro_f1', 'matthews_correlation': set"),
        (
            {"labels": (), "label_range": (0.0, 1.0)},
            r"gives no number 'matthews_correlation', but 'pearson', 'spearmanr'",
        ),
        (
            {"make_metric": broken},
            "fails on perfect predictions of its own labels: RuntimeError: no network at all",
        ),
        ({"make_metric": partial(GlueScore, "sst2")}, r"gives no number 'matthews_correlation', but 'accuracy'"),
        ({"load": lambda glue_dir: {}}, r"task 'mine': load\(.*define load\(\*, glue_dir=None, seed=0, n_train=None\)"),
        ({"name": " "}, "a name must be a word"),
    ],
    ids=["no-metric", "no-metric-of-a-regression", "metric-fails", "other-metric", "load", "name"],
)
def test_what_a_training_would_fail_on_is_refused_at_registration(forget, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        register_task(replace(TASKS["cola"], **{"name": "mine", "make_metric": None, **changes}))
    assert "\n" not in str(error.value) and "mine" not in task_names()
    with pytest.raises(ValueError, match="takes a Task, got int"):
        register_task(3)


FILMS = """
import datasets
from pyro_blora.tasks import Task
from pyro_blora.tasks.glue_metric import GlueScore

def load(*, glue_dir=None, seed=0, n_train=None):
    table = datasets.Dataset.from_dict({"text": ["fine", "dull"], "label": [1, 0]})
    return {"train": table, "eval": table}

def films(*, column: str = "text"):
    return Task(name="films", text_columns=(column,), labels=("dull", "fine"), metric_name="accuracy",
                make_metric=lambda: GlueScore("sst2"), load=load)

def unusable():
    return Task(name="films", text_columns=("text",), labels=("dull", "fine"), metric_name="f1", load=load)

def nothing():
    return 3
"""


def test_a_task_is_a_function_in_a_file_with_settings(tmp_path):
    (tmp_path / "films.py").write_text(FILMS, encoding="utf-8")
    task = get_task(f"{tmp_path}/films.py:films")
    assert task is get_task(f"{tmp_path}/films.py:films") and task.text_columns == ("text",)
    assert get_task(f"{tmp_path}/films.py:films", {"column": "said"}).text_columns == ("said",)
    for name, settings, message in (
        ("films", {"colum": "text"}, "task 'films': unknown setting 'colum': did you mean 'column'"),
        ("unusable", {}, "gives no number 'f1', but 'accuracy'"),
        ("nothing", {}, "must return a Task, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            get_task(f"{tmp_path}/films.py:{name}", settings)


def test_a_task_is_registered_as_the_function_that_returns_it(forget):
    @register_task("mine")
    def own():
        return replace(TASKS["cola"], name="mine", make_metric=partial(GlueScore, "cola"))

    assert get_task("mine").name == "mine" and "mine" in task_names()


def test_the_parts_of_a_task_are_tuples_that_make_sense():
    with pytest.raises(ValueError, match="different class names"):
        replace(TASKS["cola"], labels=("yes", "yes"))
    with pytest.raises(ValueError, match="text columns 'sentence'"):
        replace(TASKS["cola"], text_columns="sentence")
    with pytest.raises(ValueError, match=r"label_range \(5.0, 0.0\)"):
        replace(TASKS["cola"], labels=(), label_range=(5.0, 0.0))


def test_a_task_is_classes_or_a_range():
    with pytest.raises(ValueError, match=r"labels .* or label_range"):
        replace(TASKS["cola"], label_range=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"labels .* or label_range"):
        replace(TASKS["cola"], labels=())


# Labels and their distribution


def test_validation_names_split_row_label_and_allowed():
    task = get_task("sst2")
    good = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]})
    bad = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 2]})
    with pytest.raises(
        ValueError, match=r"mine\.csv, split 'eval', row 1 has label 2; allowed are 0 \(negative\), 1 \(pos"
    ):
        task.validate({"train": good, "eval": bad}, source="mine.csv")
    with pytest.raises(ValueError, match=r"lacks the columns \['sentence'\]"):
        task.validate({"train": good, "eval": good.rename_column("sentence", "text")})
    with pytest.raises(ValueError, match="no split 'eval'"):
        task.validate({"train": good})


def test_validation_names_a_text_that_is_none():
    task = get_task("mrpc")
    columns = {"sentence1": ["a"] * 1002, "label": [0, 1] * 501}
    good = datasets.Dataset.from_dict({**columns, "sentence2": ["a", "", " "] * 334})  # QQP has empty ones
    assert task.validate({"train": good, "eval": good})["train"] is good
    bad = datasets.Dataset.from_dict({**columns, "sentence2": ["a"] * 1001 + [None]})
    number = datasets.Dataset.from_dict({**columns, "sentence2": [1] * 1002})
    cut = good.with_transform(lambda rows: {**rows, "sentence2": ["half an emoji: \ud83d"] * len(rows["sentence2"])})
    for wrong, row, cell in ((bad, 1001, "None"), (number, 0, "1"), (cut, 0, r"'half an emoji: \\ud83d'")):
        with pytest.raises(ValueError, match=f"'eval', row {row} has {cell} in its text column 'sentence2'"):
            task.validate({"train": good, "eval": wrong}, source="mine")


def test_labels_that_are_words_are_refused():
    words = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": ["negative", "positive"]})
    with pytest.raises(ValueError, match=r"row 0 has label negative; allowed are 0 \(negative\)"):
        get_task("sst2").validate({"train": words, "eval": words})


def test_the_classification_law_sums_to_one_in_float32():
    distribution = get_task("mnli").likelihood(torch.randn(4, 3, dtype=torch.bfloat16))
    assert distribution.batch_shape == (4,)
    assert distribution.event_shape == ()
    total = torch.stack([distribution.log_prob(torch.full((4,), label)).exp() for label in range(3)]).sum(0)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, torch.ones(4))


def test_the_regression_law_starts_at_the_middle_and_spans_the_range():
    task = get_task("stsb")
    assert task.likelihood.problem_type == "regression"
    assert task.num_labels == 1
    distribution = task.likelihood(torch.tensor([[0.0], [1.0], [-1.0]]), scale=torch.tensor(0.5))
    assert distribution.batch_shape == (3,)
    assert distribution.mean.tolist() == [2.5, 5.0, 0.0]
    assert distribution.stddev.tolist() == [0.5] * 3


def test_a_head_of_the_wrong_size_and_a_missing_scale_are_refused():
    with pytest.raises(ValueError, match="num_labels=2"):
        get_task("sst2").likelihood(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="standard deviation"):
        get_task("stsb").likelihood(torch.zeros(4, 1))


def test_a_users_function_reads_its_file_again_for_every_run(tmp_path, monkeypatch, forget):
    def wrote(*labels):
        rows = [f"a film of {number} parts,{label}\n" for number in range(30) for label in labels]
        (tmp_path / "films.csv").write_text("text,label\n" + "".join(rows))

    wrote("good", "bad")
    (tmp_path / "films.py").write_text(f"""
import pandas as pd
from pyro_blora.tasks import from_frame
def films():
    return from_frame('films', pd.read_csv('{tmp_path}/films.csv'), text='text', label='label')
""")
    config = tiny_config(save_tiny_backbone(tmp_path / "tiny", letters=True), task=f"{tmp_path}/films.py:films",
                         max_train=None)  # fmt: skip
    before = build(config)
    assert get_task(config.task) is get_task(config.task)
    wrote("good", "bad", "odd")
    now = build(config)
    assert len(now.rows["train"]) > len(before.rows["train"]) and now.task.likelihood.names == ("bad", "good", "odd")


@pytest.mark.parametrize("kind", [bool, float])
def test_labels_that_are_true_or_false_are_trained_on_as_numbers(tmp_path, kind, forget):
    def load(*, glue_dir=None, seed=0, n_train=None):
        rows = datasets.Dataset.from_dict(
            {"text": [f"film {i}" for i in range(40)], "label": [kind(i % 2) for i in range(40)]}
        )
        return {"train": rows, "eval": rows.select(range(10)).with_format("torch")}

    register_task(Task(name="films", text_columns=("text",), labels=("bad", "good"), metric_name="accuracy", load=load))
    config = tiny_config(save_tiny_backbone(tmp_path / "tiny", letters=True), task="films", max_train=None, epochs=1,
                         output_dir=str(tmp_path / "runs"))  # fmt: skip
    table = pd.read_parquet(train_run(config) / "predictions.parquet")
    assert table["label"].tolist() == [0, 1] * 5


@pytest.mark.parametrize(("splits", "message"), [
    ({"eval_odd": []}, "split 'eval_odd' has no rows: leave it out"),
    ({"a/b": [1]}, "split 'a/b': its predictions are a file of that name: rename it"),
])  # fmt: skip
def test_a_split_that_would_fail_when_training_has_ended_is_refused(splits, message):
    task = get_task("cola")
    good = datasets.Dataset.from_dict({"sentence": ["a"] * 4, "label": [0, 1] * 2})
    more = {name: good.select(range(len(rows))) for name, rows in splits.items()}
    with pytest.raises(ValueError, match=message):
        task.validate({"train": good, "eval": good, **more})
    with pytest.raises(ValueError, match=r"split 'eval' is a dict: load must return a datasets\.Dataset"):
        task.validate({"train": good, "eval": {"sentence": ["a"], "label": [0]}})


def test_names_of_labels_are_texts():
    with pytest.raises(ValueError, match="a name is a text, not 0: write '0'"):
        Categorical((0, 1))
