"""`pyro-blora predict`: what comes out is what `model.predict` gives, from any table, whole or not at all."""

import csv
import io
import json
import os
import re
import signal
import sys
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from forked import started
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import load
from pyro_blora.__main__ import main
from pyro_blora.deploy import predict_file
from pyro_blora.run import train_run
from pyro_blora.tasks import get_task
from pyro_blora.tasks.tabular.reading import Table

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(save_tiny_backbone(folder / "backbone"), max_train=32, epochs=1, weights="gaussian")
    return train_run(config.replace(output_dir=str(folder)))


@pytest.fixture(scope="module")
def texts():
    found = list(get_task("acceptability").load(n_train=64)["eval"]["sentence"][:40])
    found[3] = f'{found[3]}\nand "quoted", twice'
    return found


@pytest.fixture(scope="module")
def expected(run, texts):
    return load(run).predict(texts)


def predicted(argv, capsys, code=0):
    """(stdout, stderr) of a command."""
    capsys.readouterr()
    found = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err


@pytest.fixture
def table(texts, tmp_path):
    path = tmp_path / "texts.csv"
    pd.DataFrame({"id": range(len(texts)), "sentence": texts, "label": "?"}).to_csv(path, index=False)
    return path


def require_same(found, expected):
    for name in expected:
        if expected[name].dtype.kind == "f":
            np.testing.assert_allclose(found[name].astype(float), expected[name], atol=1e-6, err_msg=name)
        else:
            assert [*found[name]] == [*expected[name]], name


def test_csv_goes_to_stdout_in_the_order_of_the_file(run, table, expected, capsys):
    out, _ = predicted(["predict", run, table, "--quiet"], capsys)
    found = pd.read_csv(io.StringIO(out))
    assert [*found] == ["line", *expected] and [*found["line"][:6]] == [2, 3, 4, 5, 7, 8]  # one has two lines
    require_same(found, expected)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_has_the_same_and_what_is_kept(run, table, texts, expected, tmp_path, capsys, suffix):
    path = tmp_path / f"answers{suffix}"
    argv = ["predict", run, table, "--out", path, "--keep", "all", "--quiet", "--coverage", "0.8"]
    out, err = predicted(argv, capsys)
    assert out == f"{path}\n" and err == "" and sorted(x.name for x in tmp_path.iterdir()) == [path.name, table.name]
    if suffix == ".jsonl":
        found = pd.DataFrame(map(json.loads, path.read_text().splitlines()))
    else:
        found = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    assert [*found["sentence"]] == texts and {*found["input_label"]} == {"?"}
    require_same(found, expected)
    sets = [json.loads(x) if suffix == ".csv" else [*x] for x in found["set"]]
    assert sets == [*load(run).predict(texts, coverage=0.8)["set"]]
    predicted(argv, capsys, code=2)  # it is there now
    predicted([*argv, "--overwrite"], capsys)


def test_parquet_has_the_type_that_every_kept_cell_has(run, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict_file, "CHUNK", 2)  # later cells are of other types than the first ones
    kept = {  # what is read, and what is written
        "number": ([7, 8, 9, None, 11],) * 2, "score": ([0, 1, 2, None, 0.9], [0.0, 1.0, 2.0, None, 0.9]),
        "large": ([2**60 + 1, 2, 3, 4, 0.5], ["1152921504606846977", "2", "3", "4", "0.5"]),
        "code": ([1, 2, 3, 4, "n/a"], ["1", "2", "3", "4", "n/a"]), "flag": ([True, False, True, None, True],) * 2,
        "object": ([{"a": 1}, {"a": 2}, {}, {"b": 1}, None], ['{"a": 1}', '{"a": 2}', "{}", '{"b": 1}', None]),
    }  # fmt: skip
    source, path = tmp_path / "rows.jsonl", tmp_path / "answers.parquet"
    cells = {"sentence": texts[:5], **{name: before for name, (before, _) in kept.items()}}
    rows = [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    predicted(["predict", run, source, "--out", path, "--keep", ",".join(kept)], capsys)
    found = pq.read_table(path).to_pydict()
    assert {name: found[name] for name in kept} == {name: after for name, (_, after) in kept.items()}
    assert [type(found[name][0]) for name in kept] == [int, float, str, str, bool, str]
    monkeypatch.setattr(sys, "stdin", io.StringIO(source.read_text()))  # which is read once
    predicted(["predict", run, "-", "--format", "jsonl", "--out", path, "--keep", "score", "--overwrite"], capsys)
    assert pq.read_table(path).to_pydict()["score"] == ["0", "1", "2", None, "0.9"]
    again = tmp_path / "again.parquet"  # of a file that has types they stay
    pd.DataFrame({"sentence": texts[:3], "when": pd.to_datetime(["2026-11-29"] * 3)}).to_parquet(tmp_path / "x.parquet")
    predicted(["predict", run, tmp_path / "x.parquet", "--out", again, "--keep", "when"], capsys)
    assert pq.read_schema(again).field("when").type == pq.read_schema(tmp_path / "x.parquet").field("when").type


def test_a_lone_carriage_return_is_inside_its_cell(run, texts, tmp_path, capsys):
    source, path = tmp_path / "rows.jsonl", tmp_path / "answers.csv"
    notes = ["a\rb", 'say "a"\r\n', "c,d", "e\nf", "\r"]
    source.write_text(
        "".join(json.dumps({"sentence": t, "note": n}) + "\n" for t, n in zip(texts, notes, strict=False))
    )
    predicted(["predict", run, source, "--out", path, "--keep", "note"], capsys)
    assert [cells["note"] for _, cells in Table(path).rows()] == notes
    with path.open(newline="") as file:
        assert [row["note"] for row in csv.DictReader(file)] == notes


def test_kept_columns_never_take_each_others_place(run, texts, tmp_path, capsys):
    source, path = tmp_path / "rows.csv", tmp_path / "answers.csv"
    pd.DataFrame({"input_label": ["a"], "sentence": texts[:1], "label": ["b"], "line": ["c"]}).to_csv(
        source, index=False
    )
    predicted(["predict", run, source, "--out", path, "--keep", "all"], capsys)
    found = pd.read_csv(path).iloc[0]
    assert [found[name] for name in ("input_label", "input_input_label", "input_line")] == ["a", "b", "c"]


def test_numbers_are_texts_as_in_training_and_half_a_character_is_none(run, tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"sentence": 1984}\n{"sentence": "1984"}\n{"sentence": "a \\ud83d"}\n')
    out, err = predicted(["predict", run, source, "--on_error", "skip", "--keep", "sentence"], capsys)
    first, second = pd.read_csv(io.StringIO(out)).to_dict("records")
    assert first | {"line": 2} == second
    assert f"left out: {source}, line 3: half of a surrogate pair" in err
    _, err = predicted(["predict", run, source], capsys, code=2)
    assert f"{source}, line 3: half of a surrogate pair" in err and "Traceback" not in err
    with pytest.raises(ValueError, match=r"row 1 \(from 0\), 'sentence': 'a \\ud83d' is no text"):
        load(run).predict(["fine", "a \ud83d"])


def test_chunks_change_nothing_but_the_padding(run, table, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_file, "CHUNK", 7)
    assert predict_file.predict_file(run, table, out=tmp_path / "answers.csv") == len(expected)
    found = pd.read_csv(tmp_path / "answers.csv")
    assert (found["label"] == expected["label"]).mean() > 0.9
    np.testing.assert_allclose(found["p_acceptable"], expected["p_acceptable"], atol=0.05)


def test_the_standard_input_is_read_as_it_comes(run, texts, expected, capsys, monkeypatch):
    lines = "".join(json.dumps({"review": text}) + "\n" for text in texts)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    out, err = predicted(["predict", run, "-", "--format", "jsonl", "--text", "review"], capsys)
    require_same(pd.read_csv(io.StringIO(out)), expected)
    assert "40 rows" in err or "predicting" in err


def test_malformed_rows_are_reported_and_left_out_or_end_the_work(run, tmp_path, capsys):
    path, out = tmp_path / "bad.csv", tmp_path / "out.csv"
    path.write_text('sentence,id\nThe soldier,1\n,2\nThe lawyer,3,4,5\n"The dog",6\n')
    _, err = predicted(["predict", run, path, "--out", out, "--quiet"], capsys, code=2)
    assert f"{path}, line 3: '' in column 'sentence' is no text" in err and "--on_error skip" in err
    assert [*tmp_path.iterdir()] == [path]
    _, err = predicted(["predict", run, path, "--out", out, "--quiet", "--on_error", "skip"], capsys)
    assert "left out" in err and f"{path}, line 3" in err and f"{path}, line 4" in err
    assert [row["line"] for row in csv.DictReader(out.open())] == ["2", "5"]
    path.write_text("sentence\n" + '""\n' * 20)
    _, err = predicted(["predict", run, path, "--on_error", "skip"], capsys, code=2)
    assert "has no rows to predict" in err


def jsonl(*lines):
    return lambda path: path.with_suffix(".jsonl").write_text("\n".join(lines))


HOSTILE = {
    "missing": (None, [], "there is no file"),
    "empty": ("", [], "is empty"),
    "header alone": ("sentence\n", [], "has no rows to predict"),
    "other columns": ("text\nhello\n", [], "no column 'sentence', the run's text column: name yours with --text"),
    "no such text": ("sentence\nhello\n", ["--text", "sentense"], "did you mean 'sentence'"),
    "two for one": ("sentence,b\nhello,x\n", ["--text", "sentence,b"], "texts have 1 columns, sentence: name each"),
    "no such kept": ("sentence\nhello\n", ["--keep", "idd"], "--keep: .* has no column 'idd'"),
    "ending": ("sentence\nhello\n", ["--out", "{tmp}/x.xlsx"], "the ending must be one of .csv, .jsonl, .parquet"),
    "no folder": ("sentence\nhello\n", ["--out", "{tmp}/gone/x.csv"], "there is no folder"),
    "a folder": ("sentence\nhello\n", ["--out", "{tmp}/folder.csv"], "exists already"),
    "draws": ("sentence\nhello\n", ["--draws", "0"], "draws must be at least 1"),
    "no number": ("sentence\nhello\n", ["--draws", "many"], "invalid int value: 'many'"),
    "abstain": ("sentence\nhello\n", ["--abstain", "90"], "abstain must be a share"),
    "seed": ("sentence\nhello\n", ["--seed", "-1"], "seed must be"),
    "flag": ("sentence\nhello\n", ["--draw", "3"], "unknown argument '--draw': did you mean '--draws'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_every_bad_input_is_one_sentence_and_leaves_nothing(run, tmp_path, capsys, case):
    content, flags, message = HOSTILE[case]
    (tmp_path / "folder.csv").mkdir()
    path = tmp_path / "in.csv"
    if content is not None:
        path.write_text(content)
    before = sorted(tmp_path.rglob("*"))
    out, err = predicted(["predict", run, path, *(x.format(tmp=tmp_path) for x in flags)], capsys, code=2)
    last = err.strip().splitlines()[-1]
    assert last.startswith("pyro-blora: error: ") and re.search(message, last), last
    assert out == "" and sorted(tmp_path.rglob("*")) == before


def test_no_run_is_one_sentence(tmp_path, capsys):
    (tmp_path / "in.csv").write_text("sentence\nhello\n")
    _, err = predicted(["predict", tmp_path, tmp_path / "in.csv"], capsys, code=2)
    assert "is not a finished run" in err


def test_a_signal_leaves_nothing_half_written(run, tmp_path, tmp_path_factory):
    path, out = tmp_path / "many.csv", tmp_path / "out.csv"
    path.write_text("sentence\n" + "The soldier painted the bike.\n" * 200_000)
    printed = tmp_path_factory.mktemp("printed") / "printed.txt"
    process = started(lambda: main(["predict", str(run), str(path), "--out", str(out), "--quiet"]), printed)
    partial = tmp_path / ".out.csv.partial"
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process, signal.SIGTERM)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 143 and "interrupted" in printed.read_text("utf-8")
    assert [*tmp_path.iterdir()] == [path]
