"""The task `files`: from files to rows, findings, a kind of outcome, and a finished run."""

import json
import shlex
from pathlib import Path

import datasets
import pandas as pd
import pytest
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import RunConfig, load
from pyro_blora.__main__ import _parser, main
from pyro_blora.config.command_line import command_line, run_fields, take_settings
from pyro_blora.config.data_files import require_same_data
from pyro_blora.run import train_run
from pyro_blora.tasks import from_frame, get_task, register_task
from pyro_blora.tasks.multi_label import MultiLabel
from pyro_blora.tasks.normal import Normal
from pyro_blora.testing import check_task

FILMS = [
    (f"film {number} is {'fine' if number % 3 else 'dull'}", "good" if number % 3 else "bad") for number in range(30)
]


def write(path, rows, header="text,label"):
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


def files(**settings):
    return get_task("files", settings)


def state_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def findings(task):
    return " | ".join([*task.findings["sentences"], *task.findings["warnings"]])


def test_a_csv_is_a_task_whose_split_is_made_and_said(tmp_path):
    task = check_task("files", {"data": write(tmp_path / "films.csv", FILMS)})
    assert task.likelihood.names == ("bad", "good") and task.metric_name == "accuracy"
    rows = task.load()
    assert len(rows["train"]) == 24 and len(rows["eval"]) == 6 and sum(rows["eval"]["label"]) == 4
    first = rows["train"][0]
    assert first["idx"] >= 2 and FILMS[first["idx"] - 2][0] == first["text"]
    assert "20% of the texts were drawn" in findings(task) and "--task.split_seed 0" in findings(task)
    other = files(data=str(tmp_path / "films.csv"), split_seed=1).load()
    assert other["eval"]["idx"][:] != rows["eval"]["idx"][:]


def test_what_is_doubtful_in_the_rows_is_found(tmp_path):
    more = [
        ("twice", "good"),
        ("twice", "good"),
        ("doubtful", "good"),
        ("doubtful", "bad"),
        ("", "bad"),
        ("no label", ""),
    ]
    train = write(tmp_path / "train.csv", [*FILMS, *more, ("rare", "awful"), ("rarer", "awful")])
    dev = write(tmp_path / "dev.csv", [FILMS[0], ("new", "bad"), ("newer", "good")])
    found = findings(files(data=train, validation_data=dev))
    for sentence in (
        "texts from 'text' and labels from 'label', by their names",
        "words in 'label' are classes",
        f"1 row without a text left out, the first in {train}, line 36",
        f"1 row without a label left out, the first in {train}, line 37",
        "36 rows to train on, 3 to validate on",
        "3 classes: 'good' in 63.9% of the training rows, 'awful' in 5.6%",
        "1 training row repeats an earlier one, text and label: kept",
        f"texts of 1 of 3 validation rows, the first in {dev}, line 2, are trained on: scores are too good",
        "1 text with different labels in different training rows: 'doubtful' is good (line 34), bad (line 35)",
        "fewer than 5 training rows each: 'awful'",
    ):
        assert sentence in found  # fmt: skip


def test_banking77_is_77_classes(data_dir):
    folder = data_dir / "intents" / "banking77"
    task = files(data=str(folder / "train.csv"), validation_data=str(folder / "test.csv"))
    assert list(task.likelihood.names) == sorted(json.loads((folder / "categories.json").read_text()))
    rows = task.validate(task.load())
    assert len(rows["train"]) == 10003 and len(rows["eval"]) == 3080 and task.text_columns == ("text",)
    last = rows["eval"][-1]
    frame = pd.read_csv(folder / "test.csv")
    assert (last["text"], task.likelihood.names[last["label"]]) == tuple(frame.iloc[-1])


def test_nlu_is_several_labels_a_row(data_dir):
    folder = data_dir / "multilabel"
    task = files(data=str(folder / "hotels_train.jsonl"), validation_data=str(folder / "hotels_dev.jsonl"))
    rows = [json.loads(line) for line in (folder / "hotels_dev.jsonl").read_text().splitlines()]
    held_out = task.validate(task.load())["eval"]
    assert (
        isinstance(task.likelihood, MultiLabel) and len(held_out) == len(rows) == 200 and task.metric_name == "micro_f1"
    )
    for row, own in zip(held_out, rows, strict=True):
        assert {name for name, x in zip(task.likelihood.names, row["label"], strict=True) if x} == set(own["labels"])


def test_similarities_are_a_number(glue_dir):
    task = files(data=str(glue_dir / "STS-B" / "train.tsv"), validation_data=str(glue_dir / "STS-B" / "dev.tsv"))
    assert task.likelihood == Normal(0, 5) and task.text_columns == ("sentence1", "sentence2")
    assert task.metric_name == "pearson" and len(task.validate(task.load())["eval"]) == 1500


def test_a_saved_folder_keeps_names_and_brings_its_validation_rows(glue_dir, tmp_path):
    names = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    splits = {}
    for split, file in (("train", "train.tsv"), ("validation", "dev.tsv")):
        frame = pd.read_csv(glue_dir / "MRPC" / file, sep="\t", quoting=3, encoding="utf-8-sig")
        table = {"sentence1": frame["#1 String"], "sentence2": frame["#2 String"], "label": frame["Quality"]}
        splits[split] = datasets.Dataset.from_dict(table).cast_column("label", names)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "mrpc")
    task = files(data=str(tmp_path / "mrpc"))
    assert task.likelihood.names == ("not_equivalent", "equivalent") and task.text_columns == ("sentence1", "sentence2")
    rows = task.load(n_train=10)
    assert len(rows["train"]) == 10 and len(rows["eval"]) == 408
    assert rows["eval"]["label"][:] == splits["validation"]["label"][:]


def test_fewer_rows_are_taken_without_a_bar_of_the_library(forget, capfd):
    task = from_frame("films_cut_short", pd.DataFrame(FILMS, columns=["text", "label"]))
    assert len(task.load(n_train=10)["train"]) == 10
    assert capfd.readouterr() == ("", "")


def test_a_frame_is_a_task_with_the_same_findings(forget):
    frame = pd.DataFrame(FILMS, columns=["text", "label"])
    task = check_task(from_frame("films_of_a_frame", frame))
    assert register_task(task) is task and get_task("films_of_a_frame") is task
    assert "20% of the texts were drawn" in findings(task) and task.likelihood.names == ("bad", "good")
    stars = frame.assign(stars=[x / 7 for x in range(30)], title="a", several=[["a"], ["b"], []] * 10)
    number = from_frame("stars", stars, stars.head(5), text=("title", "text"), label="stars")
    assert isinstance(number.likelihood, Normal) and number.text_columns == ("title", "text")
    assert "texts of 5 of 5 validation rows, the first in validation, row 1, are trained on" in findings(number)
    assert from_frame("several", stars, label="several", text="text").likelihood == MultiLabel(("a", "b"))


def test_a_file_that_changes_between_two_calls_is_read_again(tmp_path):
    path = write(tmp_path / "films.csv", FILMS)
    before = files(data=path)
    assert files(data=path) is before
    write(tmp_path / "films.csv", [*FILMS, ("another film", "awful"), ("one more", "awful")])
    assert files(data=path).likelihood.names == ("awful", "bad", "good")


@pytest.mark.parametrize(("rows", "dev", "flags", "sentence"), [
    ([], None, "", "films.csv has no rows: it needs some under its columns"),
    ([("a", "x"), ("b", "x")], None, "", "line 2 and all other rows have the label 'x': two classes or more"),
    ([("a", "x"), ("b", "y")], None, "", "2 different texts are too few to split: give --validation_data"),
    (FILMS, [("new", "great")], "", "dev.csv, line 2: the label 'great' is not among those in training: bad, good"),
    (FILMS, [], "", "dev.csv has no rows"),
    (FILMS, FILMS, "--text review", "has no column 'review' for --text"),
    (FILMS, FILMS, "--text text --label text", "column 'text' is both text and label"),
    (FILMS, FILMS, "--task sst2", "--data is of --task files, not of 'sst2': drop one of them"),
    (FILMS, FILMS, "--task.data other.csv", "--data and --task.data are one setting: give it once"),
    (FILMS, FILMS, "--task.kind classes", "kind must be one of categorical, normal, multi_label"),
    (FILMS, FILMS, "--task.kind normal", "line 2: the label 'bad' is no finite number"),
    ([("a",), *FILMS], FILMS, "", "films.csv, line 2: 1 field, but the header has 2"),
    ([("", "bad")] * 40 + FILMS, FILMS, "", "40 of 70 rows are broken or have no label"),
])  # fmt: skip
def test_what_cannot_be_trained_is_one_sentence_and_leaves_nothing(tmp_path, capsys, rows, dev, flags, sentence):
    line = ["--data", write(tmp_path / "films.csv", rows), *shlex.split(flags), "--output_dir", str(tmp_path / "runs")]
    line += [] if dev is None else ["--validation_data", write(tmp_path / "dev.csv", dev)]
    assert main(["train", *line, "--quiet"]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "runs").exists()


def test_a_validation_file_must_have_the_columns(tmp_path):
    dev = write(tmp_path / "dev.csv", FILMS, header="text,stars")
    with pytest.raises(ValueError, match=r"dev.csv lacks the columns \['label'\] of .*films.csv; it has the columns"):
        files(data=write(tmp_path / "films.csv", FILMS), validation_data=dev)


def test_a_run_is_named_after_its_file():
    config = RunConfig(task="files", task_settings={"data": "data/reviews.v2.csv"})
    assert config.folder_name.startswith("reviews.v2-demo-bops-")
    named = {source: RunConfig(task="files", task_settings={"data": source}).folder_name.partition("-")[0]
             for source in ("banking77/train.csv", "train.csv", "someone/reviews", "saved/")}  # fmt: skip
    assert [*named.values()] == ["banking77", "train", "reviews", "saved"]
    assert RunConfig(task="sst2").folder_name.startswith("sst2-") and RunConfig(task="files").folder_name.startswith(
        "files-"
    )


def test_flags_of_files_choose_the_task_whatever_the_preset(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("pyro_blora.__main__.prepare", lambda quiet: seen.append("prepared"))
    monkeypatch.setattr("pyro_blora.config.run_config.RunConfig.require_known", lambda config: seen.append(config))
    monkeypatch.setattr("pyro_blora.run.train_run", lambda config, quiet: tmp_path)
    monkeypatch.setattr("pyro_blora.distributed.leave", lambda code=0: None)
    assert (
        main(
            [
                "train",
                "--preset",
                "demo",
                "--data",
                "a b.csv",
                "--text",
                "one,two",
                "--label",
                "stars",
                "--validation_data",
                "none",
            ]
        )
        == 0
    )
    config = seen[0]
    assert config.task == "files"
    assert config.task_settings == {"data": "a b.csv", "validation_data": None, "text": "one,two", "label": "stars"}
    again = command_line(config)
    assert "--task files --data 'a b.csv' --task.validation_data null --text one,two --label stars" in again
    settings, rest = take_settings(shlex.split(again)[1:])
    assert RunConfig(**run_fields(_parser().parse_args(rest), settings)) == config


def test_a_csv_becomes_a_run_with_its_data_on_the_page(tmp_path, capsys, drawn_here):
    """End to end on a tiny BERT: a long row is cut, and everything that was found reaches summary and page."""
    backbone = save_tiny_backbone(tmp_path / "backbone", letters=True)
    long = " ".join(["endless"] * 40)
    path = write(tmp_path / "films.csv", [*FILMS, (long, "good"), (long + " film", "good")])
    settings = {"data": path, "label": "label"}
    changes = {
        "task": "files",
        "task_settings": settings,
        "output_dir": str(tmp_path / "runs"),
        "max_train": 16,
        "epochs": 1,
    }
    run = train_run(tiny_config(backbone, **changes))
    assert run.name.startswith("films-")
    shown = capsys.readouterr()
    assert (
        f"Data of {path}:" in shown.err
        and "rows have more than 32 tokens and are cut: --max_length reads more" in shown.err
    )
    assert "macro_f1" in shown.out and "films · " in shown.out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"]["truncated"]["eval"] + summary["data"]["truncated"]["train"] > 0
    assert {"accuracy", "macro_f1", "matthews_correlation"} == set(summary["scores"]) == set(summary["beside"]) - {
        "nll", "brier", "ece"
    }  # fmt: skip
    known = {name for name in summary["scores"] if summary["beside"][name]["standard_error"] is not None}
    assert known >= {name for name, x in summary["scores"].items() if 0 < x < 1}
    (rows,) = summary["tables"].values()
    assert {row["label"] for row in rows} == {"bad", "good"} and sum(row["number"] for row in rows) == summary["n_eval"]
    page = (run / "report.html").read_text()
    for words in (
        "<h2>Data</h2>",
        "words in &#39;label&#39; are classes",
        "Rows by label",
        "Scores by label, worst first",
    ):
        assert words in page
    assert f"--data {path}" in page
    table = pd.read_parquet(run / "predictions.parquet")
    assert {"text", "idx", "label", "p_bad", "p_good"} <= set(table)
    assert load(run).likelihood.names == ("bad", "good")

    config, before = RunConfig.from_json(run / "config.json"), state_of(tmp_path / "runs")
    line = [*shlex.split(command_line(config))[1:], "--if_finished", "show"]
    assert main(line) == 0
    Path(path).write_text(Path(path).read_text().replace("bad", "worse"))
    for words in (line, line[:-2]):
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"{run} is a finished run of {path} as it was before it changed: give another --output_dir" in said
    with pytest.raises(ValueError, match="as it was before it changed"):
        require_same_data(run, config)
    assert state_of(tmp_path / "runs") == before
