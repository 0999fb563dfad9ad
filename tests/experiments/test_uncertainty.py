"""experiments/uncertainty.py: what is in scope, what doubts are worth where answers are known, the study in small."""

import csv
import json

import numpy as np
import pytest
import torch
from tiny import save_tiny_backbone

from experiments import uncertainty
from experiments.studies import compare, intents
from experiments.studies.doubts import (
    ALL,
    AURC,
    AUROC,
    MEASURES,
    auroc,
    error,
    interval,
    measures,
    resampled,
    rows_of,
    sign,
)
from experiments.studies.uncertainty_page import compared, report
from pyro_blora.bops import expected_bops
from pyro_blora.config import RunConfig
from pyro_blora.posterior import bops, calibration, deployed
from pyro_blora.tasks import get_task
from pyro_blora.training import fit

INTENTS = [f"intent_{i:02}" for i in range(24)]  # four stay


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(compare, "BOOTSTRAP", 100)


@pytest.fixture
def folder(tmp_path, forget):
    """Both sets in small; a text has a line break."""
    for split, copies in (("train", 12), ("test", 2)):
        path = tmp_path / "banking77" / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            writer.writerows([f"the artist {i}\nadmires {intent}", intent] for i in range(copies) for intent in INTENTS)
    rows = [[f"{intent} {i}", intent] for i in range(10) for intent in ("greet", "thank")]
    (tmp_path / "clinc").mkdir()
    clinc = {"train": rows, "test": rows[:4], "oos_test": [["what is a gate", "oos"]]}
    (tmp_path / "clinc" / "data_small.json").write_text(json.dumps(clinc), encoding="utf-8")
    return tmp_path


def test_intents_are_inside_or_outside(folder):
    intents.register(folder)
    task = get_task("banking77")
    splits = task.validate(task.load())
    assert len(task.labels) == 4 and len(splits["train"]) == 48 and len(splits["eval"]) == 8
    for row in splits["eval"]:
        assert row["text"].endswith(f"\nadmires {task.labels[row['label']]}")
    outside = get_task(intents.outside_of("banking77"))
    texts = outside.validate(outside.load())["eval"]["text"]
    assert len(texts) == 40 and not any(text.endswith(task.labels) for text in texts)
    assert len(task.load(n_train=5)["train"]) == 5
    assert get_task("clinc150").labels == ("greet", "thank")
    assert get_task(intents.outside_of("clinc150")).load()["eval"]["text"] == ["what is a gate"]


def test_files_that_are_something_else_are_refused(folder):
    (folder / "clinc" / "data_small.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data_small\.json: there is no oos_test, test, train"):
        intents.register(folder)
    (folder / "banking77" / "train.csv").write_text("text,label\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.csv: expected the columns text and category, got"):
        intents.register(folder)


def predictions(draws=4, sharpness=3.0, seed=0):
    """Three classes: labels follow the probabilities; rows outside have flat ones, and their draws differ."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count, scale, noise):
        logits = scale * torch.randn(1, count, 3, generator=generator)
        return (logits + noise * torch.randn(draws, count, 3, generator=generator)).softmax(-1)

    outputs = {"validation": rows(300, sharpness, 0.1), "eval": rows(400, sharpness, 0.1), "ood": rows(100, 0.3, 1.0)}
    labels = {name: torch.multinomial(x.mean(0), 1, generator=generator)[:, 0] for name, x in outputs.items()}
    return outputs, labels


def cell(way="gates", *, scaled=False, **settings):
    found = uncertainty.read(*predictions(**settings), scaled=scaled)
    config = {"max_train": 300, "epochs": 1, "draws": 4, "seed": 0}
    return {"way": way, "summary": {"task": "banking77", "device": "cpu"}, "versions": {}, "code": "c0de",
            "bops": [0.1], "config": config, **found}  # fmt: skip


def test_measures_are_those_of_calibration():
    outputs, labels = predictions()
    mean, found = outputs["eval"].double().mean(0), dict(zip(MEASURES, measures(rows_of(cell())), strict=True))
    told = calibration.out_of_distribution(outputs["eval"], outputs["ood"])
    right = mean.argmax(-1) == labels["eval"]
    assert found["accuracy"] == pytest.approx(right.double().mean().item())
    assert found["NLL"] == pytest.approx(calibration.nll(mean, labels["eval"]), rel=1e-3)
    assert found[AURC["doubt"]] == pytest.approx(
        calibration.aurc(mean.max(-1).values, right), rel=0.02
    )  # digits make ties
    assert found[AUROC["entropy"]] == pytest.approx(told["entropy"], abs=1e-3) and told["entropy"] > 0.8
    assert found[AUROC["information"]] == pytest.approx(told["mutual_information"], abs=1e-3)
    assert found[ALL["doubt"]] > found[AURC["doubt"]]


def test_auroc_from_ranks_counts_ties_half():
    doubt, outside = np.array([0.2, 0.9, 0.5, 0.1, 0.5]), np.array([True, True, True, False, False])
    positive, negative = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([0.1, 0.5])
    assert auroc(doubt, outside) == pytest.approx(calibration.auroc(positive, negative))


def test_differences_are_paired():
    gates, temperature = cell(), cell("temperature", draws=1, scaled=True)
    found = resampled([gates, temperature, cell("same")])
    pairs = [("gates", "same"), ("gates", "temperature"), ("temperature", "gates"), ("gates", "absent")]
    differences = compared([gates, temperature, cell("same")], found, pairs)
    assert set(differences) == set(pairs[:3])
    assert all(each == (0, 0, 0) for each in differences["gates", "same"].values())
    mean, low, high = differences["gates", "temperature"][AUROC["information"]]  # less the entropy of a point
    assert mean == found["gates"][AUROC["information"]][0] - found["temperature"][AUROC["entropy"]][0]
    assert low < mean < high and AUROC["information"] not in differences["temperature", "gates"]
    n, accuracy = 400, found["gates"]["accuracy"]
    assert error(accuracy) == pytest.approx((accuracy[0] * (1 - accuracy[0]) / n) ** 0.5, rel=0.25)  # of a share


def test_an_interval_has_a_sign_where_it_excludes_zero():
    values = np.r_[0.3, np.random.default_rng(0).normal(0.3, 0.1, 4000)]
    assert interval(values) == pytest.approx((0.3, 0.3 - 0.196, 0.3 + 0.196), abs=0.01)
    assert sign((0.3, 0.1, 0.5), False) == sign((-0.3, -0.5, -0.1), True) == 1
    assert sign((0.3, 0.1, 0.5), True) == -1 and sign((0.1, -0.1, 0.3), True) == 0


def test_a_doubt_in_which_draws_differ_finds_rows_whose_draws_differ():
    found = resampled([cell(sharpness=1.0)])["gates"]
    assert interval(found[AUROC["information"]] - found[AUROC["doubt"]])[1] > 0


def test_a_temperature_is_taken_where_it_is_asked_for():
    outputs, labels = predictions(draws=1)
    outputs = {name: calibration.at_temperature(x, 0.3) for name, x in outputs.items()}  # too sure
    plain, scaled = (uncertainty.read(outputs, labels, scaled=x) for x in (False, True))
    assert plain["temperature"] == scaled["temperature"] == pytest.approx(1 / 0.3, rel=0.2)
    assert scaled["scores"] == plain["scaled"]["scores"] and scaled["scores"]["nll"] < plain["scores"]["nll"]
    assert scaled["inside"]["right"] == plain["inside"]["right"] and not any(scaled["inside"]["information"])


def test_the_page_says_what_is_better_beyond_noise():
    worse = cell("gates, deployed", draws=1, sharpness=0.5, seed=1)
    text = report(None, [cell("temperature", draws=1, scaled=True), worse, cell("gates", draws=4)])
    row = next(line for line in text.splitlines() if line.startswith("| accuracy |"))
    assert row.split(" | ")[3] == "`gates, deployed`"
    assert "| gates | gates, deployed | " in text and "400 test rows and 100 out of scope" in text
    assert "nan" not in text


def test_an_older_cell_has_no_bit_operations_of_what_is_deployed():
    older = cell("gates, deployed", draws=1)
    for one, told in ((older, "-"), ({**older, "bops_of": "deployed"}, "10.0 %"), (cell("gates"), "10.0 %")):
        assert f"| {one['way']} | {told} | 0." in report(None, [one])


def test_the_study_in_small(folder, eager):
    save_tiny_backbone(folder / "tiny", letters=True)
    places = {
        "data": ".",
        "backbone": "tiny",
        "keep": "cells",
        "output_dir": "runs",
        "report": "a.md",
        "figures": ".",
    }
    arguments = [word for flag, name in places.items() for word in (f"--{flag}", str(folder / name))]
    arguments += ["--sets", "banking77", "--epochs", "1", "--draws", "2"]
    uncertainty.main(arguments)
    cells = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "cells").iterdir()}
    assert len(cells) == len(uncertainty.WAYS) and len(list((folder / "runs").iterdir())) == 5  # 3 are the ensemble's
    assert all(len(x["inside"]["doubt"]) == 8 and len(x["outside"]["doubt"]) == 40 for x in cells.values())
    drawn = {name.split("-")[2] for name, x in cells.items() if any(x["inside"]["information"])}
    assert drawn >= {"dropout", "ensemble"}
    at, drawn = (cells[f"uncertainty-banking77-gates{of}-0.json"] for of in ("-deployed", ""))
    config = RunConfig.from_dict(at["config"])
    program = fit(config, folder=folder / "runs" / config.folder_name).program  # nothing is left to train
    costs = expected_bops(program.net.layout, *deployed(program)), bops(program)
    assert [at["bops"], drawn["bops"]] == [[float(cost.adapted_ratio)] for cost in costs]
    assert at["bops"] != drawn["bops"]
    written = (folder / "a.md").read_text(encoding="utf-8")
    assert (folder / "uncertainty.png").exists() and all(f"| {way} |" in written for way in uncertainty.WAYS)
    (folder / "banking77" / "train.csv").unlink()  # nothing is read or trained again
    uncertainty.main([*arguments, "--only_finished"])
    assert (folder / "a.md").read_text(encoding="utf-8") == written
    with pytest.raises(ValueError, match=r"another configuration \(epochs differ\)"):
        uncertainty.main([*arguments, "--only_finished", "--epochs", "2"])
