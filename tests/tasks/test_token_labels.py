"""A label of every word: a kind of outcome in one file and a line, from the data to a report and back."""

import dataclasses
import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import load
from pyro_blora.__main__ import main
from pyro_blora.build import build
from pyro_blora.deploy.opening import load_to_predict
from pyro_blora.posterior.arviz_compat import group, held_out_scores, read
from pyro_blora.report.page import write_report
from pyro_blora.run import train_run
from pyro_blora.tasks import Task, TokenLabels, get_task, register_task
from pyro_blora.tasks.likelihoods import IGNORED, LIKELIHOODS
from pyro_blora.tasks.token_labels import TokenScores
from pyro_blora.testing import check_task

pytestmark = pytest.mark.usefixtures("eager", "drawn")
NAMES = ("O", "B-NP", "I-NP")
KIND = TokenLabels(NAMES)


def labelled(words):
    """A noun phrase is an article and the word behind it."""
    articles = [word.lower() in ("the", "a", "every") for word in words]
    return [1 if here else 2 if before else 0 for here, before in zip(articles, [False, *articles[:-1]], strict=True)]


def rows(*, glue_dir=None, seed=0, n_train=None):
    """The demo's sentences as lists of words."""
    found = {}
    for split, table in get_task("acceptability").load(seed=seed, n_train=n_train or 300).items():
        words = [sentence.split() for sentence in table["sentence"]]
        text = datasets.Sequence(datasets.Value("string"))
        features = datasets.Features({"words": text, "label": KIND.feature})
        found[split] = datasets.Dataset.from_dict({"words": words, "label": [*map(labelled, words)]}, features=features)
    return found


@pytest.fixture(scope="module")
def task():
    return register_task(Task(name="phrases", text_columns=("words",), kind=KIND, metric_name="f1", load=rows))


@pytest.fixture(scope="module")
def config(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("token_labels")
    return tiny_config(
        save_tiny_backbone(folder / "backbone"), task="phrases", max_train=300, epochs=12, lr=5e-3, kl_warmup=0.8,
        output_dir=str(folder / "runs"), draws=4, validation=0.1, group_by_length=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config):
    return train_run(config)


def test_its_distribution_is_that_of_independent_words_and_leaves_out_what_is_not_asked():
    logits, labels = torch.randn(2, 4, 3), torch.tensor([[0, IGNORED, 2, 1], [IGNORED, 1, IGNORED, IGNORED]])
    expected = -torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").sum(-1)
    torch.testing.assert_close(KIND(logits).log_prob(labels), expected)
    torch.testing.assert_close(KIND(logits.expand(5, -1, -1, -1)).log_prob(labels), expected.expand(5, -1))


def test_answers_stand_at_the_words():
    logits, labels = torch.randn(2, 4, 3), torch.tensor([[IGNORED, 0, IGNORED, 2], [IGNORED, 1, IGNORED, IGNORED]])
    mean, p = KIND.averaged(KIND(logits), labels), logits.softmax(-1)
    assert KIND.scored(labels).tolist() == [[0, 2], [1, IGNORED]]
    torch.testing.assert_close(mean, torch.stack([p[0, [1, 3]], torch.stack([p[1, 1], torch.zeros(3)])]))
    assert KIND.cells(KIND.decision(mean)) == [p[0, [1, 3]].argmax(-1).tolist(), [int(p[1, 1].argmax())]]
    table = pd.DataFrame(KIND.columns(mean[None]))
    torch.testing.assert_close(KIND.read(table).float(), mean)


def test_the_gates_start_from_the_fisher_information_of_the_words_that_are_asked():
    logits, scale = torch.randn(1, 2, 3), torch.tensor(1.0)
    labels = torch.tensor([[1, IGNORED]])
    torch.manual_seed(0)
    v = torch.cat([KIND.fisher_directions(logits, labels, scale) for _ in range(4000)])
    p = logits[0, 0].softmax(-1)
    torch.testing.assert_close(v[:, 0].T @ v[:, 0] / len(v), p.diag() - p[:, None] * p, atol=0.02, rtol=0.02)
    assert not v[:, 1].any()


def test_the_general_directions_have_the_same_second_moment():
    logits, labels, scale = torch.randn(3), torch.zeros(20_000), torch.tensor(1.0)
    kind = get_task("mnli").likelihood
    torch.manual_seed(0)
    v = super(type(kind), kind).fisher_directions(logits.expand(len(labels), 3), labels, scale)
    p = logits.softmax(-1)
    torch.testing.assert_close(v.T @ v / len(v), p.diag() - p[:, None] * p, atol=0.01, rtol=0.05)


def test_entities_are_those_of_conll():
    scores = TokenScores(("O", "B-X", "I-X", "B-Y", "I-Y"))
    truth = [[1, 2, 0, 3], [2, 2, 4], [0, 1, 1]]  # X(0,2) Y(3,4) | X(0,2) Y(2,3) | X(1,2) X(2,3)
    answers = [[1, 2, 2, 3], [2, 2, 4], [0, 1, 2]]  # X(0,3) Y(3,4) | the same | X(1,3)
    found = scores.compute(predictions=answers, references=truth)
    assert found["precision"] == 3 / 5 and found["recall"] == 3 / 6 and found["f1"] == pytest.approx(6 / 11)
    assert found["accuracy"] == 8 / 10
    by_type = {row["label"]: row for row in scores.each(answers, truth)}
    assert by_type["Y"]["f1"] == 1.0 and by_type["X"]["number"] == 4
    assert TokenScores(("noun", "verb")).compute(predictions=[[0, 1]], references=[[0, 0]])["f1"] == 0.5


@pytest.mark.parametrize("letters", ["BIES", "BILU", "BMES"])
def test_entities_end_where_their_scheme_says_so(letters):
    """As seqeval reads them."""
    begin, inside, end, single = (f"{letter}-X" for letter in letters)
    names = ("O", begin, inside, end, single, f"{single[0]}-Y")
    scores = TokenScores(names)
    for tags, entities in (
        ([begin, inside, end, single], {(0, 3), (3, 4)}),
        ([begin, end, begin, end], {(0, 2), (2, 4)}),
        ([single, single, "O", end], {(0, 1), (1, 2), (3, 4)}),
        ([begin, end, inside, inside], {(0, 2), (2, 4)}),
        ([begin, single, end, end], {(0, 1), (1, 2), (2, 3), (3, 4)}),
    ):
        assert {entity[1:3] for entity in scores._entities([[names.index(tag) for tag in tags]])} == entities
    truth = [[4, 0, 1, 3, 5]]  # X(0,1) X(2,4) Y(4,5)
    assert scores.compute(predictions=truth, references=truth)["f1"] == 1.0
    answers = [[4, 0, 1, 2, 5]]  # the last of an entity that is not marked as its end
    assert scores.compute(predictions=answers, references=truth)["f1"] == 1.0
    answers = [[0, 0, 4, 4, 5]]
    assert scores.compute(predictions=answers, references=truth)["f1"] == pytest.approx(1 / 3)


def test_what_looks_like_a_prefix_of_an_entity_is_read_as_one_or_refused():
    assert TokenScores(("O", "S-X", "S-Y")).of_entities and TokenScores(("I-X", "O")).of_entities
    assert not TokenScores(("E-mail", "word")).of_entities and not TokenScores(("noun", "O")).of_entities
    assert TokenScores(("O", "B-X", "X")).compute(predictions=[[2, 1]], references=[[0, 1]])["f1"] == 1.0  # outside
    with pytest.raises(ValueError, match=r"the prefix Q-, Z- are of no known scheme of entities: write B- and I-"):
        TokenScores(("O", "B-X", "Z-X", "Q-X"))


def test_constants_and_their_scores_are_those_of_frequencies():
    labels = np.array([[0, 0, 1], [0, IGNORED, IGNORED]])
    assert [answer.tolist() for answer in KIND.constants(labels)] == [
        [[0, 0, 0], [0, IGNORED, IGNORED]], [[1, 1, 1], [1, IGNORED, IGNORED]],
    ]  # fmt: skip
    np.testing.assert_allclose(KIND.constant_log_scores(labels), [2 * np.log(0.75) + np.log(0.25), np.log(0.75)])


def test_tokens_have_the_labels_of_the_words_that_they_begin(config):
    parts = build(config)
    batch = parts.collate([parts.tokens["train"][i] for i in range(3)])
    assert batch["labels"].shape == batch["input_ids"].shape and batch["input_ids"].shape[1] % 8 == 0
    assert (
        parts.task.likelihood.scored(batch["labels"]).tolist()[0][: len(parts.rows["train"][0]["label"])]
        == (parts.rows["train"][0]["label"])
    )


@pytest.mark.parametrize(("words", "label", "said"), [
    (["a", "cat"], [1, 7], r"row 0 has label .*lists of numbers, one a word: 0 \(O\), 1 \(B-NP\)"),
    (["a", "cat"], 1, "row 0 has label 1"),
])  # fmt: skip
def test_a_label_that_is_none_is_refused_with_its_row(task, words, label, said):
    plain = datasets.Dataset.from_dict({"words": [words] * 2, "label": [label] * 2})
    with pytest.raises(ValueError, match=said):
        task.validate({**rows(n_train=20), "train": plain})


def test_a_word_without_a_label_is_refused(config):
    tokenizer = build(config).tokenizer
    with pytest.raises(ValueError, match=r"2 words \(a cat\) have 1 labels"):
        KIND.encode(tokenizer, {"words": [["a", "cat"]], "label": [[1]]}, ("words",), 32)
    with pytest.raises(ValueError, match=r"the word '' \(a  cat\) has no token"):
        KIND.encode(tokenizer, {"words": [["a", "", "cat"]], "label": [[1, 0, 2]]}, ("words",), 32)


def test_words_that_are_cut_off_are_not_asked(config):
    tokenizer = build(config).tokenizer
    found = KIND.encode(tokenizer, {"words": [["a", "cat", "sat"]], "label": [[1, 2, 0]]}, ("words",), 4)
    assert found["label"] == [[IGNORED, 1, 2, IGNORED]]


def test_it_is_learned_and_its_scores_stand_beside_the_constant_answer(run):
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["scores"]) == {"accuracy", "precision", "recall", "f1"} and summary["metric"]["name"] == "f1"
    beside = summary["beside"]
    assert summary["metric"]["value"] > beside["f1"]["constant"] + 2 * beside["f1"]["standard_error"]
    assert summary["nll"] < beside["nll"]["constant"]
    assert summary["ece"]["value"] is None and summary["calibration"] == {}
    assert summary["accuracy"] == pytest.approx(summary["scores"]["accuracy"])
    (row,) = summary["tables"]["Entities by type"]
    assert row["label"] == "NP" and row["f1"] == pytest.approx(summary["metric"]["value"])


def test_predictions_and_posterior_have_every_word(run):
    table = pd.read_parquet(run / "predictions.parquet")
    assert [*map(len, table["decision"])] == [*map(len, table["words"])] == [*map(len, table["label"])]
    probabilities = KIND.read(table)
    assert KIND.cells(KIND.decision(probabilities)) == [[*x] for x in table["decision"]]
    data = read(run)
    predicted, observed = group(data, "predictions"), group(data, "predictions_constant_data")["label"]
    assert predicted["label"].dims == ("chain", "draw", "example", "word")
    assert list(predicted["class"].values) == list(NAMES)
    padded = observed.values == IGNORED
    assert (predicted["label"].values[0, :, padded] == IGNORED).all()
    assert np.isnan(predicted["probability"].values[0][:, padded]).all()
    np.testing.assert_allclose(held_out_scores(data), table["log_likelihood"], rtol=1e-5)
    assert [row[row != IGNORED].tolist() for row in observed.values] == [[*x] for x in table["label"]]


def test_the_page_has_its_tables_and_leaves_out_what_means_nothing(run):
    page = (run / "report.html").read_text()
    assert "Entities by type" in page and "words are answered wrong" in page
    assert "<h2>Calibration</h2>" not in page and "no single confidence" in page


def test_a_page_is_written_where_the_kind_is_not_registered(run, monkeypatch):
    monkeypatch.delitem(LIKELIHOODS._functions, "token_labels")
    page = write_report(run).read_text()
    assert "least expected" in page and "Entities by type" in page


def test_what_is_exported_is_read_back_with_its_labels(run):
    program = load(run)
    assert program.likelihood == KIND
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "TOKEN_CLS"
    card = (run / "adapter" / "README.md").read_text()
    assert "AutoModelForTokenClassification" in card and "for every token" in card
    assert "pipeline_tag: token-classification" in card


@pytest.mark.parametrize("changes", [{"estimator": "score_function"}, {"weights": "gaussian", "adapter": "xs"},
                                     {"weights": "ensemble", "weights_settings": {"members": 2}, "method": "lora"},
                                     {"average_over": "dropout", "method": "mc_dropout"}, {"method": "adalora"},
                                     {"method": "full"},
                                     {"scope": "encoder", "guide": "mixture"}])  # fmt: skip
def test_every_part_of_the_house_takes_it(config, tmp_path, changes):
    values = {"epochs": 1, "max_train": 64, "output_dir": str(tmp_path), "validation": 0.2, **changes}
    folder = train_run(tiny_config(config.backbone, task="phrases", **values))
    assert load(folder).likelihood == KIND


def test_the_check_of_tasks_takes_lists_of_words_and_refuses_others(task):
    assert check_task(task) is task
    mine = dataclasses.replace(task, name="sentences", load=get_task("acceptability").load, text_columns=("sentence",))
    with pytest.raises(ValueError, match="row 0 has label"):
        check_task(mine)
    empty = datasets.Dataset.from_dict({"words": [["a", " "]] * 4, "label": [[1, 2]] * 4})
    with pytest.raises(ValueError, match=r"has \['a', ' '\] in its text column 'words'"):
        check_task(dataclasses.replace(task, load=lambda **_: {"train": empty, "eval": empty}))


def test_what_has_no_meaning_for_it_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="no curvature for TokenLabels"):
        train_run(tiny_config(config.backbone, task="phrases", weights="laplace", output_dir=str(tmp_path)))


@pytest.mark.parametrize("form", ["packed", "merged", "peft"])
def test_a_run_is_exported_in_every_form_and_a_deployed_one_predicts(run, tmp_path, form):
    """Measured on the run's held-out rows, whose words Parquet has as arrays."""
    assert main(["export", str(run), "--to", str(tmp_path / form), "--format", form]) == 0
    assert "held-out" in (tmp_path / form / "README.md").read_text("utf-8")
    if form == "packed":
        texts = pd.read_parquet(run / "predictions.parquet")["words"].tolist()[:6]
        found = load_to_predict(tmp_path / form).predict([[*words] for words in texts])
        expected = load(run).predict([[*words] for words in texts], deployed=True)
        assert [*found["labels"]] == [*expected["labels"]]


def test_probabilities_of_several_draws_are_those_of_each():
    labels = torch.tensor([[IGNORED, 0, IGNORED, 1], [1, IGNORED, IGNORED, IGNORED]])
    logits = torch.randn(3, 2, 4, KIND.outputs)
    together = KIND.averaged(KIND(logits), labels)
    assert torch.equal(together, torch.stack([KIND.averaged(KIND(each), labels) for each in logits]))
