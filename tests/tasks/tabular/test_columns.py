"""Which columns are texts and labels: as given, by their usual names, or a sentence that shows them."""

import pytest

from pyro_blora.tasks.tabular.columns import choose


@pytest.mark.parametrize(("columns", "texts", "label"), [
    ("text label", "text", "label"),
    ("id Text Label", "Text", "Label"),
    ("text category", "text", "category"),
    ("review stars", "review", "stars"),
    ("id sentence1 sentence2 score", "sentence1 sentence2", "score"),
    ("question1 question2 label idx", "question1 question2", "label"),
    ("premise hypothesis label", "premise hypothesis", "label"),
    ("question sentence label", "question sentence", "label"),
    ("text label score label_text", "text", "label"),
    ("text content label", "text", "label"),
    ("text labels", "text", "labels"),
    ("utterance what", "utterance", "what"),
    ("words label", "words", "label"),
])  # fmt: skip
def test_obvious_columns_are_guessed(columns, texts, label):
    found = choose("rows.csv", columns.split(), None, None)
    assert found.texts == tuple(texts.split()) and found.label == label
    assert all(repr(name) in found.guessed for name in (*found.texts, label))


@pytest.mark.parametrize(("columns", "unclear"), [
    ("text sentence label", "texts"), ("text sentence1 sentence2 label", "texts"), ("text label labels", "labels"),
    ("text stars score", "labels"), ("a b", "labels"), ("a b label", "texts"), ("text", "labels"), ("label", "texts"),
])  # fmt: skip
def test_unclear_columns_are_shown_with_the_flag(columns, unclear):
    flag = "--text NAME" if unclear == "texts" else "--label NAME"
    with pytest.raises(
        ValueError, match=f"^rows.csv: which column has the {unclear} is not clear .*give {flag}"
    ) as error:
        choose("rows.csv", columns.split(), None, None)
    assert all(repr(name) in str(error.value) for name in columns.split())


def test_given_columns_count():
    columns = ["text", "title", "a,b", "stars", "label"]
    assert choose("rows.csv", columns, "title", "stars") == (("title",), "stars", "")
    assert choose("rows.csv", columns, "title, text", "stars").texts == ("title", "text")
    assert choose("rows.csv", columns, "a,b", "stars").texts == ("a,b",)
    assert choose("rows.csv", columns, None, "stars").guessed == "texts from 'text', by their names"


@pytest.mark.parametrize(("text", "label", "sentence"), [
    ("tex", "label", r"no column 'tex' for --text: did you mean 'text'\? It has the columns 'text', 'label', 'more'"),
    ("text", "stars", "no column 'stars' for --label"),
    ("text", "text", "column 'text' is both text and label"),
    ("text,more,label", "label", "must be one column, or two"),
    ("text,text", "label", "names one column twice"),
    ("text,", "label", "must be one column, or two"),
    ("label", "more", "must not be called 'label': rename it"),
])  # fmt: skip
def test_wrong_columns_are_a_sentence(text, label, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose("rows.csv", ["text", "label", "more"], text, label)
