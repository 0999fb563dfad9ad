"""Pairs of one's own from CSV: what is read, what is refused and how, and scores that see both answers."""

import csv
import gzip

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from pyro_blora.tasks import get_task
from pyro_blora.tasks.pairs import read_pairs
from pyro_blora.tasks.tabular.encodings import LONGEST

GOOD = 'first,second,label\n"P53, human",MDM2,yes\nA,"B ""x""",NO\n'


def written(folder, train=GOOD, dev=GOOD):
    for name, text in (("train.csv", train), ("dev.csv", dev)):
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_texts_and_labels_are_read_as_written(tmp_path):
    task = get_task("pairs")
    splits = task.validate(task.load(glue_dir=written(tmp_path)))
    assert splits["train"][:] == {"first": ["P53, human", "A"], "second": ["MDM2", 'B "x"'], "label": [1, 0]}
    assert len(task.load(glue_dir=tmp_path, n_train=1)["train"]) == 1


def test_columns_may_be_in_any_order_beside_others_with_a_byte_order_mark(tmp_path):
    text = "\ufefflabel,source,second,first\nyes,STRING,b,a\n"
    assert get_task("pairs").load(glue_dir=written(tmp_path, text))["train"][0] == {
        "first": "a", "second": "b", "label": 1,
    }  # fmt: skip


def test_long_texts_are_read_whole(tmp_path):
    csv.field_size_limit(131_072)  # of Python's csv module, before anything has raised it
    long = "x" * 200_000
    rows = get_task("pairs").load(glue_dir=written(tmp_path, f"first,second,label\n{long},b,yes\n"))["train"]
    assert rows["first"][:] == [long] and rows["second"][:] == ["b"]
    written(tmp_path, f"first,second,label\n{'x' * (LONGEST + 1)},b,yes\n")
    with pytest.raises(
        ValueError, match=r"train.csv, line \d: a field has more than 16,777,216 characters: is a quote"
    ):
        get_task("pairs").load(glue_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file .*train.csv: it has the columns first, second and label"),
        ("", "is empty: its first line names the columns, first,second,label"),
        ("first\tsecond\tlabel\na\tb\tyes\n", "its columns are separated by tabs: separate them by commas"),
        ("first,label\na,yes\n", "the header line lacks the columns .'second'., it has"),
        ("first,second,label\na,b,yes\na,b,maybe\n", "line 3: label 'maybe' must be yes or no"),
        ("first,second,label\na,,yes\n", "line 2: a text of the pair is missing"),
        ("first,second,label\na,b\n", "line 2: 2 fields, but the header has 3: put texts that have commas"),
        ("first,label,second\na,yes,b\na,no,b, and more\n", "line 3: 4 fields, but the header has 3: put texts"),
        ("label,second,first,x,x\nyes,b,a,1\n", "line 2: 4 fields, but the header has 5: put texts"),
        ("first,second,label\n", "has no rows under its header"),
        (
            "first,second,label,first\na,b,yes,c\n",
            "the header line names 'first' twice: rename or drop one",
        ),
        ('first,second,label\na,"b,yes\n', r"line \d: a quote is left open until the end of the file: close it"),
        ('"first,second,label\na,b,yes\n', r"line 1: a quote is left open until the end of the file: close it"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        get_task("pairs").load(glue_dir=written(tmp_path, text))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (GOOD.encode("utf-16"), "is UTF-16, not UTF-8 text: convert it: iconv"),
        (GOOD.replace("x", "é").encode("latin-1"), "line 3: byte 0xe9 is no UTF-8.* iconv -f WINDOWS-1252"),
        (gzip.compress(GOOD.encode(), mtime=0), "is compressed by gzip, not UTF-8 text: unpack it: gunzip"),
        (b"PK\x03\x04" + bytes(100), "is a ZIP archive or a spreadsheet, not UTF-8 text: unpack it, or save the sheet"),
    ],
)
def test_a_file_of_another_encoding_is_refused_with_the_remedy(tmp_path, raw, message):
    written(tmp_path)
    (tmp_path / "dev.csv").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'dev.csv'}.*{message}"):
        get_task("pairs").load(glue_dir=tmp_path)


def test_a_byte_of_another_encoding_far_into_a_file_is_refused_with_the_remedy(tmp_path):
    written(tmp_path)
    (tmp_path / "dev.csv").write_bytes(GOOD.encode() + b"a,b,yes\n" * 20_000 + "é,b,yes\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 20004: byte 0xe9 is no UTF-8.* iconv -f WINDOWS-1252"):
        get_task("pairs").load(glue_dir=tmp_path)


def test_it_needs_a_folder():
    with pytest.raises(ValueError, match="pass --glue_dir FOLDER with train"):
        get_task("pairs").load()


def test_scores_are_those_of_the_confusion_matrix():
    generator = np.random.default_rng(0)
    truth, said = (generator.random(200) < 0.3).astype(int), (generator.random(200) < 0.4).astype(int)
    (tn, fp), (fn, tp) = confusion_matrix(truth, said)
    found = get_task("pairs").metric().compute(predictions=said, references=truth)
    assert found["specificity"] == pytest.approx(tn / (tn + fp))
    assert found["sensitivity"] == pytest.approx(tp / (tp + fn))
    denominator = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert found["matthews_correlation"] == pytest.approx((tp * tn - fp * fn) / denominator)
    always_no = get_task("pairs").metric().compute(predictions=[0, 0], references=[0, 1])
    assert always_no["specificity"] == 1.0 and always_no["sensitivity"] == always_no["matthews_correlation"] == 0.0


def test_mrpc_goes_into_the_format_and_back(tmp_path, glue_dir):
    from experiments.mrpc_as_pairs import main
    from pyro_blora.tasks.glue import load_glue

    main(["--glue_dir", str(glue_dir), "--output_dir", str(tmp_path / "out"), "--max_train", "50"])
    rows = read_pairs(tmp_path / "out" / "dev.csv")
    original = load_glue("mrpc", glue_dir=glue_dir)["eval"]
    assert rows["first"][:] == original["sentence1"][:] and rows["label"][:] == original["label"][:]
    with open(tmp_path / "out" / "train.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 50
    with pytest.raises(ValueError, match="exists"):
        main(["--glue_dir", str(glue_dir), "--output_dir", str(tmp_path / "out")])
