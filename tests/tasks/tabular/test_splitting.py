"""The split that is made where no validation rows are given."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_blora.tasks import MultiLabel
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.normal import Normal
from pyro_blora.tasks.tabular.splitting import split

KIND = Categorical(("a", "b", "c"))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=8, max_size=60))
def test_every_row_is_on_one_side_texts_on_one_only_and_every_class_is_trained(rows):
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    if len(set(texts)) < 4:
        with pytest.raises(ValueError, match="different texts are too few to split"):
            split(texts, labels, KIND, 0)
        return
    try:
        train, held_out = split(texts, labels, KIND, 0)
    except ValueError as error:  # every text is needed to train on
        assert "too few to split" in str(error) and len(set(texts)) < 9
        return
    assert held_out
    assert sorted([*train, *held_out]) == [*range(len(rows))] and train == sorted(train) and train
    assert not {texts[row] for row in train} & {texts[row] for row in held_out}
    assert {labels[row] for row in train} == set(labels)


def test_classes_keep_their_shares():
    labels = [0] * 600 + [1] * 300 + [2] * 100
    train, held_out = split(range(1000), labels, KIND, 0)
    assert Counter(labels[row] for row in held_out) == {0: 120, 1: 60, 2: 20} and len(train) == 800


def test_a_seed_gives_one_split():
    labels = [number % 3 for number in range(90)]
    assert split(range(90), labels, KIND, 1) == split(range(90), labels, KIND, 1) != split(range(90), labels, KIND, 2)


def test_numbers_are_stratified_by_their_deciles():
    labels = np.random.default_rng(0).exponential(size=1000)
    _, held_out = split(range(1000), labels, Normal(0.0, 100.0), 0)
    assert len(held_out) == 200 and np.mean(labels[held_out]) == pytest.approx(labels.mean(), rel=0.06)


def test_rare_ones_of_several_labels_are_trained():
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 5)) < [0.5, 0.3, 0.02, 0.01, 0]).astype(int)
    labels[7] = [0, 0, 0, 0, 1]
    train, held_out = split(range(300), labels.tolist(), MultiLabel(tuple("abcde")), 0)
    assert labels[train].any(0).all() and len(held_out) == pytest.approx(60, abs=2)
