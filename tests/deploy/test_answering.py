"""Predictions on new texts: those of the run for its own rows, in any form of texts; every bad input is a sentence."""

import dataclasses
import math
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributions as dist
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import draw, expected_bops, export, fit, load, to_arviz
from pyro_blora.deploy.of_fits import OfFits
from pyro_blora.posterior.prediction import Prediction
from pyro_blora.posterior.selection import threshold_for
from pyro_blora.registries import LIKELIHOODS
from pyro_blora.run import train_run
from pyro_blora.tasks import MultiLabel, Task, TokenLabels, get_task, register_task
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.conformal import ClassSets, Intervals
from pyro_blora.tasks.normal import Normal

pytestmark = pytest.mark.usefixtures("eager")
NAMES = ("unacceptable", "acceptable")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def run(backbone, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("runs"))
    return train_run(tiny_config(backbone, output_dir=output, seed=3, epochs=4, lr=2e-2, weights="gaussian"))


@pytest.fixture(scope="module")
def model(run):
    return load(run)


@pytest.fixture(scope="module")
def held_out(run):
    return pd.read_parquet(run / "predictions.parquet")


def test_the_runs_own_rows_are_predicted_as_in_the_run(model, held_out):
    assert model.gates_are_random and held_out["decision"].nunique() == 2
    found = model.predict(held_out)
    for name in NAMES:
        np.testing.assert_array_equal(found[f"p_{name}"], held_out[f"p_{name}"])
    assert [*found["label"]] == [NAMES[i] for i in held_out["decision"]]
    at_mode = model.predict(held_out, deployed=True)
    assert [*at_mode["label"]] == [NAMES[i] for i in held_out["deployed_decision"]]
    assert (at_mode["mutual_information"] == 0).all() and (found["mutual_information"] > 0).any()


def test_a_table_has_what_it_promises(model):
    texts = list(get_task("acceptability").load(n_train=64)["eval"]["sentence"][:20])
    found = model.predict(texts, draws=8, seed=1)
    p = found[[f"p_{name}" for name in NAMES]].to_numpy()
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found["confidence"], p.max(1), rtol=1e-6)
    np.testing.assert_allclose(found["entropy"], -(p * np.log(p)).sum(1), atol=1e-5)
    assert (found["mutual_information"] <= found["entropy"]).all()
    assert [*found] == ["label", "confidence", "entropy", "mutual_information", *(f"p_{name}" for name in NAMES)]
    again = model.predict(texts, draws=8, seed=1)
    pd.testing.assert_frame_equal(found, again)
    assert not found.equals(model.predict(texts, draws=8, seed=2))


def test_texts_come_in_any_form(model):
    texts = list(get_task("acceptability").load(n_train=64)["eval"]["sentence"][:5])
    expected = model.predict(texts)
    frame = pd.DataFrame({"number": range(5), "sentence": texts}, index=[7, 5, 3, 1, 0])
    for form in (tuple(texts), (text for text in texts), [{"sentence": text} for text in texts], pd.Series(texts)):
        pd.testing.assert_frame_equal(model.predict(form), expected)
    found = model.predict(frame)
    assert [*found.index] == [7, 5, 3, 1, 0]
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected)


@pytest.mark.parametrize(("texts", "message"), [
    ("a film", r"must be a list, got str: predict\(\["), (None, "must be a list, got NoneType"), ([], "no texts"),
    (7, "must be a list, got int"), (["a", ""], r"row 1 \(from 0\), 'sentence': '' is no text"),
    (["a", None], "None is no text"), ([math.nan], "nan is no text"), ([["a", "b"]], "is no text"),
    ({"sentence": ["a"]}, "must be a list, got dict"),
    ([{"sentense": "a"}], "no column 'sentence': did you mean 'sentense'"),
    (pd.DataFrame({"text": ["a"]}), "the frame has no column 'sentence': Known: text"),
    ([{"sentence": "a"}, "b"], r"row 1 \(from 0\) has no column"), (pd.DataFrame({"sentence": []}), "no texts"),
])  # fmt: skip
def test_what_is_no_text_is_one_sentence(model, texts, message):
    with pytest.raises(ValueError, match=message):
        model.predict(texts)


@pytest.mark.parametrize(("options", "message"), [
    ({"draws": 0}, "draws must be at least 1"), ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"abstain": 1.0}, "abstain must be a share between 0 and 1"), ({"coverage": 95}, "coverage must be a share"),
    ({"abstain": 0.9999}, r"not reached on the 120 held-out rows.*the best is 0\.\d+ ± 0\.\d+, on \d+ of them"),
    ({"coverage": 0.999}, "needs 1000 rows to calibrate sets and 1000 to check them, there are 60 of each.*0.983"),
])  # fmt: skip
def test_an_option_that_cannot_be_is_one_sentence(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.predict(["a"], **options)


def test_the_threshold_and_the_sets_are_of_the_held_out_rows(model, held_out):
    answers = model.answers(abstain=0.5, coverage=0.8)
    found = answers(held_out)
    right = found["label"] == [NAMES[i] for i in held_out["label"]]
    of_answered = right[found["answered"]].mean()
    assert of_answered >= 0.5 and f"{found['answered'].sum()} of 120 held-out rows" in answers.remarks[0]
    inside = [NAMES[i] in names for i, names in zip(held_out["label"], found["set"], strict=True)]
    assert np.mean(inside) >= 0.8 and {*map(len, found["set"])} <= {0, 1, 2}
    assert "hold the label in 0." in answers.remarks[1]
    at_mode = model.answers(abstain=0.4, deployed=True)  # whose probabilities the run does not have
    assert at_mode(held_out)["answered"].sum() > 0


def test_a_fit_in_memory_and_its_export_predict_alike(backbone, tmp_path):
    trained = fit(tiny_config(backbone, max_train=32, epochs=1))
    texts = ["the dog", "a cat sees the dog"]
    export(trained.program, tmp_path / "adapter", config=trained.parts.config, tokenizer=trained.parts.tokenizer)
    with pytest.raises(ValueError, match=rf"backbone in a folder, '{backbone.name}', .*load\(folder, backbone=PATH\)"):
        load(tmp_path / "adapter")
    model = load(tmp_path / "adapter", backbone=backbone)
    pd.testing.assert_frame_equal(model.predict(texts), trained.predict(texts))
    assert trained.predict(texts, abstain=0.05)["answered"].all()
    with pytest.raises(ValueError, match=r"has no held-out rows.*load the folder of a run"):
        model.predict(texts, abstain=0.5)
    export(trained.program, tmp_path / "bare")
    with pytest.raises(ValueError, match=r"exported without its configuration: export\(program, folder, config="):
        load(tmp_path / "bare")
    export(trained.program, tmp_path / "wordless", config=trained.parts.config)
    with pytest.raises(ValueError, match="has no tokenizer: export it with"):
        load(tmp_path / "wordless", backbone=backbone).predict(texts)
    export(model, tmp_path / "again", config=trained.parts.config, tokenizer=trained.parts.tokenizer)
    pd.testing.assert_frame_equal(load(tmp_path / "again", backbone=backbone).predict(texts), trained.predict(texts))


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """A run of two members, whose backbone's folder has moved; and where it is now."""
    place = tmp_path_factory.mktemp("ensemble")
    backbone = save_tiny_backbone(place / "before")
    settings = {"weights": "ensemble", "weights_settings": {"members": 2}, "output_dir": str(place / "runs")}
    run = train_run(tiny_config(backbone, max_train=32, epochs=1, **settings))
    return run, backbone.rename(place / "now")


def test_an_ensembles_predictions_are_those_of_all_its_fits_wherever_its_backbone_is(ensemble):
    run, backbone = ensemble
    held_out = pd.read_parquet(run / "predictions.parquet").head(32)
    found = load(run, backbone=backbone).predict(held_out)
    np.testing.assert_allclose(found["p_acceptable"], held_out["p_acceptable"], atol=1e-4)
    assert (found["mutual_information"] > 0).all()


def test_all_fits_of_an_ensemble_go_where_the_first_one_goes(ensemble):
    run, backbone = ensemble
    model = load(run, backbone=backbone)
    (other,) = model.source.others
    model.double()
    assert {p.dtype for program in (model, other.program) for p in program.parameters()} == {torch.float64}
    model = load(run, backbone=backbone).to("meta")  # before the others are read
    (other,) = model.source.others
    assert {p.device.type for p in other.program.parameters()} == {"meta"}


# --- kinds of outcome -------------------------------------------------------------------------------------------------


def rows_of(*texts, label):
    import datasets

    def load(*, glue_dir=None, seed=0, n_train=None):
        table = datasets.Dataset.from_list([{**dict(texts), "label": label(i)} for i in range(n_train or 64)])
        return {"train": table, "eval": table.select(range(24))}

    return load


KINDS = {
    "several": Task(name="answered_several", text_columns=("text",), kind=MultiLabel(("a", "b", "c")),
                    metric_name="micro_f1", load=rows_of(("text", "The soldier"), label=lambda i: [1, 0, i % 2])),
    "stars": Task(name="answered_stars", text_columns=("one", "other"), label_range=(0.0, 5.0), metric_name="pearson",
                  load=rows_of(("one", "The soldier"), ("other", "The lawyer"), label=lambda i: i % 5 + 0.5)),
    "words": Task(name="answered_words", text_columns=("words",), kind=TokenLabels(("O", "B-X")), metric_name="f1",
                  load=rows_of(("words", ["The", "soldier"]), label=lambda i: [0, 1])),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_outcome_answers(backbone, name, forget):
    register_task(KINDS[name])
    trained = fit(tiny_config(backbone, task=KINDS[name].name, max_train=32, epochs=1))
    texts = {"several": ["the dog", "a cat"], "stars": [("the dog", "a cat"), ("a", "b c")],
             "words": [["the", "dog"], ["a"]]}[name]  # fmt: skip
    found = trained.predict(texts, draws=4)
    assert len(found) == 2
    if name == "several":
        on = [[x for x in "abc" if row[f"probability_{x}"] > 0.5] for _, row in found.iterrows()]
        assert [*found["labels"]] == on
        with pytest.raises(ValueError, match="no prediction sets"):
            trained.predict(texts, coverage=0.5)
        with pytest.raises(ValueError, match="several labels: no single confidence"):
            trained.predict(texts, abstain=0.5)
    if name == "words":
        assert [*map(len, found["labels"])] == [2, 1] and {*found["labels"][0]} <= {"O", "B-X"}
        frame = pd.DataFrame({"words": [*map(np.array, texts)]})  # as Parquet is read
        pd.testing.assert_frame_equal(trained.predict(frame, draws=4), found)
    if name == "stars":
        noise = float(trained.program.log_scale.detach().exp())
        np.testing.assert_allclose(found["std"], np.hypot(found["std_over_draws"], noise), rtol=1e-6)
        with pytest.raises(ValueError, match=r"row 0 \(from 0\) must be 2 texts \(one, other\), got 'the dog'"):
            trained.predict(["the dog"])
        sets = trained.predict(texts, coverage=0.8)
        assert ((sets["set_low"] < sets["mean"]) & (sets["mean"] < sets["set_high"])).all()


def test_the_interval_of_a_number_holds_94_percent_of_the_predictive_density():
    means = torch.tensor([[0.0, 1.0], [4.0, 1.0]])[..., None]  # two draws that agree on the second example only
    found = Normal(0.0, 5.0).answers(means, torch.tensor(0.5))
    draws = torch.cat([means.squeeze(-1) + 0.5 * torch.randn(20_000, 1, 2, generator=torch.Generator().manual_seed(0))])
    for end, share in (("low", 0.03), ("high", 0.97)):
        below = (draws < torch.tensor(found[end])).double().mean((0, 1))
        np.testing.assert_allclose(below, share, atol=0.004)
    assert found["high"][0] - found["low"][0] > found["high"][1] - found["low"][1]


def test_the_interval_of_an_ensemble_is_of_all_draws_of_all_fits_each_with_its_noise():
    kind, labels, noise = Normal(0.0, 5.0), torch.zeros(1), (torch.tensor(0.3), torch.tensor(1.5))
    draws = [torch.tensor(means).view(2, 1, 1) for means in ([2.0, 2.0], [1.0, 3.0])]
    each = [
        Prediction(x, dist.Normal(x.squeeze(-1), scale).log_prob(labels), labels, kind)
        for x, scale in zip(draws, noise, strict=True)
    ]
    found = OfFits.of(each, noise)
    answers = kind.answers(*found.of_label)
    sampled = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(4)),
        dist.Normal(torch.tensor([2.0, 2.0, 1.0, 3.0]), torch.tensor([0.3, 0.3, 1.5, 1.5])),
    ).sample((200_000,))
    assert answers["mean"] == pytest.approx(2.0) and answers["std_over_draws"] == pytest.approx(0.5**0.5)
    assert answers["std"] == pytest.approx(float(sampled.std()), abs=0.01)
    inside = (sampled > torch.tensor(answers["low"])) & (sampled < torch.tensor(answers["high"]))
    assert inside.double().mean() == pytest.approx(0.94, abs=0.003)
    alone = [kind.answers(*one) for one in found.alone()]
    assert [one["std"].item() for one in alone] == pytest.approx([0.3, (1 + 1.5**2) ** 0.5])


def test_an_ensemble_of_regressions_answers_with_the_noise_of_each_fit(backbone, tmp_path, forget):
    register_task(KINDS["stars"])
    settings = {"weights": "ensemble", "weights_settings": {"members": 2}, "output_dir": str(tmp_path)}
    model = load(train_run(tiny_config(backbone, task="answered_stars", max_train=32, epochs=1, **settings)))
    fits = [model, model.source.others[0].program]
    fits[1].log_scale.data += 2.0
    noise = [float(program.log_scale.detach().exp()) for program in fits]
    found = model.predict([("the dog", "a cat"), ("a", "b c")])
    expected = np.sqrt(found["std_over_draws"] ** 2 + np.mean(np.square(noise)))
    np.testing.assert_allclose(found["std"], expected, rtol=1e-6)
    assert (found["high"] - found["low"] > 2 * noise[0] * 1.89).all()


# --- thresholds and sets on exchangeable rows -------------------------------------------------------------------------


def simulated(rows, seed, classes=3):
    """(probabilities, labels drawn from a sharper distribution): a model that is not calibrated."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    return logits.softmax(-1), torch.multinomial((0.5 * logits).softmax(-1), 1, generator=generator).squeeze(-1)


@pytest.mark.parametrize("coverage", [0.001, 0.05, 0.1, 0.3, 0.5, 0.66, 0.8, 0.9, 0.95, 0.983, 0.999])
def test_as_many_rows_as_are_asked_for_calibrate_sets_and_the_advice_is_followed(coverage):
    def made(rows, coverage):
        mean, labels = simulated(rows, 0)
        number = mean[:, :1].double()
        return ClassSets(("a", "b", "c"), mean, labels, coverage), Intervals(number, number.squeeze(-1), coverage)

    with pytest.raises(ValueError, match=f"coverage {coverage:g} needs") as refused:
        made(1, coverage)
    needed = int(re.search(r"needs (\d+) rows", str(refused.value))[1])
    assert "give more held-out rows" in str(refused.value) and len(made(needed, coverage)) == 2
    for rows in {3, needed - 1} - {2, *range(needed, 4)}:
        with pytest.raises(ValueError, match=r"(lower|raise) it, to at (most|least)") as refused:
            made(rows, coverage)
        assert len(made(rows, float(str(refused.value).rsplit(" ", 1)[1]))) == 2


@pytest.mark.parametrize("coverage", [0.6, 0.9, 0.97])
def test_sets_have_their_coverage_whatever_the_model(coverage):
    kind, found = Categorical(("a", "b", "c")), []
    for seed in range(20):
        (mean, labels), (other, others) = simulated(300, seed), simulated(2000, 100 + seed)
        sets = kind.conformal(mean, labels, coverage)
        assert isinstance(sets, ClassSets)
        found.append(sets.check(other, others).share)
    error = math.sqrt(coverage * (1 - coverage) / 300 / 20)  # of the mean over calibrations
    assert coverage - 3 * error <= np.mean(found) <= coverage + 1 / 301 + 3 * error
    intervals = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        truth = torch.randn(2300, generator=generator)
        guess = (0.3 * truth + torch.randn(2300, generator=generator))[:, None]
        sets = Normal(-9.0, 9.0).conformal(guess[:300], truth[:300], coverage)
        assert isinstance(sets, Intervals)
        intervals.append(sets.check(guess[300:], truth[300:]).share)
    assert coverage - 3 * error <= np.mean(intervals) <= coverage + 1 / 301 + 3 * error


def test_a_threshold_is_the_lowest_that_reaches_the_accuracy():
    mean, labels = simulated(500, 0)
    found = threshold_for(mean, labels, 0.6)
    confidence, decision = mean.double().max(-1)
    for cut in confidence.unique():
        answered = confidence >= cut
        accuracy = (decision == labels)[answered].double().mean()
        assert cut >= found.confidence or accuracy < 0.6 or answered.sum() < 10
    assert found.answered == int((confidence >= found.confidence).sum()) and found.accuracy >= 0.6
    tied = torch.tensor([[0.9, 0.1]] * 20 + [[0.6, 0.4]] * 20)
    with pytest.raises(ValueError, match=r"the best is 0\.500 .* on 20 of them"):
        threshold_for(tied, torch.tensor([0] * 10 + [1] * 30), 0.9)  # the first ten are right, but tied with wrong ones


# --- loading without code ---------------------------------------------------------------------------------------------

SCRIPT = """
import datasets, torch
from pathlib import Path
from pyro_blora import Task, register_prior, register_task
from pyro_blora.gates import Gates, NestedBernoulli
Path(__file__).with_name("ran").touch()

def load(*, glue_dir=None, seed=0, n_train=None):
    table = datasets.Dataset.from_dict({"line": ["The soldier", "The lawyer"] * 20, "label": [0, 1] * 20})
    return {"train": table, "eval": table.select(range(20))}

def task():
    return Task(name="mine", text_columns=("line",), labels=("dull", "fine"), metric_name="accuracy", load=load)

def late(layout):
    return Gates(*(NestedBernoulli.from_rate(torch.full(shape, 0.5)) for shape in (layout.z_shape, layout.g_shape)))
"""


def test_a_run_of_a_users_own_task_and_prior_is_loaded_without_their_code(backbone, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    config = tiny_config(backbone, task=f"{script}:task", prior=f"{script}:late", output_dir=str(tmp_path / "runs"))
    run = train_run(dataclasses.replace(config, max_train=None))
    expected = load(run, allow_code=[f"{script}:late"])
    (tmp_path / "ran").unlink()
    script.unlink()
    model = load(run)
    found, gates = model.predict(["the dog", "a cat"]), draw(model, 3)
    assert 0 < float(expected_bops(model.layout, *gates).adapted_ratio.mean()) < 1
    assert "posterior" in to_arviz(model, gates).groups() and not (tmp_path / "ran").exists()
    np.testing.assert_allclose(found["p_fine"], expected.predict(["the dog", "a cat"])["p_fine"], atol=1e-6)
    for mine, theirs in zip(model.prior(), expected.prior(), strict=True):
        assert torch.equal(mine.log_probs, theirs.log_probs)


OWN_KIND = (
    SCRIPT.replace('labels=("dull", "fine")', 'kind=Twofold(("dull", "fine"))')
    + """
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.likelihoods import register_likelihood

@register_likelihood("twofold")
class Twofold(Categorical):
    "Two classes, in a file."
"""
)


def test_a_kind_of_outcome_in_a_users_file_is_allowed_with_its_task(backbone, tmp_path, monkeypatch):
    script = tmp_path / "mine.py"
    script.write_text(OWN_KIND)
    run = train_run(tiny_config(backbone, task=f"{script}:task", output_dir=str(tmp_path / "runs"), max_train=None))
    monkeypatch.delitem(LIKELIHOODS._functions, "twofold")  # another process
    with pytest.raises(ValueError, match=r"Twofold is not registered here: import .*if .*mine.py:task does it, load\("):
        load(run)
    assert load(run, allow_code=[f"{script}:task"]).predict(["The soldier"])["label"][0] in ("dull", "fine")


def test_a_kind_of_outcome_that_is_not_registered_says_what_to_import(backbone, tmp_path):
    trained = fit(tiny_config(backbone, max_train=32, epochs=1))
    trained.program.text_columns = ("sentence",)
    Odd = dataclasses.make_dataclass("Odd", [], bases=(Categorical,), frozen=True)
    trained.program.likelihood = Odd(NAMES)
    config = dataclasses.replace(trained.parts.config, task="odd")
    export(trained.program, tmp_path / "adapter", config=config, tokenizer=trained.parts.tokenizer)
    with pytest.raises(ValueError, match=r"outcome .*Odd is not registered here: put @register_likelihood"):
        load(tmp_path / "adapter", backbone=backbone)


# --- as from a notebook, or from an application of one's own ----------------------------------------------------------


def test_a_series_keeps_its_index(model):
    texts = pd.Series(["a good film", "the dog", "a cat"], index=[2, 0, 1])
    found, alone = model.predict(texts), model.predict([*texts])
    assert [*found.index] == [2, 0, 1]
    pd.testing.assert_frame_equal(found.reset_index(drop=True), alone)


@pytest.mark.parametrize(("options", "message"), [
    ({"draws": 2.5}, "draws must be a whole number or none, got 2.5"), ({"draws": True}, "draws must be a whole"),
    ({"seed": 1.5}, "seed must be a whole number"), ({"confidence": "high"}, "confidence must be a number or none"),
    ({"batch_size": [1]}, "batch_size must be a whole number"),
])  # fmt: skip
def test_an_option_of_another_type_is_one_sentence(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.predict(["a"], **options)


def test_a_column_that_is_there_twice_is_refused_and_numpys_numbers_are_numbers(model):
    twice = pd.DataFrame([["a", "b"]], columns=["sentence", "sentence"])
    with pytest.raises(ValueError, match="the frame has 2 columns 'sentence': rename or drop all but one"):
        model.predict(twice)
    pd.testing.assert_frame_equal(
        model.predict(["a"], draws=np.int64(2), confidence=np.float32(0.5)),
        model.predict(["a"], draws=2, confidence=0.5),
    )


def test_threads_answer_as_one_after_the_other(model):
    texts = [f"the {word} painted the bike" for word in ("soldier", "dog", "boy", "teacher")] * 3
    expected = [model.predict([text], draws=4) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda text: model.predict([text], draws=4), texts)]
    for one, other in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert model.net.gate_context.gates is None


def test_a_loaded_model_can_be_pickled(model):
    copy = pickle.loads(pickle.dumps(model))
    pd.testing.assert_frame_equal(copy.predict(["the dog"]), model.predict(["the dog"]))


def test_a_default_of_float64_changes_no_number(run, model):
    expected = model.predict(["the dog", "a cat"])
    torch.set_default_dtype(torch.float64)
    try:
        loaded = load(run)
        found = loaded.predict(["the dog", "a cat"])
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    pd.testing.assert_frame_equal(found, expected)
