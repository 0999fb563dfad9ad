"""The task `squad`: answers that are parts of a paragraph, from files to exact match, F1, answers and exports."""

import json
import random
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import save_tiny_backbone, tiny_config
from torchmetrics.functional.text import squad as torchmetrics_squad

from pyro_blora import load
from pyro_blora.__main__ import main
from pyro_blora.deploy import predict_file
from pyro_blora.deploy.opening import load_to_predict
from pyro_blora.posterior.arviz_compat import group, read
from pyro_blora.run import train_run
from pyro_blora.tasks import get_task
from pyro_blora.tasks.span_scores import SpanScores, exact_match, f1, normalized
from pyro_blora.training import fit

pytestmark = pytest.mark.usefixtures("eager", "drawn")
ADJECTIVES, NOUNS = ("old", "small", "cheap"), ("teacher", "doctor", "artist")
OTHERS = ("the", "smiled", "was", "near", "beside", "these", "behind", "ball", "has", "at")


def paragraph(number):
    """The answer is the person of which something is said; long ones need several windows."""
    draw = random.Random(number)
    answer = f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"
    words = [draw.choice(OTHERS) for _ in range(draw.choice((6, 12, 48)))]
    words.insert(draw.randrange(len(words)), answer)
    context = " ".join(words)
    start = context.index(answer)
    whole = {"text": answer, "answer_start": start}
    part = {"text": answer.split()[1], "answer_start": start + answer.index(" ") + 1}
    qas = [{"id": f"q{number}", "question": "who smiled", "answers": [whole, part, whole][: 1 + 2 * (number % 2)]}]
    return {"context": context, "qas": qas}


def write(path, paragraphs):
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "Singers", "paragraphs": paragraphs}]}))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    return {
        "squad_train": str(write(folder / "train.json", [paragraph(i) for i in range(96)])),
        "squad_eval": str(write(folder / "eval.json", [paragraph(i) for i in range(1000, 1024)])),
    }


@pytest.fixture(scope="module")
def config(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spans")
    return tiny_config(
        save_tiny_backbone(folder / "backbone", num_hidden_layers=1), task="squad",
        task_settings={**files, "stride": 6, "best": 8},
        max_train=None, epochs=6, lr=2e-2, lr_head=2e-2, draws=2, checkpoint_steps=99,
        output_dir=str(folder / "runs"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config):
    return train_run(config)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "references", "exact", "overlap"), [
    ("The Denver Broncos!", ["Denver Broncos", "Broncos"], 1.0, 1.0),  # articles, capitals, punctuation
    ("Denver", ["Denver Broncos", "the Broncos"], 0.0, 2 / 3),  # 1 of 1 word, 1 of 2
    ("in 1973  and in 1974", ["1973 in"], 0.0, 4 / 7),  # in twice counts once: 2 of 5, 2 of 2
    ("well-known", ["well known"], 0.0, 0.0),  # punctuation goes, and leaves no blank
    ("the", ["a"], 1.0, 0.0),  # nothing is left of both: equal, and no word in common
    ("theatre", ["a theatre"], 1.0, 1.0),  # an article is a whole word
    ("$400", ["400", "€400"], 1.0, 1.0),
    ("Saint Bernadette Soubirous", ["Bernadette", "Saint  Bernadette"], 0.0, 0.8),
])  # fmt: skip
def test_hand_checked_answers(answer, references, exact, overlap):
    assert (exact_match(answer, references), f1(answer, references)) == (exact, pytest.approx(overlap))


def test_scores_are_those_of_another_implementation():
    draw = random.Random(0)
    words = [*OTHERS, "A", "an", "U.S.", "well-known", "(1973)", "Ünïcode", "—"]
    each = [(_text(draw, words), [_text(draw, words) for _ in range(draw.randint(1, 4))]) for _ in range(300)]
    each += [(references[0].upper(), references) for _, references in each[:50]]
    texts = [" ".join([answer, *references]) for answer, references in each]
    predictions, labels = [], []
    for number, (answer, references) in enumerate(each):
        edges = np.cumsum([0, *(len(x) + 1 for x in (answer, *references))]).tolist()
        predictions.append([number, 0, 0, len(answer)])
        spans = zip(edges[1:], references, strict=False)
        labels.append([number, 0, *(x for start, text in spans for x in (start, start + len(text)))])
    ours = SpanScores(dict(enumerate(texts))).compute(predictions=predictions, references=labels)
    theirs = of_torchmetrics(each)
    assert ours == {key: pytest.approx(value) for key, value in theirs.items()} and 0 < ours["exact_match"] < ours["f1"]


def _text(draw, words):
    """With a word that stays, as other implementations have the rule of SQuAD 2.0 where none does."""
    return " ".join(["ball", *(draw.choice(words) for _ in range(draw.randint(0, 4)))])


def of_torchmetrics(pairs):
    answers = [{"prediction_text": answer, "id": str(i)} for i, (answer, _) in enumerate(pairs)]
    truth = [
        {"answers": {"text": list(x), "answer_start": [0] * len(x)}, "id": str(i)} for i, (_, x) in enumerate(pairs)
    ]
    return {key: value.item() / 100 for key, value in torchmetrics_squad(answers, truth).items()}


# --- a run ------------------------------------------------------------------------------------------------------------


def test_it_is_learned_and_its_scores_are_those_of_the_answers_texts(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["n_train"] == 96 and summary["n_eval"] == 24  # questions, not windows
    assert summary["metric"]["name"] == "f1"
    beside = summary["beside"]
    assert summary["scores"]["f1"] > beside["f1"]["constant"] + 2 * (beside["f1"]["standard_error"] or 0.0)
    assert summary["nll"] < beside["nll"]["constant"]
    table = pd.read_parquet(run / "predictions.parquet")
    assert summary["scores"] == pytest.approx(of_torchmetrics([*zip(table["answer"], table["answers"], strict=True)]))
    for _, row in table.iterrows():
        assert [row["context"][start:end] for start, end in row["spans"]] == [*row["n_best"]]
        assert row["answer"] == row["n_best"][0] and row["probability"] == row["probabilities"][0]
        assert [*row["probabilities"]] == sorted(row["probabilities"], reverse=True) and row["entropy"] > 0
        assert np.exp(row["log_likelihood"]) <= 1 and sum(row["probabilities"]) <= 1 + 1e-5
    data = group(read(run), "predictions")
    assert data["span"].dims[-2:] == ("example", "edge") and data["entropy"].shape[-1] == 24


def test_the_page_has_the_gates_and_the_wrong_answers(run):
    page = (run / "report.html").read_text()
    assert "Gate map" in page and "exact_match" in page and "these are the most probable" in page
    assert "<h2>Calibration</h2>" not in page


def test_a_cut_training_resumes_to_the_same_bits(config, tmp_path):
    short = tiny_config(config.backbone, **{"task": "squad", "task_settings": config.task_settings, "max_train": 24,
                                            "output_dir": str(tmp_path), "batch_size": 8})  # fmt: skip
    whole = fit(short, folder=tmp_path / "whole", quiet=True)
    for until in (3, None):
        again = fit(short, folder=tmp_path / "cut", quiet=True, until=until)
    state = again.program.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in whole.program.state_dict().items())


def test_a_table_of_questions_is_answered_with_texts(run, tmp_path, capsys):
    asked = [{"question": "who smiled", "context": f"{before}near the ball the {who} smiled at these books"}
             for before, who in (("", "old teacher"), (" ", "small doctor"), ("\n\t", "old doctor"))]  # fmt: skip
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    assert main(["predict", str(run), str(tmp_path / "asked.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, own in zip(rows, asked, strict=True):
        assert row["answer"] in own["context"] and 0 < row["probability"] <= 1 and row["entropy"] >= 0
        assert [own["context"][start:end] for start, end in row["spans"]] == row["n_best"] and len(row["n_best"]) == 8
    assert list(rows[0])[1:5] == ["answer", "probability", "entropy", "n_best"]
    assert main(["predict", str(run), str(tmp_path / "asked.jsonl"), "--confidence", "0.9"]) == 2
    assert "confidence needs a confidence, there is none" in capsys.readouterr().err


def test_a_question_that_cannot_be_read_is_left_out_or_ends_the_work_with_its_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict_file, "CHUNK", 3)
    long, source, out = "who " * 40, tmp_path / "asked.jsonl", tmp_path / "out.csv"
    questions = ["who smiled", long, "who smiled", *[long] * 3, "who smiled"]  # the second three are all left out
    rows = [{"question": question, "context": "near the ball the old teacher smiled"} for question in questions]
    source.write_text("\n".join(map(json.dumps, rows)))
    line = ["predict", str(run), str(source), "--out", str(out), "--quiet"]
    assert main(line) == 2 and not out.exists()
    told = capsys.readouterr().err
    assert f"{source}, line 2: the question 'who who" in told and "raise it, or leave such rows out with --on" in told
    assert main([*line, "--on_error", "skip"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert [re.search(r"left out: .*, line (\d): the question", each)[1] for each in told] == ["2", "4", "5", "6"]
    table = pd.read_csv(out)
    assert table["line"].tolist() == [1, 3, 7] and table["answer"].nunique() == 1
    source.write_text(json.dumps(rows[1]))
    assert main([*line, "--on_error", "skip", "--overwrite"]) == 2 and len(pd.read_csv(out)) == 3
    assert "has no rows to predict" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["packed", "onnx", "peft"])
def test_exports_give_the_deployed_answers(run, form, tmp_path, capsys):
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    assert main(["export", str(run), "--to", str(tmp_path / form), "--format", form]) == 0
    told = capsys.readouterr()
    assert "24 held-out rows: f1 " in told.out + told.err
    if form == "peft":
        assert json.loads((tmp_path / form / "adapter_config.json").read_text())["task_type"] == "QUESTION_ANS"
        return
    assert "0 decisions differ" in told.out + told.err
    table = pd.read_parquet(run / "predictions.parquet").head(6)
    found = load_to_predict(tmp_path / form).predict(table)
    expected = load(run).predict(table, deployed=True)
    assert found["answer"].tolist() == expected["answer"].tolist()


@pytest.mark.parametrize("changes", [{"weights": "gaussian", "distillation": 0.5}])  # fmt: skip
def test_every_part_of_the_house_takes_it(config, tmp_path, changes):
    values = {"epochs": 2, "max_train": 16, "batch_size": 8, "output_dir": str(tmp_path), "task": "squad", **changes}
    settings = {**config.task_settings, "held_out": 6}
    assert load(train_run(tiny_config(config.backbone, task_settings=settings, **values))).likelihood.stride == 6


# --- files ------------------------------------------------------------------------------------------------------------


def answered(**changes):
    whole = {"text": "old teacher", "answer_start": 4}
    question = {"id": "q", "question": "who smiled", "answers": [whole], **changes}
    return {"context": "the old teacher smiled", "qas": [question]}


@pytest.mark.parametrize(("content", "message"), [
    ([answered(answers=[{"text": "old", "answer_start": 3}])], "the answer 'old' does not stand in its context at"),
    ([answered(answers=[{"text": "smiled", "answer_start": 90}])], "does not stand in its context at character 90"),
    ([answered(answers=[{"text": "s", "answer_start": -1}])], "does not stand in its context at character -1"),
    ([answered(answers=[{"text": "old", "answer_start": "4"}])], "`answer_start` of 'old' must be a whole number"),
    ([answered(answers=[{"text": " ", "answer_start": 3}])], "has no text `text`"),
    ([answered(answers=[])], "question 'q' has no answer, every question of SQuAD 1.1 has one: leave it out"),
    ([answered(answers=None)], "has no list `answers`"),
    ([answered(answers=["old"])], "has no text `text`"),
    ([answered(question="")], "has no text `question`"),
    ([{**answered(), "context": 3}], "paragraph 1 has no text `context`"),
    ([{"context": "the"}], "article 'Singers', paragraph 1 has no list `qas`"),
    (["the"], "paragraph 1 has no list `qas`"),
    ([], "has no questions"),
    ({}, "article 'Singers' has no list `paragraphs`"),
    (b'{"data": 3}', "has no list `data`"), (b"[]", "has no list `data`"), (b'{"data"', "is not JSON"),
    (b"\x1f\x8b", "is compressed by gzip"), (b'{"data": ["\xff"]}', "is no UTF-8"),
])  # fmt: skip
def test_a_bad_file_is_one_sentence(files, content, message, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    line = ["train", "--task", "squad", "--squad_train", files["squad_train"], "--squad_eval", str(path)]
    assert main([*line, "--output_dir", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bad.json" in told and message in told, told


@pytest.mark.parametrize(("flags", "message"), [
    (["--squad_train", "nowhere.json", "--squad_eval", "nowhere.json"], "there is no file nowhere.json"),
    (["--squad_eval", "x.json"], "task 'squad' has one file only: give --squad_train, too"),
    ([], "the hub's rajpurkar/squad cannot be read"),
    (["--task.held_out", "0"], "--task.held_out must be at least 1, got 0"),
    (["--task.longest", "0"], "longest must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_sentence(flags, message, tmp_path, capsys):
    assert main(["train", "--task", "squad", *flags, "--output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_public_data_is_read_whole(data_dir):
    folder = data_dir / "squad"
    if not folder.is_dir():
        pytest.skip(f"no questions at {folder}")
    files = {"squad_train": str(folder / "dev-v1.1.rebuilt.json"), "squad_eval": str(folder / "xquad.en.json")}
    task = get_task("squad", files)
    rows = task.validate(task.load())
    assert (len(rows["train"]), len(rows["eval"])) == (10570, 1190)
    assert len(task.load(n_train=100)["train"]) == 100
    row = rows["eval"][0]
    number, words, start, end, *_ = row["label"]
    assert row["context"][start:end] == row["answers"][0] == "308" and words == len(row["context"].split())
    whole = [[number, words, 0, len(row["context"])]]
    found = task.metric().compute(predictions=whole, references=[row["label"]])
    assert found == {"exact_match": 0.0, "f1": pytest.approx(2 / (len(normalized(row["context"]).split()) + 1))}
