"""B-LoRA-XS: its factors, their cache, its parameter counts, and runs with every distribution of the weights."""

import dataclasses
import json
import shutil

import datasets
import peft
import pytest
import torch
import transformers
from models import batch, tiny_bert
from safetensors.torch import load_file, save
from tiny import save_tiny_backbone, tiny_config
from transformers import AutoModelForSequenceClassification

from pyro_blora import adapters, attach, fit, load
from pyro_blora.adapters import layers, open_gates
from pyro_blora.adapters.xs import Factors, factors
from pyro_blora.build import build
from pyro_blora.evaluation.verdicts import of_score
from pyro_blora.gates import Gates
from pyro_blora.layout import AdapterLayout
from pyro_blora.posterior import deployed
from pyro_blora.posterior.arviz_compat import group, read
from pyro_blora.posterior.calibration import fit_temperature
from pyro_blora.report import write_report
from pyro_blora.report.run_folder import RunFiles
from pyro_blora.report.sections.restarts import restarts
from pyro_blora.run import train_run
from pyro_blora.tasks import get_task
from pyro_blora.tasks.batching import by_length, held_out, on_device
from pyro_blora.training import Schedule
from pyro_blora.training.best_epoch import Validation
from pyro_blora.training.laplace_fit import fit_laplace

pytestmark = pytest.mark.usefixtures("eager")

LAWS = {
    "gaussian": {"weights": "gaussian"},
    "low rank": {"weights": "low_rank", "weights_settings": {"rank": 3}},
    "swag": {"weights": "swag", "weights_settings": {"rank": 2, "snapshots": 4}},
    "laplace": {"weights": "laplace"},
    "laplace of low rank": {
        "weights": "laplace",
        "weights_settings": {"structure": "low_rank", "rank": 4},
        "validation": 0.25,
    },
    "best epoch": {"validation": 0.25, "choose_epoch": True, "lr": 0.1},
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "svd"
    monkeypatch.setenv("PYRO_BLORA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("tiny"))


def weight(m=7, n=5, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


# --- factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("singular_values", ["input", "split"])
def test_the_factors_are_the_best_approximation_of_their_rank(singular_values):
    W = weight()
    right, left = factors(W, 3, singular_values=singular_values)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(left @ right, (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-5, rtol=1e-5)
    sizes = (left.norm(dim=0), right.norm(dim=1))
    expected = (torch.ones(3), S[:3]) if singular_values == "input" else (S[:3].sqrt(), S[:3].sqrt())
    for size, mine in zip(sizes, expected, strict=True):
        torch.testing.assert_close(size, mine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("singular_values", ["input", "split"])
def test_a_prior_of_one_scale_says_what_the_module_says_about_the_update(singular_values):
    """Var[(P^T Delta W Q)_ij] ~ S_j^2 with all singular values on the input side, S_i S_j split."""
    W = weight()
    right, left = factors(W, 3, singular_values=singular_values)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    M = torch.randn(40_000, 3, 3, generator=torch.Generator().manual_seed(0))
    seen = (U[:, :3].mT @ left @ M @ right @ Vh[:3].mT).var(0)
    expected = S[:3].square().expand(3, 3) if singular_values == "input" else torch.outer(S[:3], S[:3])
    torch.testing.assert_close(seen, expected, rtol=0.05, atol=0)


def test_a_randomized_decomposition_finds_what_has_low_rank():
    W = weight(60, 3) @ weight(3, 40, seed=1)
    state = torch.random.get_rng_state()
    right, left = factors(W, 3, svd="randomized")
    torch.testing.assert_close(left @ right, W, atol=1e-4, rtol=1e-4)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_decomposition_is_made_once_and_a_damaged_one_again(cache, monkeypatch):
    W = weight(seed=11)
    first = factors(W, 2)
    (path,) = [p for p in (cache / "svd").iterdir() if load_file(p)["U"].shape == (7, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("decomposed again"))
        assert all(torch.equal(a, b) for a, b in zip(first, factors(W, 2), strict=True))
    kept = path.read_bytes()
    flipped = bytearray(kept)
    flipped[-3] ^= 64
    swapped = {
        "U": (first.left + 1).contiguous(),
        "S": torch.ones(2),
        "V": torch.ones(5, 2),
    }  # another file's, unhashed
    for damaged in (kept[:20], bytes(flipped), save(swapped), b""):
        path.write_bytes(damaged)
        assert all(torch.equal(a, b) for a, b in zip(first, factors(W, 2), strict=True))
        assert path.read_bytes() == kept
    other = factors(weight(seed=12), 2)
    assert not torch.equal(first.left, other.left)


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PYRO_BLORA_CACHE", str(tmp_path / "file"))
    assert factors(weight(seed=13), 2).right.shape == (2, 5)


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_step_zero_is_the_pretrained_model_and_the_core_gets_a_gradient():
    plain, (inputs, _) = tiny_bert().eval(), batch()
    expected = plain(**inputs).logits
    net = attach(plain, rank=4, sequence_length=10, adapter="xs").eval()
    with adapters.gates(net, *open_gates(net.layout)):
        found = net(**inputs).logits
    torch.testing.assert_close(found, expected)
    found[:, 0].sum().backward()
    assert all(p.shape == (4, 4) and p.grad.abs().max() > 0 for p in net.adapter_parameters())


@pytest.mark.parametrize("rank", [2, 25])
def test_parameters_are_counted_as_in_the_paper(rank):
    """96 R^2 for four projections of each of RoBERTa-large's 24 layers, against 98,304 R of LoRA on query and value."""
    small = transformers.RobertaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=24, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40,
    )  # fmt: skip
    four = ("query", "value", "attention.output.dense", "output.dense")
    settings = {"rank": rank, "sequence_length": 8, "target_modules": four}
    net = attach(transformers.RobertaForSequenceClassification(small), adapter="xs", **settings)
    assert sum(p.numel() for p in net.adapter_parameters()) == 96 * rank**2
    large = transformers.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(large)
    layout = AdapterLayout.of(model, rank=rank, target_modules=("query", "value"), sequence_length=8)
    assert sum((p.in_features + p.out_features) * rank for p in layout.adapted) == 98_304 * rank


def test_rank_gates_and_bit_gates_apply_unchanged():
    """y = Q(W0) x + alpha / R Q(P M) diag(g) Q(Q(S Q^T) x), by the one rule of any adapter."""
    net = attach(tiny_bert(), rank=4, sequence_length=10, adapter="xs").eval()
    for p in net.adapter_parameters():
        torch.nn.init.normal_(p, std=0.3)
    layer, (inputs, _) = net.layers()[0], batch()
    down, up = layer.low_rank()
    plain = attach(tiny_bert(), rank=4, sequence_length=10).eval()
    twin = plain.layers()[0]
    with torch.no_grad():
        for mine, theirs in zip(net.layers(), plain.layers(), strict=True):
            for side, value in zip((theirs.lora_A, theirs.lora_B), mine.low_rank(), strict=True):
                side["default"].weight.copy_(value)
        plain.log_range.copy_(net.log_range)
        z, g = open_gates(net.layout)
        z[:, :, 2:], g[:, 1:] = 0, 0
        found = []
        for one in (net, plain):
            with adapters.gates(one, z, g):
                found.append(one(**inputs).logits)
    assert down.shape == twin.lora_A["default"].weight.shape and up.shape == twin.lora_B["default"].weight.shape
    torch.testing.assert_close(*found)


def test_under_autocast_the_product_of_factors_stays_in_single_precision():
    """It is a weight, rounded to its grid from float32, as what is exported is."""
    net = attach(tiny_bert(), rank=4, sequence_length=10, adapter="xs").eval()
    torch.nn.init.normal_(net.adapter_parameters()[0])
    layer = net.layers()[0]
    expected = layer.low_rank()[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.low_rank()[1], expected) and expected.dtype == torch.float32


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", LAWS)
def test_a_run_that_is_cut_off_resumes_to_the_same_bits(backbone, tmp_path, distribution):
    if distribution.startswith("laplace"):
        pytest.importorskip("laplace")
    config = tiny_config(backbone, adapter="xs", epochs=3, **{"lr": 2e-2, **LAWS[distribution]})
    whole = fit(config, folder=tmp_path / "whole", quiet=True)
    fit(config, folder=tmp_path / "cut", quiet=True, until=10)  # within SWAG's snapshots
    if distribution.startswith("laplace"):  # its curvature is found when training has ended
        assert not any("/weights." in name for name in load_file(tmp_path / "cut/checkpoints/state.safetensors"))
    again = fit(config, folder=tmp_path / "cut", quiet=True)
    for (name, a), (_, b) in zip(*(sorted(x.program.state_dict().items()) for x in (whole, again)), strict=True):
        assert torch.equal(a, b), name
    assert [line["loss"] for line in whole.metrics] == [line["loss"] for line in again.metrics]


@pytest.fixture(scope="module")
def opposed(tmp_path_factory):
    """Settings of a run whose held-out rows have a label that no training row has: with each epoch they are worse."""
    folder = tmp_path_factory.mktemp("opposed")
    sentences = get_task("acceptability").load(n_train=64)["train"]["sentence"]
    _, held = held_out(datasets.Dataset.from_dict({"row": [*range(64)]}), 0.25, seed=0)
    labels = [0 if row in held["row"] else 1 for row in range(64)]
    lines = [f"{sentence}\t{label}\n" for sentence, label in zip(sentences, labels, strict=True)]
    (folder / "SST-2").mkdir()
    for file in ("train.tsv", "dev.tsv"):
        (folder / "SST-2" / file).write_text("sentence\tlabel\n" + "".join(lines), encoding="utf-8")
    return {
        "task": "sst2", "glue_dir": str(folder), "max_train": None, "lr": 0.02, "epochs": 4, "validation": 0.25,
        "choose_epoch": True,
    }  # fmt: skip


def nll_by_step(trained):
    return {line["step"]: line["validation_nll"] for line in trained.metrics if "validation_nll" in line}


def test_the_best_epoch_is_kept(backbone, tmp_path, opposed):
    config = tiny_config(backbone, adapter="xs", method="lora", **opposed)
    trained = fit(config, folder=tmp_path / "run", quiet=True)
    seen = nll_by_step(trained)
    assert list(seen) == [3, 6, 9, 12]  # 48 of 64 rows are left, in batches of 16
    assert [*seen.values()] == sorted(seen.values()) and min(seen, key=seen.get) == 3
    left = fit(config, folder=tmp_path / "left", quiet=True, until=3)
    fit(config, folder=tmp_path / "cut", quiet=True, until=11)  # after the best epoch, which only its file knows then
    again = fit(config, folder=tmp_path / "cut", quiet=True)
    each = (one.program.net.adapter_parameters() for one in (trained, left, again))
    for mine, at_best, resumed in zip(*each, strict=True):
        assert torch.equal(mine, at_best) and torch.equal(mine, resumed)


def test_epochs_before_the_gates_start_do_not_stand_for_election(backbone, opposed):
    trained = fit(tiny_config(backbone, kl_warmup=0.9, **opposed), quiet=True)
    seen = nll_by_step(trained)
    assert seen[3] < seen[12]  # the first one was better, but everything was open there
    assert bool((trained.program.gate_guide.posterior().z.mean < 0.99).any())


@pytest.mark.parametrize(("method", "waits"), [("lora", False), ("qat_lora", True), ("bayesian_lora", True)])
def test_what_closes_gates_waits_for_their_start(backbone, method, waits):
    """Pinned gates, too, change the network when they start: 8 bit from the start on, everything open before."""
    parts = build(tiny_config(backbone, method=method, epochs=4, validation=0.25, choose_epoch=True, kl_warmup=0.5))
    schedule = Schedule.of(parts.config, len(parts.rows["train"]))
    assert Validation(parts, schedule, None).first == (schedule.opening if waits else 0)
    assert schedule.opening > 0


def test_a_damaged_best_epoch_is_refused(backbone, tmp_path):
    config = tiny_config(backbone, adapter="xs", method="lora", validation=0.25, choose_epoch=True)
    fit(config, folder=tmp_path, quiet=True, until=4)
    (tmp_path / "checkpoints" / "best.safetensors").write_bytes(b"half a fi")
    with pytest.raises(ValueError, match=r"best\.safetensors is damaged .*delete its folder"):
        fit(config, folder=tmp_path, quiet=True)


def test_rows_that_are_held_out_are_not_trained_on(backbone):
    config = tiny_config(backbone, validation=0.25)
    parts, whole = build(config), build(tiny_config(backbone))
    train, held_out, all_rows = (rows["sentence"] for rows in (
        parts.rows["train"], parts.rows["validation"], whole.rows["train"]))  # fmt: skip
    assert sorted([*train, *held_out]) == sorted(all_rows) and len(held_out) == 16
    assert len(parts.tokens["train"]) == parts.program.n_train == 48
    again, other = build(config), build(tiny_config(backbone, validation=0.25, seed=1, data_seed=0))
    assert again.rows["validation"][:] == parts.rows["validation"][:] == other.rows["validation"][:]


@pytest.mark.parametrize("distribution", ["gaussian", "swag", "laplace", "laplace of low rank"])
def test_what_is_loaded_predicts_the_same_and_the_adapter_is_an_ordinary_one(backbone, tmp_path, distribution):
    if distribution.startswith("laplace"):
        pytest.importorskip("laplace")
    settings = {"lr": 2e-2, "output_dir": str(tmp_path), "validation": 0.25, **LAWS[distribution]}
    folder = train_run(tiny_config(backbone, adapter="xs", **settings))
    summary = json.loads((folder / "summary.json").read_text())
    assert ("prior_precision" in summary["weights"]) == distribution.startswith("laplace")
    assert "96 weights of the adapter are random, by distribution" in write_report(folder).read_text()
    assert summary["weights"]["random"] == 6 * 16 and summary["trained_parameters"] > 6 * 16
    program = load(folder)
    saved = load_file(folder / "adapter" / "gates.safetensors")
    assert {"net.peft_model.base_model.model.bert.encoder.layer.0.attention.self.query.lora_core.weight"} <= set(saved)
    torch.manual_seed(0)
    drawn = program.weights.draw(50)
    assert drawn.std(0).square().mean().sqrt().item() == pytest.approx(summary["weights"]["std"], rel=0.3)
    theta = group(read(folder), "posterior")["theta"]
    assert theta.dims == ("chain", "draw", "weight") and theta.sizes["weight"] == 6 * 16
    (core,) = (p for key, p in program.net.random_weights().items() if key == (1, "core"))
    name = f"{theta.weight.values[16]}".split(".core")[0]
    mean = theta.sel(weight=f"{name}.core[1, 2]").mean().item()
    assert mean == pytest.approx(core[1, 2].item(), abs=6 * summary["weights"]["std"])
    plain = AutoModelForSequenceClassification.from_pretrained(backbone)
    reloaded = peft.PeftModel.from_pretrained(plain, folder / "adapter").eval()
    z, g = deployed(program)
    z = z.clone()
    z[:, [0, 1, 4]] = 1.0  # activations and base weights at 32 bit, as PEFT has them
    inputs = {"input_ids": torch.arange(20).view(2, 10)}
    with torch.no_grad(), adapters.gates(program.net, z, g):
        expected = program.net(**inputs).logits
        torch.testing.assert_close(reloaded(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    for key in ("averaged", "deployed"):
        found = summary["calibration"][key]
        assert {"nll", "ece_15", "ece_20", "ece_adaptive", "temperature", "scaled"} <= set(found)
        assert found["scaled"]["nll"] > 0 and found["temperature"] > 0


def test_rows_held_out_choose_laplaces_prior_precision(backbone, tmp_path):
    pytest.importorskip("laplace")
    config = tiny_config(backbone, adapter="xs", lr=2e-2, weights="laplace", validation=0.25)
    parts = fit(config, quiet=True).parts
    distribution, train, held_out = parts.program.weights, *(
        on_device(by_length(parts.tokens[split], parts.collate, 16)[0], "cpu") for split in ("train", "validation")
    )  # fmt: skip
    found = distribution.prior_precision.item()
    fit_laplace(parts.program, list(train), deployed(parts.program), held_out)
    assert distribution.prior_precision.item() == pytest.approx(found, rel=1e-4)
    without = fit(dataclasses.replace(config, validation=0.0), quiet=True).program.weights
    assert without.prior_precision.item() != pytest.approx(found, rel=0.1)


def test_factors_are_those_of_the_run_not_of_the_machine(backbone, tmp_path, monkeypatch):
    """Another machine may find singular vectors with other signs."""
    folder = train_run(tiny_config(backbone, adapter="xs", method="lora", lr=2e-2, output_dir=str(tmp_path)))
    inputs, expected = {"input_ids": torch.arange(20).view(2, 10)}, load(folder)

    def turned(*arguments, **settings):
        right, left = factors(*arguments, **settings)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
        return Factors(right * signs[:, None], left)

    monkeypatch.setattr(layers, "factors", turned)
    found = load(folder)
    gates = Gates(*open_gates(found.layout))
    with torch.no_grad():
        assert torch.equal(found.logits(inputs, gates), expected.logits(inputs, gates))


def test_the_temperature_is_that_of_the_rows_held_out(backbone, tmp_path):
    import pandas as pd

    folder = train_run(tiny_config(backbone, method="lora", lr=2e-2, validation=0.25, output_dir=str(tmp_path)))
    table = pd.read_parquet(folder / "predictions_validation.parquet")
    mean = torch.tensor(table[[name for name in table if name.startswith("p_")]].to_numpy())
    expected = fit_temperature(mean, torch.tensor(table["label"].to_numpy()))
    found = json.loads((folder / "summary.json").read_text())["calibration"]["averaged"]["temperature"]
    assert found == pytest.approx(expected, rel=1e-3) and abs(found - 1) > 0.01


@pytest.mark.parametrize("distribution", [{}, {"weights": "ensemble", "weights_settings": {"members": 2}}], ids=str)
def test_other_sentences_are_scored_by_uncertainty(tmp_path, backbone, glue_dir, distribution):
    config = tiny_config(backbone, adapter="xs", glue_dir=str(glue_dir), ood_task="wnli", validation=0.2, lr=2e-2,
                         output_dir=str(tmp_path), **distribution)  # fmt: skip
    folder = train_run(config)
    calibration = json.loads((folder / "summary.json").read_text())["calibration"]
    assert calibration["averaged"]["temperature"] > 0
    found = calibration["averaged"]["out_of_distribution"]
    assert all(0 <= found[name] <= 1 for name in ("entropy", "mutual_information"))
    assert (folder / "predictions_ood.parquet").exists()
    assert "AUROC of other sentences" in write_report(folder).read_text()
    assert "NaN" not in (folder / "summary.json").read_text()


@pytest.mark.parametrize("of", ["point", "laplace"])
def test_an_ensemble_averages_the_probabilities_of_its_members(backbone, tmp_path, of):
    import pandas as pd

    if of == "laplace":
        pytest.importorskip("laplace")
    settings = {"method": "lora", "adapter": "xs", "lr": 2e-2}
    ensemble = {"weights": "ensemble", "weights_settings": {"members": 2, "of": of}}
    folder = train_run(tiny_config(backbone, output_dir=str(tmp_path), **settings, **ensemble))
    alone = train_run(tiny_config(backbone, output_dir=str(tmp_path / "alone"), **settings, weights=of))
    (member,) = (folder / "restarts").iterdir()
    tables = [pd.read_parquet(place / "predictions.parquet") for place in (folder, alone, member)]
    columns = [name for name in tables[0] if name.startswith("p_")]
    together, first, second = (table[columns].to_numpy() for table in tables)
    assert abs(first - second).max() > 1e-3
    assert together == pytest.approx((first + second) / 2, abs=1e-6)
    summary = json.loads((folder / "summary.json").read_text())
    assert "2 fits" in summary["averaging"] and summary["calibration"]["averaged"]["mutual_information"] > 0
    alone, weights = json.loads((alone / "summary.json").read_text()), summary["weights"]
    assert summary["calibration"]["deployed"]["nll"] == pytest.approx(alone["deployed"]["nll"], rel=1e-6)
    assert summary["first_fit"]["nll"] == pytest.approx(alone["nll"], rel=1e-6) and summary["nll"] != alone["nll"]
    rows = restarts(RunFiles(folder), "Restarts").tables[0][1]
    assert rows["NLL"][0] == of_score(alone, "nll") and list(rows["seed"]) == [summary["seed"], summary["seed"] + 1]
    assert weights["random"] == alone["weights"]["random"] and weights["stored"] == 2 * alone["weights"]["stored"]
    shutil.rmtree(member)
    with pytest.raises(ValueError, match=r"a member of the ensemble is missing, .*seed-1: copy the whole run folder"):
        load(folder).predict(["the teacher laughs"])
    assert (weights.get("of"), "draws of the weights" in summary["averaging"]) == (
        ("laplace", True) if of == "laplace" else ("point", False)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "xs", "init_lora_weights": "eva"}, "is for LoRA, --adapter xs starts from W0"),
        ({"adapter": "xs", "adapter_settings": {"svd": "fast"}}, "svd must be one of exact, randomized"),
        (
            {"adapter_settings": {"svd": "exact"}},
            "adapter 'lora': unknown setting 'svd': it has none, drop --adapter.svd",
        ),
        ({"choose_epoch": True}, "choose_epoch needs rows to choose by"),
        ({"method": "ptq", "validation": 0.1, "choose_epoch": True}, "leave no epoch for --choose_epoch"),
        ({"weights": "swag", "weights_settings": {"rank": 10}}, "fewer than the 10 snapshots that it needs"),
        ({"weights": "swag", "weights_settings": {"rank": 2, "burn_in": 0.2}}, "the gates start at step 2: raise"),
        ({"weights": "swag", "validation": 0.1, "choose_epoch": True}, "averages over the epochs"),
        (
            {"weights": "ensemble", "weights_settings": {"of": "swag"}, "validation": 0.1, "choose_epoch": True},
            "averages over the epochs",
        ),
        (
            {"weights": "ensemble", "weights_settings": {"of": "ensemble"}},
            "of must be one of gaussian, laplace, low_rank, point, swag, or",
        ),
        ({"weights": "ensemble", "restarts": 2}, "members of --weights ensemble are restarts already"),
        ({"validation": 1.0}, "validation must be a fraction from 0 to below 1"),
        ({"validation": 0.001}, "leaves 64 to train on and 0 to validate on"),
        ({"weights": "laplace", "average_over": "dropout"}, "predicts by a network without dropout"),
        ({"ood_task": "acceptability"}, "must be another task"),
        ({"method": "full", "weights": "swag"}, "needs an adapter whose weights can be random"),
    ],
)
def test_what_cannot_work_together_is_refused(backbone, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_run(tiny_config(backbone, output_dir=str(tmp_path / "runs"), **changes))
    assert not (tmp_path / "runs").exists()
