"""The demo task is balanced, has no shortcut, and keeps part of its words from training."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from pyro_blora.tasks import get_task
from pyro_blora.tasks.demo import lexicon as lex
from pyro_blora.tasks.demo.acceptability import N_EVAL, N_TRAIN, PHENOMENA

pytestmark = pytest.mark.usefixtures("as_shipped")
NEAR_CHANCE = 0.58


@pytest.fixture(scope="module")
def splits():
    return get_task("acceptability").load()


def words_of(sentence: str) -> list[str]:
    return sentence.lower().rstrip(".").split()


def forms(words: lex.Words) -> set[str]:
    """Every inflected form of the nouns and verbs of a lexicon."""
    verbs = words["intransitive"]
    nouns = [*words["person"], *words["object"], *(word for couple in words["couple"] for word in couple)]
    inflected = [inflect(verb) for verb in verbs for inflect in (lex.third_person, lex.past, lex.gerund)]
    return {*nouns, *map(lex.plural, nouns), *verbs, *inflected, *words["person_verb"], *words["object_verb"]}


def test_it_loads_without_a_data_folder_and_passes_its_own_check(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {"train": N_TRAIN, "eval": N_EVAL}
    assert splits["train"].column_names == ["sentence", "label", "phenomenon", "held_out"]
    get_task("acceptability").validate(splits)


def test_labels_are_balanced_in_every_phenomenon(splits):
    for rows in splits.values():
        cells = Counter(zip(rows["phenomenon"], rows["label"], strict=True))
        assert cells == {(name, label): len(rows) // (2 * len(PHENOMENA)) for name in PHENOMENA for label in (0, 1)}


def test_both_labels_use_exactly_the_same_words(splits):
    for rows in splits.values():
        used = {label: Counter() for label in (0, 1)}
        for sentence, label in zip(rows["sentence"], rows["label"], strict=True):
            used[label].update(words_of(sentence))
        assert used[0] == used[1]


def test_both_labels_have_exactly_the_same_lengths(splits):
    for rows in splits.values():
        lengths = Counter((len(words_of(row["sentence"])), row["label"]) for row in rows)
        assert all(lengths[length, 0] == lengths[length, 1] for length, _ in lengths)


def test_no_sentence_occurs_twice(splits):
    sentences = [sentence for rows in splits.values() for sentence in rows["sentence"]]
    assert len(set(sentences)) == len(sentences)


def test_a_bag_of_words_is_at_chance(splits):
    vectorizer = CountVectorizer()
    counts = vectorizer.fit_transform(splits["train"]["sentence"])
    model = LogisticRegression(max_iter=1000).fit(counts, splits["train"]["label"])
    assert model.score(vectorizer.transform(splits["eval"]["sentence"]), splits["eval"]["label"]) < NEAR_CHANCE


def test_the_length_is_at_chance(splits):
    def lengths(rows):
        return np.array([(len(sentence), len(sentence.split())) for sentence in rows["sentence"]])

    model = DecisionTreeClassifier(max_depth=6, random_state=0).fit(lengths(splits["train"]), splits["train"]["label"])
    assert model.score(lengths(splits["eval"]), splits["eval"]["label"]) < NEAR_CHANCE


def test_held_out_rows_share_no_noun_and_no_verb_with_training(splits):
    kept, trained = forms(lex.lexicon(held_out=True)), forms(lex.lexicon(held_out=False))
    assert not kept & trained
    held_out = splits["eval"].filter(lambda row: row["held_out"])
    seen = {word for sentence in splits["train"]["sentence"] for word in words_of(sentence)}
    new = {word for sentence in held_out["sentence"] for word in words_of(sentence)}
    assert 0.4 < len(held_out) / len(splits["eval"]) < 0.6
    assert not seen & kept
    assert not new & trained
    assert all(kept & set(words_of(sentence)) for sentence in held_out["sentence"])
    assert not any(splits["train"]["held_out"])


def test_rows_are_the_same_for_a_seed_whatever_the_hash_seed(splits):
    script = (
        "import hashlib; from pyro_blora.tasks import get_task; rows = get_task('acceptability').load(seed=0)\n"
        "print(hashlib.sha256(repr([list(split) for split in rows.values()]).encode()).hexdigest())"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another than this process has
    command, environment = [sys.executable, "-c", script], {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    mine = repr([list(split) for split in splits.values()])
    assert done.stdout.strip() == hashlib.sha256(mine.encode()).hexdigest()
    assert list(get_task("acceptability").load(seed=0)["train"]) == list(splits["train"])


def test_a_seed_draws_the_training_rows_and_leaves_the_evaluation_rows(splits):
    other = get_task("acceptability").load(seed=1)
    assert other["train"]["sentence"][:] != splits["train"]["sentence"][:]
    assert list(other["eval"]) == list(splits["eval"])


@pytest.mark.parametrize("n_train", [2, 10, 62, 3000])
def test_every_even_number_of_rows_is_balanced(n_train):
    rows = get_task("acceptability").load(n_train=n_train)["train"]
    assert len(rows) == n_train
    assert sum(rows["label"]) == n_train // 2


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one training row"):
        get_task("acceptability").load(n_train=0)


def test_every_verb_keeps_its_forms_apart():
    for verb in lex.INTRANSITIVES:
        assert len({verb, lex.third_person(verb), lex.past(verb), lex.gerund(verb)}) == 4


def test_irregular_forms_are_right():
    nouns = ("child", "woman", "knife", "wife", "lady", "boy", "box", "witch", "waitress", "key")
    assert [lex.plural(noun) for noun in nouns] == (
        ["children", "women", "knives", "wives", "ladies", "boys", "boxes", "witches", "waitresses", "keys"]
    )
    assert [lex.past(verb) for verb in ("weep", "cry", "nod", "smile", "laugh")] == [
        "wept",
        "cried",
        "nodded",
        "smiled",
        "laughed",
    ]
    assert [lex.gerund(verb) for verb in ("weep", "cry", "grin", "smile")] == [
        "weeping",
        "crying",
        "grinning",
        "smiling",
    ]
    assert [lex.third_person(verb) for verb in ("cry", "flinch", "blush", "nod")] == [
        "cries",
        "flinches",
        "blushes",
        "nods",
    ]
