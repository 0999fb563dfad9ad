"""The kind of outcome of a finished run, found again from its summary or its predictions."""

import json

import pandas as pd
import pytest

from pyro_blora.tasks import MultiLabel, TokenLabels
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.normal import Normal
from pyro_blora.tasks.outcomes import described, kind_of, older_kind


@pytest.mark.parametrize("kind", [Categorical(("no", "yes")), Normal(0.0, 5.0), MultiLabel(("a", "b")),
                                  TokenLabels(("O", "B-X"))])  # fmt: skip
def test_a_kind_is_found_again_from_json(kind):
    assert kind_of(json.loads(json.dumps(described(kind)))) == kind


@pytest.mark.parametrize("outcome", [{}, {"kind": "categorical"}, {"kind": "mine"}, {"kind": ["x"]}, "normal", None])
def test_a_kind_that_is_not_known_here_is_none(outcome):
    assert kind_of(outcome) is None


def test_the_kind_of_an_older_run_is_told_by_its_predictions():
    label = [1, 0]
    assert older_kind(pd.DataFrame({"label": label, "p_no": [0.1, 0.9], "p_yes": [0.9, 0.1]})).names == ("no", "yes")
    assert older_kind(pd.DataFrame({"label": [label], "probability_a": [0.9], "probability_b": [0.1]})).outputs == 2
    assert older_kind(pd.DataFrame({"label": label, "decision": [0.5, 0.1]})) == Normal(-1.0, 2.0)
