"""Statistics and provenance of the studies, against numbers computed by hand and against simulation."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import save_tiny_backbone, tiny_config

from experiments.studies import compare
from experiments.studies.cells import finished, kept, provenance, trunk, warm
from experiments.studies.compare import paired, rank_differences, score
from experiments.studies.pages import study_parser, write_page
from experiments.studies.weight_distributions import ensembles
from experiments.studies.weights_page import (
    _ece,
    comparisons,
    difference,
    ece_difference,
    few_deviations,
    fractions,
    half_the_ece,
    verdicts,
    winners,
    with_gates,
)
from pyro_blora.checkpoint import read_tensors
from pyro_blora.config import RunConfig
from pyro_blora.training import Schedule, fit

ROOT = Path(__file__).resolve().parents[2]


def cell(label, decision, log_likelihood, **more):
    """What a study keeps of a run; the ensemble's columns are wrong on purpose."""
    return {"examples": {
        "label": list(label), "decision": [0] * len(label), "log_likelihood": [9.0] * len(label),
        "deployed_decision": list(decision), "deployed_log_likelihood": list(log_likelihood),
    }, **more}  # fmt: skip


def test_scores_are_those_of_what_is_deployed():
    examples = {"label": np.array([0, 1, 1, 1]), "deployed_decision": np.array([0, 1, 0, 1])}
    assert score(examples, "accuracy") == 0.75
    assert score(examples, "matthews_correlation") == pytest.approx(1 / 3**0.5)  # (2 * 1 - 0) / sqrt(2 * 3 * 1 * 2)
    assert score(examples, "pearson") == pytest.approx(np.corrcoef(*examples.values())[0, 1])
    assert score({**examples, "deployed_decision": np.ones(4)}, "matthews_correlation") == 0
    assert score(examples, "f1") == pytest.approx(2 * 2 / (3 + 2))
    with pytest.raises(ValueError, match=r"got 'bleu': add it to evaluation/weighted_scores\.py"):
        score(examples, "bleu")


def test_what_is_averaged_over_draws_has_an_empty_prefix():
    ours, theirs = cell([0, 1, 1, 1], [0, 1, 1, 1], [-0.1] * 4), cell([0, 1, 1, 1], [0, 1, 0, 0], [-0.3] * 4)
    ours["examples"] |= {"decision": [0, 1, 0, 0], "log_likelihood": [-0.5] * 4}
    theirs["examples"] |= {"decision": [0, 1, 1, 0], "log_likelihood": [-0.2] * 4}
    found = paired([ours], [theirs], "accuracy", prefix="")
    assert found["score"][0] == -0.25 and found["nll"] == pytest.approx((0.3, 0.3, 0.3))


def test_a_paired_difference_is_ours_minus_theirs():
    ours, theirs = cell([0, 1, 1, 1], [0, 1, 1, 1], [-0.1] * 4), cell([0, 1, 1, 1], [0, 1, 0, 0], [-0.3] * 4)
    found = paired([ours], [theirs], "accuracy")
    assert found["score"][0] == 0.5 and found["nll"] == pytest.approx((-0.2, -0.2, -0.2))
    assert found["score"][1] < 0.5 < found["score"][2]


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_of_paired_differences_cover(seeds, monkeypatch):
    monkeypatch.setattr(compare, "BOOTSTRAP", 400)  # a standard deviation of so many has an error of 4 %
    generator, covered = np.random.default_rng(0), 0
    for _ in range(100):
        shared = generator.normal(0.1, 1.0, 60)  # of the examples, the same for all seeds
        rows = [shared + generator.normal(0, 0.2) * (seeds > 1) + generator.normal(0, 0.3, 60) for _ in range(seeds)]
        found = paired([cell([0] * 60, [0] * 60, -row) for row in rows],
                       [cell([0] * 60, [0] * 60, [0.0] * 60) for _ in rows], "accuracy")  # fmt: skip
        covered += found["nll"][1] < 0.1 < found["nll"][2]
    assert covered >= 88  # of 95 expected, 3 standard errors below


def test_rank_differences_average_seeds_within_a_layer_or_layers_within_a_seed():
    def run(*values):
        ranks = {f"{i}.{kind}": rank for i, v in enumerate(values) for kind, rank in
                 {"query": 2.0, "key": 4.0, "value": v}.items()}  # fmt: skip
        return {"ranks": ranks}

    cells = [run(4.0, 5.0, 6.0), run(6.0, 7.0, 8.0)]  # by layer 2, 3, 4; by seed 2, 4
    for over, number, error in (("layers", 3, 1 / 3**0.5), ("seeds", 2, 1.0)):
        mean, low, high, count = rank_differences(cells, over)
        half = stats.t.ppf(0.975, number - 1) * error
        assert (mean, count) == (3.0, number) and (low, high) == pytest.approx((3 - half, 3 + half))


def test_a_page_names_every_code_that_trained_its_cells():
    cells = [{"summary": {"device": "cpu"}, "versions": {"torch": "2"}, "code": code} for code in ("b", "a", "b")]
    assert provenance(cells) == "on cpu; torch 2; digests of the package's code: a, b"
    assert "not recorded" in provenance([{"summary": {"device": "cpu"}, "versions": {}}])


def test_without_a_finished_cell_nothing_is_trained_and_nothing_written(tmp_path):
    config = RunConfig(task="acceptability", output_dir=str(tmp_path / "runs"))
    assert finished(tmp_path / "cell.json", config, config, 64, train=False) is None
    given = ["--glue_dir", "none", "--keep", str(tmp_path), "--report", str(tmp_path / "page.md"), "--only_finished"]
    options = study_parser("A study.", "study", max_train=64, output_dir="runs").parse_args(given)
    with pytest.raises(ValueError, match=r"no cell of this study is finished in .*: run it without --only_finished"):
        write_page(options, "study", [], lambda options, rows: "", lambda rows, path: path.touch())
    assert list(tmp_path.iterdir()) == []


def test_the_cells_that_are_kept_are_still_those_of_their_configurations():
    found = (ROOT / "benchmarks" / "cells").rglob("*.json")
    paths = sorted(path for path in found if path.parent.name not in ("estimates", "deployed") and "." not in path.stem)
    assert len(paths) > 100  # the others are of no run: timings, measurements and tables of widths
    for path in paths:
        config = RunConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["config"])
        cell = kept(path, config)
        assert path.parent.name == "gates" or cell["summary"]["task"] == config.task
    with pytest.raises(ValueError, match=r"another configuration \(seed differ\)"):
        kept(path, dataclasses.replace(config, seed=config.seed + 1))


# --- distributions of the weights -------------------------------------------------------------------------------------


def law_row(path, distribution, log_odds, *, task="sst2", seed=0, temperature=1.0, held_out=(2.0, -2.0, 1.0), **more):
    """A row of experiments/weights.py: what a distribution predicts of four examples, labelled 0, 1, 1, 1."""
    return {"task": task, "path": path, "law": distribution, "seed": seed, "temperature": temperature,
            "log_odds": {"eval": list(log_odds), "validation": list(held_out)},
            "cell": {"labels": {"eval": [0, 1, 1, 1], "validation": [1, 0, 0]}, "config": {"max_train": 100}},
            "parameters": 10, "stored": 10, **more}  # fmt: skip


def nll_of(log_odds, temperature=1.0):
    signed = np.array([-1, 1, 1, 1]) * np.array(log_odds) / temperature
    return float(np.log1p(np.exp(-signed)).mean())


def test_a_law_is_compared_with_its_point_and_with_what_temperatures_make_of_it_and_of_the_plain_training():
    ours, own, plain = [-2.0, 1.0, 2.0, 0.5], [-6.0, 4.0, 6.0, -5.0], [-3.0, 1.0, 1.0, -1.0]
    rows = [law_row("xs8", "point", plain, temperature=2.0), law_row("xs8-swag", "point", own, temperature=4.0),
            law_row("xs8-swag", "K = 10", ours, temperature=0.5)]  # fmt: skip
    found = verdicts(comparisons(rows, ["sst2"])).splitlines()[-1].split("|")
    expected = [nll_of(ours) - nll_of(own), nll_of(ours) - nll_of(own, 4.0), nll_of(ours) - nll_of(plain, 2.0)]
    assert [float(text.split()[0]) for text in found[4:7]] == pytest.approx(expected, abs=6e-4)
    assert max(expected) < 0 and "no" not in found[7].split(", ")
    assert float(found[8].split()[0]) == pytest.approx(nll_of(ours, 0.5) - nll_of(plain, 2.0), abs=6e-4)
    won = winners(comparisons([*rows, law_row("xs8", "draws", plain)], ["sst2"]))  # the draws are their point
    assert won.splitlines()[-1] == "| sst2 | xs8-swag K = 10 | none | xs8-swag K = 10 | none |"  # of four examples
    plain = [law_row("xs8", "point", [-4.0, 4.0, 4.0, 4.0])]  # a better one
    won = winners(comparisons([*plain, *rows[1:]], ["sst2"]))
    assert won.splitlines()[-1] == "| sst2 | xs8-swag K = 10 | none | none | none |"
    turned = difference([law_row("xs8", "point", own)], [law_row("xs8-swag", "K = 10", ours)])
    assert turned[0] == pytest.approx(-expected[0]) and turned[1] < turned[0] < turned[2]
    assert difference(rows[:1], [law_row("xs8", "draws", ours, seed=1)]) is None  # no seed that both have


def test_claims_are_ratios_of_medians_and_paired_differences():
    def scored(ece):
        return {"scores": {"ece_20": ece}, "scaled": {"ece_20": ece / 4}}

    odds = [1.0, 1.0, 1.0, 1.0]
    rows = [
        *(law_row("lora", "point", odds, seed=i, metric=0.7, **scored(e)) for i, e in enumerate((0.1, 0.2, 0.9))),
        law_row("xs8-swag", "K = 10", odds, metric=0.8, **scored(0.05)) | {"parameters": 1},
        law_row("xs8-swag", "point", odds, metric=0.8, **scored(0.05)),
        *(law_row("xs8-swag-deviations", f"K = {k}", [k / 10, 1.0, 1.0, 1.0], **scored(0.05)) for k in (2, 10)),
        *(law_row(f"lora-of-{share}", "point", odds, metric=0.5) for share in (10, 100)),
        law_row("xs8-swag-of-10", "point", odds, metric=0.6),
        law_row("xs8-swag-of-10", "K = 10", [-1.0, 1.0, 1.0, 1.0], metric=1.0),
        law_row("xs8-gaussian", "draws", odds), law_row("xs8-gates-gaussian", "draws", odds, bops=0.123),
    ]  # fmt: skip
    half = half_the_ece(rows, ["sst2"]).splitlines()[-1]
    assert half.startswith("| sst2 | 10 | 0.200 | 0.050 | 8 | 1 | 0.050 | 0.25 | +0.000 [") and half.endswith(
        "| 0.100 |"
    )
    surer = law_row("xs8-swag", "K = 10", [-3.0, 0.2, -3.0, 3.0])  # 3 of 4 right, at 0.953 three times, once at 0.550
    sure, unsure = 1 / (1 + np.exp(-3.0)), 1 / (1 + np.exp(-0.2))
    expected = (abs(3 * sure - 2) + abs(unsure - 1)) / 4 - abs(4 / (1 + np.exp(-1.0)) - 3) / 4
    assert ece_difference([surer], rows[:1])[0] == pytest.approx(expected)
    two, ten = few_deviations(rows, ["sst2"]).splitlines()[-2:]
    assert float(ten.split("|")[4].split()[0]) == pytest.approx(nll_of([1, 1, 1, 1]) - nll_of([0.2, 1, 1, 1]), abs=6e-4)
    assert two.split("|")[4].strip() == ""
    few, whole = fractions(rows, ["sst2"]).splitlines()[-2:]
    assert "| 0.500 | 0.600 | 1.000 | +0.250 [" in few and whole.startswith("| sst2 | 100 |")
    assert "| sst2 | 12.3 % | +0.000 [" in with_gates(rows, ["sst2"])


def test_an_ensemble_averages_probabilities_and_has_a_temperature_of_its_own():
    odds = [[-3.0, 3.0, 0.0, 1.0], [-1.0, 3.0, 2.0, 1.0], [-2.0, 3.0, -1.0, 1.0]]
    members = [law_row("lora", "point", x, seed=i, temperature=9.0) for i, x in enumerate(odds)]
    assert ensembles(members[:2]) == []
    (found,) = ensembles(members)
    mean = (1 / (1 + np.exp(-np.array(odds)))).mean(0)
    expected = -np.log(np.where([0, 1, 1, 1], mean, 1 - mean)).mean()
    assert found["law"] == "ensemble of 3" and found["stored"] == 30
    assert found["scores"]["nll"] == pytest.approx(expected, abs=1e-4)
    assert found["metric"] == 1.0 and found["temperature"] != 9.0
    assert found["log_odds"]["eval"] == pytest.approx(np.log(mean / (1 - mean)), abs=1e-4)
    compared = verdicts(comparisons([*members, found], ["sst2"])).splitlines()[-1].split("|")
    assert float(compared[4].split()[0]) == pytest.approx(expected - np.mean([nll_of(x) for x in odds]), abs=6e-4)


# --- many samples at once ---------------------------------------------------------------------------------------------


def resampled(n: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of n, and how often each is taken, (*shape, n) both."""
    rows = np.random.default_rng(1).integers(n, size=(*shape, n))
    return rows, (rows[..., None] == np.arange(n)).sum(-2).astype(float)


def test_a_score_of_many_resamples_is_that_of_each():
    decision, label = np.random.default_rng(0).normal(size=(2, 30))
    rows, counts = resampled(30, 5)
    rows[3], counts[3] = 7, 30 * (np.arange(30) == 7)  # one example alone has no correlation
    found = score({"decision": decision, "label": label}, "pearson", prefix="", counts=counts)
    expected = [0.0 if i == 3 else stats.pearsonr(decision[rows[i]], label[rows[i]]).statistic for i in range(5)]
    assert found == pytest.approx(expected)
    signs = {"decision": decision > 0, "label": label > 0}
    agree = (signs["decision"] == signs["label"])[rows].mean(1)
    assert score(signs, "accuracy", prefix="", counts=counts) == pytest.approx(agree)


def test_resamples_have_as_many_examples_as_there_are_each_as_often_as_another():
    counts = np.concatenate(compare._resampled(50, 0, 2000))
    assert (counts.sum(1) == 50).all() and counts.var() == pytest.approx(49 / 50, rel=0.05)  # binomial
    assert counts.mean(0) == pytest.approx(np.ones(50), abs=5 * (49 / 50 / 2000) ** 0.5)
    assert not (counts == np.concatenate(compare._resampled(50, 1, 2000))).all()


def test_the_calibration_error_of_many_resamples_is_that_of_each():
    generator = np.random.default_rng(0)
    examples = {"odds": 2 * generator.normal(size=40), "label": generator.integers(2, size=40)}
    rows, counts = resampled(40, 3, 2)
    found = _ece(examples, counts)
    for at in np.ndindex(3, 2):
        odds, label = (x[rows[at]] for x in examples.values())
        gaps = [[] for _ in range(20)]
        for x, is_one in zip(odds, label, strict=True):
            confidence = 1 / (1 + np.exp(-abs(x)))
            gaps[int(20 * confidence)].append(confidence - ((x > 0) == is_one))
        assert found[at] == pytest.approx(sum(abs(sum(gap)) for gap in gaps) / 40)


@pytest.mark.parametrize(
    ("script", "wrong", "said"),
    [
        ("ranks.py", "--precision bf17", "did you mean 'bf16'?"),
        ("gates.py", "--epochs 0", "epochs"),
        ("allocation.py", "--tasks sst3", "sst3"),
        ("dial.py", "--glue_dir nowhere", "nowhere"),
        ("gates.py", "--only_finished --keep nowhere", "run it without --only_finished"),
        ("glue_small.py", "--tasks sst3", "sst3"),
        ("demo_deberta.py", "--only_finished", "run it without --only_finished"),
        ("deploy_benchmark.py", "--quick", "no folder"),
        ("weights.py", "--tasks rte stsb", "task 'stsb' is not of two classes"),
        ("weights.py", "--tasks mnli", "task 'mnli' is not of two classes"),
        ("weights.py", "--tasks sst3", "did you mean 'sst2'?"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_sentence(script, wrong, said, refusal, tmp_path):
    main = importlib.import_module(f"experiments.{script.removesuffix('.py')}").main
    folders = "--glue_dir", tmp_path, "--output_dir", tmp_path / "runs"
    assert said in refusal(main, *folders, *wrong.split(), script=script)
    assert not any(tmp_path.iterdir())


def test_a_shared_lora_that_was_interrupted_goes_on_to_its_step(tmp_path):
    backbone = tmp_path / "tiny"
    save_tiny_backbone(backbone)
    lora = tiny_config(backbone, output_dir=str(tmp_path / "runs"), prior="fixed", prior_settings={"bits": 32},
                       kl_warmup=0.75)  # fmt: skip
    schedule = Schedule.of(lora, 64)
    assert (schedule.opening, schedule.steps) == (6, 8)
    fit(lora, folder=tmp_path / "runs" / f".trunk-{lora.folder_name}" / "6", until=2)  # as one that a signal ends
    found, notes = read_tensors(trunk(lora, schedule))
    assert notes["step"] == "6"
    whole = dataclasses.replace(lora, output_dir=str(tmp_path / "again"))
    undisturbed = read_tensors(trunk(whole, schedule))[0]
    assert found.keys() == undisturbed.keys() and all(torch.equal(x, undisturbed[key]) for key, x in found.items())


def test_a_shared_lora_of_other_rows_is_refused_and_leaves_nothing(tmp_path):
    save_tiny_backbone(tmp_path / "tiny")
    config = tiny_config(tmp_path / "tiny", output_dir=str(tmp_path / "runs"), kl_warmup=0.75, data_seed=0)
    lora = dataclasses.replace(config, prior="fixed", prior_settings={"bits": 32})
    source, partial = trunk(lora, Schedule.of(lora, 64)), tmp_path / "partial"
    with pytest.raises(ValueError, match="is of other training data: texts, labels or tokenizer have changed since"):
        warm(dataclasses.replace(config, data_seed=1), source, partial)
    assert not partial.exists()
    warm(config, source, partial)
    started, trained = (read_tensors(path)[0] for path in (partial / "checkpoints" / source.name, source))
    shared = [key for key in trained if key.startswith("parameter/net.") and key in started]
    assert shared and all(torch.equal(started[key], trained[key]) for key in shared)
