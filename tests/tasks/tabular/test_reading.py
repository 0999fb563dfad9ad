"""Tables of a user's: what is read, in which encoding, and what a broken row says."""

import csv
import io
import itertools
import json

import datasets
import pandas as pd
import pytest

from pyro_blora.tasks.tabular.encodings import encoding_of
from pyro_blora.tasks.tabular.reading import Table
from pyro_blora.tasks.tabular.sources import splits_of

NAMES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
WESTERN = "Très déçu par l\u2019hôtel - à éviter\nLe café était très bon\n"
RUSSIAN = "Я смотрел этот фильм вчера вечером.\nУжасно и никогда больше не приду.\n"  # noqa: RUF001
TYPED = datasets.Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]}, features=NAMES)


def write(folder, content, name="rows.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path, **settings):
    return list(Table(path, **settings).rows())


@pytest.mark.parametrize(("content", "expected"), [
    ("text,label\na,1\n", [(2, "a", "1")]),
    ("\ufefftext,label\r\na,1\r\n\r\nb,2\r\n", [(2, "a", "1"), (4, "b", "2")]),
    ('"text","label"\n"a\nb, ""c""",1\nd,2\n', [(2, 'a\nb, "c"', "1"), (4, "d", "2")]),
    ("\n\ntext;label\na,b;1\n", [(4, "a,b", "1")]),
    (" text , label \na,1", [(2, "a", "1")]),
    ("text,label\rold,1\rmac,2\r", [(2, "old", "1"), (3, "mac", "2")]),
    ("text,label,\na,1,\n", [(2, "a", "1")]),
    ("text,label\n", []),
])  # fmt: skip
def test_csv_is_read_with_the_line_of_each_row(tmp_path, content, expected):
    assert [(line, *cells.values()) for line, cells in rows(write(tmp_path, content))] == expected


def test_banking77_has_its_rows_and_quoted_line_breaks(data_dir):
    path = data_dir / "intents" / "banking77" / "train.csv"
    found = rows(path)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        names, lines = next(reader), []
        for cells in reader:
            lines.append((reader.line_num, dict(zip(names, cells, strict=True))))
    assert [cells for _, cells in found] == [cells for _, cells in lines] and len(found) == 10003
    first_lines = [1 + last for last, _ in [(1, None), *lines][: len(found)]]
    assert [line for line, _ in found] == first_lines


@pytest.mark.parametrize(("name", "count", "plain"), [("SST-2", 872, False), ("RTE", 277, True), ("STS-B", 1500, True)])
def test_a_tsv_without_quoting_keeps_its_quotes(glue_dir, name, count, plain):
    table = Table(glue_dir / name / "dev.tsv")
    assert len(list(table.rows())) == count
    assert any("quotes" in remark for remark in table.remarks) is plain


def test_a_tsv_with_quoting_loses_them(tmp_path):
    frame = pd.DataFrame({"text": ['he said "no"', "two\nlines", 'a "b"'], "label": [1, 2, 3]})
    frame.to_csv(tmp_path / "rows.tsv", sep="\t", index=False)
    assert [cells["text"] for _, cells in rows(tmp_path / "rows.tsv")] == frame["text"].tolist()


@pytest.mark.parametrize(("encoding", "found"), [
    ("utf-8", "utf-8-sig"), ("utf-16", "utf-16"), ("utf-32", "utf-32"), ("cp1252", "cp1252"), ("cp1251", "cp1251"),
])  # fmt: skip
def test_an_encoding_is_found_and_said(tmp_path, encoding, found):
    text = "text\n" + (RUSSIAN if encoding == "cp1251" else WESTERN)
    table = Table(write(tmp_path, text.encode(encoding)))
    assert encoding_of(tmp_path / "rows.csv")[0] == found
    assert [cells["text"] for _, cells in table.rows()] == text.splitlines()[1:]
    assert bool(table.remarks) is (encoding != "utf-8")


@pytest.mark.parametrize(("content", "line", "sentence"), [
    ("text,label\na,b,1\nc,2\n", 2, "3 fields, but the header has 2: put texts that have commas"),
    ("text,label\n\na\nc,2\n", 3, "1 field, but the header has 2"),
    ('text,label\n"a" b,1\nc,2\n', 2, "a quote inside a quoted text: write it twice"),
    (b"text,label\n\xc3\xa9,1\n\xff,1\nc,2\n", 3, "byte 0xff is no UTF-8"),
])  # fmt: skip
def test_a_broken_row_is_an_error_or_left_out(tmp_path, content, line, sentence):
    path, said = write(tmp_path, content), []
    with pytest.raises(ValueError, match=sentence) as error:
        rows(path)
    assert str(error.value).startswith(f"{path}, line {line}: ")
    left = rows(path, skipped=said.append)
    assert said == [str(error.value)] and left[-1][1] == {"text": "c", "label": "2"}


def test_an_open_quote_is_named_by_the_line_where_it_opens(tmp_path):
    with pytest.raises(ValueError, match=r"line 3: a quote is left open until the end of the file: close it"):
        rows(write(tmp_path, 'text,label\na,1\n"b,2\nc,3\n'))
    with pytest.raises(ValueError, match=r"line 2: a field has more than 16,777,216 characters: is a quote left open"):
        rows(write(tmp_path, 'text,label\n"b,2\n' + ("words, words" * 1000 + "\n") * 1400))


@pytest.mark.parametrize(("name", "end"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_long_texts_are_read_whole(tmp_path, name, end):
    """Of a million characters, in one line and in many, where Python's csv module reads 131,072 by default."""
    long, lines = "words " * 170_000, "a line\n" * 150_000
    csv.field_size_limit(131_072)
    found = rows(write(tmp_path, f'text{end}label\n{long}{end}1\n"{lines}"{end}2\nc{end}3\n', name))
    assert [cells["text"] for _, cells in found] == [long, lines, "c"]
    assert [line for line, _ in found] == [2, 3, 150_004]


def test_jsonl_has_an_object_a_line(tmp_path):
    content = '{"text": "a\\nb", "labels": ["x"]}\n\n{"labels": [], "text": "c", "more": 1}\n'
    table = Table(write(tmp_path, content, "rows.jsonl"))
    assert table.columns == ("text", "labels", "more")
    assert [(line, cells["text"], cells["labels"]) for line, cells in table.rows()] == [
        (1, "a\nb", ["x"]),
        (3, "c", []),
    ]


@pytest.mark.parametrize(("content", "sentence"), [
    ('{"text": "a"}\n{"text": \n', r"line 2: not JSON \(Expecting value\): write one object a line"),
    ('{"text": "a"}\n[1]\n', "line 2: list instead of an object"),
    ('{"text": "a"}\n' + "[" * 5000 + "\n", "line 2: not JSON"),
    ('[{"text": "a"}]\n', "one JSON list, not an object a line: jq"),
])  # fmt: skip
def test_broken_jsonl_says_where(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        rows(write(tmp_path, content, "rows.jsonl"))


def test_types_come_with_their_names(tmp_path):
    TYPED.to_parquet(tmp_path / "rows.parquet")
    TYPED.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": TYPED, "test": TYPED.select([1])}).save_to_disk(tmp_path / "two")
    for source in (tmp_path / "rows.parquet", tmp_path / "one", f"{tmp_path / 'two'}:train"):
        table = Table(source)
        assert table.features["label"].names == ["no", "yes"] and table.unit == "row"
        assert list(table.rows(["label"])) == [(1, {"label": 0}), (2, {"label": 1})]
    assert splits_of(str(tmp_path / "two")) == ("train", "test") and splits_of(str(tmp_path / "one")) == ()
    with pytest.raises(ValueError, match=r"has several splits: give one of .*two:train, .*two:test"):
        Table(tmp_path / "two")
    with pytest.raises(ValueError, match=r"two has no split 'dev': give one of"):
        Table(f"{tmp_path / 'two'}:dev")


def test_a_stream_is_read_once():
    table = Table(io.StringIO("text,label\na,1\n"), format="csv")
    assert table.columns == ("text", "label") and [line for line, _ in table.rows()] == [2]
    lines = "".join(json.dumps({"text": str(number)}) + "\n" for number in range(250))
    assert [cells["text"] for _, cells in Table(io.StringIO(lines), format="jsonl").rows()] == [*map(str, range(250))]
    with pytest.raises(ValueError, match="a stream of format None: name one of csv, tsv, jsonl"):
        Table(io.StringIO(""))


def test_rows_come_before_the_file_is_read(tmp_path):
    """In constant memory: a broken last row is met after all others were given."""
    path = write(tmp_path, "text,label\n" + "a,1\n" * 50_000 + "broken\n")
    found = Table(path).rows()
    assert sum(1 for _ in itertools.islice(found, 50_000)) == 50_000
    with pytest.raises(ValueError, match="line 50002: 1 field"):
        next(found)


def test_a_frame_is_a_table():
    frame = pd.DataFrame(
        {"text": pd.Series(["a", None, pd.NA], dtype=object), "stars": [1, 2, None], 3: [[1], [], None]}
    )
    table = Table.of_frame(frame, "train")
    assert table.columns == ("text", "stars", "3")
    assert [tuple(cells.values()) for _, cells in table.rows()] == [
        ("a", 1.0, [1]),
        (None, 2.0, []),
        (None, None, None),
    ]
    with pytest.raises(ValueError, match="has a column twice"):
        Table.of_frame(pd.DataFrame([[1, 2]], columns=["a", "a"]), "train")


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("rows.csv", b"", "is empty: it needs rows"),
    ("rows.csv", b" \n\n", "is empty: it needs rows"),
    ("rows.csv", b"\x1f\x8b\x08rest", "is compressed by gzip, not UTF-8 text: unpack it"),
    ("rows.csv", b"PK\x03\x04rest", "is a ZIP archive or a spreadsheet"),
    ("rows.csv", b"a\0b,c\n1,2\n", "has NUL bytes, it is no text"),
    ("rows.csv", b"text,label,text\na,1,b\n", "names 'text' twice: rename or drop one"),
    ("rows.parquet", b"PAR1 and no more", "is no Parquet file"),
    ("rows.txt", b"a\n", r"the ending '.txt' is none of .csv, .tsv"),
    ("rows.jsonl", b"\x80\x81", "line 1: "),
])  # fmt: skip
def test_a_file_that_is_no_table_is_a_sentence(tmp_path, name, content, sentence):
    path = write(tmp_path, content, name)
    with pytest.raises(ValueError, match=sentence) as error:
        rows(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_path_that_is_none_is_a_sentence(tmp_path):
    write(tmp_path, "text\n", "train.csv")
    with pytest.raises(ValueError, match=r"there is no file .*trian.csv: did you mean 'train.csv'\?"):
        Table(tmp_path / "trian.csv")
    with pytest.raises(ValueError, match=r"is no folder of datasets.save_to_disk: name one of its files: train.csv"):
        Table(tmp_path)
    with pytest.raises(ValueError, match=r"there is no file someone/reviews, and no such data set came from the hub"):
        Table("someone/reviews")
    (tmp_path / "saved").mkdir()
    write(tmp_path / "saved", "{}", "dataset_info.json")
    with pytest.raises(ValueError, match=r"saved cannot be read .*: save it anew"):
        Table(tmp_path / "saved")
