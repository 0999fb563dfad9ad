"""The kind of outcome of a finished run, found again from its summary or its predictions."""

import json

import pandas as pd
import pytest

from pyro_blora.tasks import MultiLabel, TokenLabels
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.columns import beside
from pyro_blora.tasks.normal import Normal
from pyro_blora.tasks.outcomes import described, kind_of, older_kind


@pytest.mark.parametrize("kind", [Categorical(("no", "yes")), Normal(0.0, 5.0), MultiLabel(("a", "b")),
                                  TokenLabels(("O", "B-X"))])  # fmt: skip
def test_a_kind_is_found_again_from_json(kind):
    assert kind_of(json.loads(json.dumps(described(kind)))) == kind


def test_the_wrong_answers_stand_beside_texts_of_whatever_name():
    table = pd.DataFrame({
        "question": ["one?", "two?", "three?"], "answer": ["Oslo", "Paris", "Rome"], "confidence": ["a", "b", "c"],
        "label": [0, 1, 1], "decision": [0, 0, 0], "p_no": [0.9, 0.6, 0.7], "p_yes": [0.1, 0.4, 0.3],
    })  # fmt: skip
    sentence, shown = Categorical(("no", "yes")).worst(table, 10)
    assert sentence.startswith("2 of 3 answers are wrong")
    assert shown.to_dict("records") == [
        {"question": text, "answer (text)": reply, "confidence (text)": word, "label": "yes", "answer": "no",
         "confidence": confidence}
        for text, reply, word, confidence in (("three?", "Rome", "c", "0.700"), ("two?", "Paris", "b", "0.600"))
    ]  # fmt: skip
    assert [*beside(table[["question", "answer"]], {"answer": [1, 2, 3]})] == ["question", "answer (text)", "answer"]


@pytest.mark.parametrize("outcome", [{}, {"kind": "categorical"}, {"kind": "mine"}, {"kind": ["x"]}, "normal", None])
def test_a_kind_that_is_not_known_here_is_none(outcome):
    assert kind_of(outcome) is None


def test_the_kind_of_an_older_run_is_told_by_its_predictions():
    label = [1, 0]
    assert older_kind(pd.DataFrame({"label": label, "p_no": [0.1, 0.9], "p_yes": [0.9, 0.1]})).names == ("no", "yes")
    assert older_kind(pd.DataFrame({"label": [label], "probability_a": [0.9], "probability_b": [0.1]})).outputs == 2
    assert older_kind(pd.DataFrame({"label": label, "decision": [0.5, 0.1]})) == Normal(-1.0, 2.0)
