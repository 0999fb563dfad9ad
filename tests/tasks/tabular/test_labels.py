"""From cells to kinds of outcome: the rule for each, what overrides it, and what is refused."""

import datasets
import numpy as np
import pytest

from pyro_blora.tasks import MultiLabel
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.normal import Normal
from pyro_blora.tasks.tabular.cells import Cell
from pyro_blora.tasks.tabular.labels import infer, is_empty, named, widened


def cells(*values, feature=None):
    each = [named(value, feature) for value in values]
    return [Cell(value, number, "rows.csv, line {}".format) for number, value in enumerate(each, start=2)]


def found(*values, kind=None, feature=None):
    return infer(cells(*values, feature=feature), kind, feature, "stars")


def encoded(labels, *values):
    return [labels.encode(cell) for cell in cells(*values)]


@pytest.mark.parametrize(("values", "names", "codes"), [
    (("no", "yes", "no"), ("no", "yes"), [0, 1, 0]),
    (("b ", "a", "10", "9"), ("9", "10", "a", "b"), [3, 2, 1, 0]),
    (("5", "1", "5"), ("1", "5"), [1, 0, 1]),
    ((5, 1, 5.0), ("1", "5"), [1, 0, 1]),
    (("1.0", "0.0"), ("0", "1"), [1, 0]),
    ((True, False), ("false", "true"), [1, 0]),
    (("True", "False"), ("False", "True"), [1, 0]),
    (("-1", "1"), ("-1", "1"), [0, 1]),
    (("1_0", "2"), ("2", "1_0"), [1, 0]),
    (("010", "10", "0010", 10, "10.0"), ("0010", "010", "10"), [1, 2, 0, 2, 2]),
    (("1E5", "100000", "1e5", "+100000"), ("+100000", "100000", "1E5", "1e5"), [2, 1, 3, 0]),
    (("9007199254740993", 9007199254740992), ("9007199254740992", "9007199254740993"), [1, 0]),
    ((9007199254740993, 9007199254740992), ("9007199254740992", "9007199254740993"), [1, 0]),
    (("-0", "-1", "-0.0", 0, -1.0), ("-1", "0"), [1, 0, 1, 1, 0]),
])  # fmt: skip
def test_words_and_few_whole_numbers_are_classes(values, names, codes):
    labels = found(*values)
    assert labels.likelihood == Categorical(names) and encoded(labels, *values) == codes


def test_codes_that_begin_with_zeros_are_classes_however_many():
    codes = [f"{x:03}" for x in range(60, 160)] * 2
    labels = found(*codes)
    assert labels.likelihood == Categorical(tuple(sorted({*codes})))
    assert labels.rule.startswith("100 different codes in 'stars' are classes")
    assert found(*codes, kind="normal").likelihood.high == 159


@pytest.mark.parametrize(("values", "low", "high"), [
    (("0.5", "2", "4.25"), 0.5, 4.25), (tuple(range(31)), 0, 30), ((1e3, 2.5), 2.5, 1e3), (("1e-3", "0"), 0, 1e-3),
])  # fmt: skip
def test_other_numbers_are_a_number_in_the_range_of_training(values, low, high):
    labels = found(*values)
    assert (labels.likelihood.low, labels.likelihood.high) == pytest.approx((low, high))
    assert labels.likelihood.allows(np.array(encoded(labels, *values), dtype=np.float32)).all()


def test_no_rounding_puts_a_label_beyond_the_range():
    values = [f"{x:.3f}" for x in np.random.default_rng(0).random(500)]
    labels = found(*values)
    assert labels.likelihood.allows(np.array(encoded(labels, *values), dtype=np.float32)).all()


@pytest.mark.parametrize(("values", "kind"), [
    ((["a"], ["b", "a"], []), None), (('["a"]', "['b', 'a']", "[]"), None), (("a", "b|a", ""), "multi_label"),
    (("a", " b ; a", " "), "multi_label"), (("a;", "b;a", ""), "multi_label"),
])  # fmt: skip
def test_lists_are_several_labels(values, kind):
    labels = found(*values, kind=kind)
    assert labels.likelihood == MultiLabel(("a", "b")) and encoded(labels, *values) == [[1, 0], [1, 1], [0, 0]]


def test_lists_of_zeros_and_ones_are_several_labels_too():
    values = ([1, 0, 1], [0.0, 0.0, 1.0])
    labels = found(*values)
    assert labels.likelihood == MultiLabel(("label_0", "label_1", "label_2"))
    assert encoded(labels, *values) == [[1, 0, 1], [0, 0, 1]]
    for rows in ([[1, 0], [0, 0], [1, 1]], [[0, 1], [1, 0]]):  # as lists of labels, the last would be alike
        two = found(*rows)
        assert two.likelihood == MultiLabel(("label_0", "label_1")) and encoded(two, *rows) == rows
    assert found([1, 0], [0]).likelihood == MultiLabel(("0", "1"))  # lists of labels


def test_names_of_a_type_are_kept_in_their_order():
    names, others = datasets.ClassLabel(names=["yes", "no", "1.0"]), datasets.ClassLabel(names=["1", "no"])
    labels = found(1, 0, feature=names)
    assert labels.likelihood.names == ("yes", "no", "1.0") and encoded(labels, "no", "1.0", "1 ") == [1, 2, 2]
    assert [labels.encode(cell) for cell in cells(0, 1, feature=others)] == [2, 1]  # by name, not by number
    assert is_empty(-1, None, names) and not is_empty(-1, None)
    several = found([0, 2], [], feature=datasets.Sequence(names))
    assert several.likelihood == MultiLabel(("yes", "no", "1.0")) and encoded(several, ["1.0", "yes"]) == [[1, 0, 1]]


def test_the_kind_that_is_given_counts():
    assert found("1", "2", "3", kind="normal").likelihood == Normal(1, 3)
    assert found(*range(40), *range(40), kind="categorical").likelihood.outputs == 40
    assert found("1.5", "2.5", kind="categorical").likelihood.names == ("1.5", "2.5")
    assert found("010", "10", "0010", kind="categorical").likelihood.names == ("0010", "010", "10")
    assert found("010|10", "10", kind="multi_label").likelihood.names == ("010", "10")


@pytest.mark.parametrize("empty", [None, "", "  ", float("nan")])
def test_empty_cells_are_no_label_but_of_several_labels_none(empty):
    assert is_empty(empty, None) and is_empty(empty, "normal")
    assert is_empty(empty, "multi_label") is not isinstance(empty, str)


@pytest.mark.parametrize(("values", "kind", "sentence"), [
    (("a", "a"), None, r"line 2 and all other rows have the label 'a': two classes or more"),
    (("1.5", "1.5"), None, "every label in column 'stars' is 1.5"),
    (tuple(f"text {number}" for number in range(60)), None, r"60 different labels in 60 rows: name the col"),
    ((*range(50), "n/a"), None, r"line 52: the label 'n/a' is no number, and 50 of 51 are"),
    ((*range(50), "nan"), None, r"line 52: the label 'nan' is no number"),
    (("1", "x"), "normal", r"line 3: the label 'x' is no finite number"),
    (("1", "1e300"), "normal", r"line 3: the label '1e300' is no finite number"),
    (("4,5", "3", "2,25"), None, r"line 2: the label '4,5' has a decimal comma: write numbers with a point"),
    ((["a"], "b"), None, r"line 2: the label \['a'\] is a list, and others are not"),
    (("a", "b"), "multi_label", r"no row has several labels in column 'stars': separate them by \| or ;"),
    ((["a"], ["a"]), None, "have 1 different labels: two or more"),
    ((["a"], 3), "multi_label", r"line 3: 3 is no list of labels"),
])  # fmt: skip
def test_labels_of_no_kind_are_a_sentence(values, kind, sentence):
    with pytest.raises(ValueError, match=sentence):
        found(*values, kind=kind)


@pytest.mark.parametrize(("values", "unseen", "sentence"), [
    (("a", "b"), "c", "the label 'c' is not among those in training: a, b"),
    (([1, "a"], ["b"]), ["c"], "the label 'c' is not among those in training: 1, a, b"),
    (("0.5", "1"), "high", "the label 'high' is no finite number"),
    (([1, 0, 1], [0, 0, 1]), [1, 0.7, 0.9], r"the label \[1, 0.7, 0.9\] is not 3 zeros and ones, as those in training"),
    (([1, 0, 1], [0, 0, 1]), [1, 0], r"the label \[1, 0\] is not 3 zeros and ones"),
    (([1, 0, 1], [0, 0, 1]), ["rude"], r"the label \['rude'\] is not 3 zeros and ones"),
])  # fmt: skip
def test_a_label_unseen_in_training_names_its_line(values, unseen, sentence):
    labels = found(*values)
    with pytest.raises(ValueError, match=f"rows.csv, line 9: {sentence}"):
        labels.encode(Cell(unseen, 9, lambda number: f"rows.csv, line {number}"))


def test_validation_labels_may_widen_the_range_but_not_by_far():
    labels = found("1.5", "4")
    same, sentence = widened(labels, cells("2", "4"))
    assert same == labels and sentence == ""
    wider, sentence = widened(labels, cells("2", "5", "1"))
    assert wider.likelihood == Normal(1, 5) and sentence.startswith(
        "2 validation labels, the first in rows.csv, line 3"
    )
    with pytest.raises(ValueError, match=r"line 3: the label '400' is far outside of those in training, 1.5 to 4"):
        widened(labels, cells("2", "400"))
    classes = found("a", "b")
    assert widened(classes, cells("c")) == (classes, "")
