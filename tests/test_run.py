"""A run as a user makes it: the folder, its files, and what is refused without leaving anything behind."""

import json
from pathlib import Path

import arviz
import numpy as np
import pandas as pd
import peft
import pytest
import torch
from architectures import ROWS
from safetensors.torch import load_file, save_file
from tiny import save_tiny_backbone, tiny_config
from transformers import AutoModelForSequenceClassification

from pyro_blora import adapters, draw, load, predict
from pyro_blora.__main__ import main
from pyro_blora.bops import expected_bits, expected_bops
from pyro_blora.build import build
from pyro_blora.checkpoint import read_tensors
from pyro_blora.config import RunConfig
from pyro_blora.layout import AdapterLayout
from pyro_blora.posterior import deployed, marginals
from pyro_blora.posterior.arviz_compat import held_out_elpd
from pyro_blora.run import each_restart, train_run
from pyro_blora.tasks.batching import by_length, on_device
from pyro_blora.training import natural_gradient
from pyro_blora.training.loop import _Loop, fit
from pyro_blora.user_code import content_in_use, held, module_of

SUMMARY = {
    "task", "backbone", "prior", "guide", "seed", "n_train", "n_eval", "metric", "accuracy", "nll", "ece", "brier",
    "draws", "averaging", "elbo_per_example", "kl", "bops", "expected_bits", "expected_rank", "adapter_parameters",
    "seconds", "peak_memory_bytes", "device",
}  # fmt: skip
METRICS = {
    "step", "loss", "nll", "kl_z", "kl_g", "expected_bits", "expected_rank", "bops_adapted", "bops_model", "seconds",
    "grad_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module", params=["adapted", "encoder"])
def run(request, backbone, tmp_path_factory):
    """A finished run folder and its configuration, of either scope."""
    output = tmp_path_factory.mktemp("runs")
    config = tiny_config(backbone, scope=request.param, output_dir=str(output), lr=5e-2, max_train=256)
    folder = train_run(config)
    assert folder == output / config.folder_name
    assert [path.name for path in output.iterdir()] == [folder.name]
    return folder, config


def flags(config: RunConfig, **changes) -> list[str]:
    shown = ("task", "backbone", "max_train", "epochs", "batch_size", "rank", "draws", "max_length", "output_dir")
    values = {name: getattr(config, name) for name in shown} | changes
    return ["train", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def evaluation(program, config, count=40):
    parts = build(config)
    rows, order = by_length(parts.tokens["eval"].select(range(count)), parts.collate, 16)
    return list(on_device(rows, torch.device("cpu"))), order


def test_the_folder_has_what_the_house_promises(run):
    folder, config = run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "checkpoints", "posterior.nc", "adapter", "predictions.parquet", "summary.json",
        "report.html", "SHA256SUMS",
    }  # fmt: skip
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "gates.safetensors",
    }  # fmt: skip
    assert RunConfig.from_json(folder / "config.json") == config
    written = json.loads((folder / "config.json").read_text())
    assert "torch" in written["versions"] and written["threads"] == torch.get_num_threads()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 32
    opening = int(config.kl_warmup * 32)
    for line in lines:
        gates = {"gates_moved", "gates_error"} if line["step"] >= opening + natural_gradient._FIRST else set()
        assert set(line) == METRICS | gates
        assert line.get("gates_error", 1) > 0 and line["grad_norm"] > 0
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".bin", ".pt", ".pickle")]


def test_the_summary_says_what_the_posterior_says(run):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    program = load(folder)
    z, g = marginals(program)
    bops = expected_bops(program.net.layout, z, g)
    assert summary["bops"]["adapted_ratio"] == pytest.approx(bops.adapted_ratio.item(), rel=1e-6)
    low, high = summary["bops"]["interval"]
    assert low <= summary["bops"]["adapted_ratio"] <= high
    bits = expected_bits(program.net.layout, z)
    for t, tensor in enumerate(program.net.layout.tensors):
        mask = program.z_mask[:, t]
        assert summary["expected_bits"][tensor] == pytest.approx(bits[mask, t].mean().item(), rel=1e-5)
    assert set(summary["expected_rank"]) == {"query", "key", "value"}
    table = pd.read_parquet(folder / "predictions.parquet")
    assert len(table) == summary["n_eval"]
    assert summary["accuracy"] == pytest.approx((table["decision"] == table["label"]).mean())
    assert summary["nll"] == pytest.approx(-table["log_likelihood"].mean(), rel=1e-5)
    at_mode = summary["deployed"]
    assert at_mode["accuracy"] == pytest.approx((table["deployed_decision"] == table["label"]).mean())
    assert at_mode["nll"] == pytest.approx(-table["deployed_log_likelihood"].mean(), rel=1e-5)
    assert np.allclose(table[["p_unacceptable", "p_acceptable"]].sum(axis=1), 1, atol=1e-5)


def test_posterior_opens_in_arviz_with_names(run):
    folder, config = run
    data = arviz.from_netcdf(str(folder / "posterior.nc"))
    for group in (
        "posterior",
        "prior",
        "sample_stats",
        "predictions",
        "predictions_constant_data",
        "constant_data",
    ):
        assert group in data.groups() or f"/{group}" in data.groups, group
    posterior = data["posterior"]
    assert posterior["z"].dims == ("chain", "draw", "projection", "tensor", "rung")
    assert posterior["g"].dims == ("chain", "draw", "projection", "rank")
    assert "1.value" in posterior["projection"].values and list(posterior["rung"].values) == [4, 8, 16, 32]
    assert data["predictions"]["log_likelihood"].dims == ("chain", "draw", "example")
    assert data["predictions"]["probability"].dims == ("chain", "draw", "example", "class")
    z = posterior["z"].sel(projection="0.query", tensor="lora_A").values
    assert set(np.unique(z)) <= {0.0, 1.0} and (np.diff(z, axis=-1) <= 0).all()
    assert posterior.sizes["draw"] == config.draws
    summary = json.loads((folder / "summary.json").read_text())
    assert held_out_elpd(data)[0] == pytest.approx(-summary["nll"], abs=1e-6)


def test_posterior_draws_are_those_of_the_summary(run):
    folder, config = run
    data, program = arviz.from_netcdf(str(folder / "posterior.nc")), load(folder)
    z, g = draw(program, config.draws, seed=config.seed)
    stored = data["posterior"]["z"].values[0]
    mask = program.z_mask.numpy()
    assert np.array_equal(stored[:, mask], z.numpy()[:, mask])
    expected = expected_bops(program.net.layout, z, g).adapted_ratio.numpy()
    assert np.allclose(data["posterior"]["bops_adapted"].values[0], expected)
    assert np.allclose(data["constant_data"]["z_marginal"].values[0, mask], marginals(program).z.numpy()[mask])


def test_load_predicts_what_was_saved(run):
    folder, config = run
    program = load(folder)
    batches, order = evaluation(program, config)
    prediction = predict(program, batches, gates=draw(program, config.draws, seed=config.seed)).restored(order)
    stored = pd.read_parquet(folder / "predictions.parquet").iloc[:40]
    assert np.allclose(prediction.mean[:, 1].numpy(), stored["p_acceptable"], atol=1e-5)


def test_peft_alone_reads_the_adapter_and_predicts_the_same(run, backbone):
    folder, config = run
    program = load(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(backbone)
    alone = peft.PeftModel.from_pretrained(plain, str(folder / "adapter")).eval()
    z, g = deployed(program)
    ranks = {p.name: 1 + int(g[i].sum()) for i, p in enumerate(program.net.layout.projections) if p.adapted}
    modules = dict(alone.base_model.model.named_modules())
    assert {name: modules[name].r["default"] for name in ranks} == ranks
    z = z.clone()
    z[:, [0, 1, 4]] = 1  # PEFT leaves activations and base weights at 32 bit
    for inputs, _ in evaluation(program, config)[0]:
        with torch.no_grad(), adapters.gates(program.net, z, g):
            expected = program.net(**inputs).logits
        with torch.no_grad():
            torch.testing.assert_close(alone(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_finished_run_is_never_overwritten(run, capsys):
    folder, config = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(FileExistsError, match="finished run already"):
        train_run(config)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_show_prints_the_table(run, capsys):
    folder, _ = run
    assert main(["show", str(folder)]) == 0
    text = capsys.readouterr().out
    for words in ("accuracy", "NLL", "ECE", "bits of lora_A", "rank of value", "BOPs / adapted", "BOPs / whole model"):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "acceptabilty"}, "did you mean 'acceptability'"),
        ({"prior": "bop"}, "did you mean 'bops'"),
        ({"guide": "meanfield"}, "did you mean 'mean_field'"),
        ({"prior.rate": -1}, "must be a finite number >= 0"),
        ({"rank": 0}, "rank must be from 1 to 65,536"),
        ({"rank": 33}, "exceeds the size of"),
        ({"precision": "fp16"}, "use bf16"),
        ({"target_modules": "nothing"}, "match no linear layer"),
        ({"task": "sst2", "glue_dir": "/nowhere"}, "/nowhere"),
        ({"backbone": "/no/such/model"}, "could not be loaded"),
        ({"max_length": 65}, "takes at most 64 tokens"),
        ({"max_train": 4}, "do not fill one step"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_leaves_nothing(backbone, tmp_path, capsys, changes, message):
    output = tmp_path / "runs"
    code = main(flags(tiny_config(backbone, output_dir=str(output)), **changes))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("pyro-blora: error:") and message in error
    assert not output.exists()


def test_a_label_outside_the_task_and_a_truncated_file_are_refused(backbone, tmp_path, capsys):
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    good = "sentence\tlabel\n" + "a fine film \t1\n" * 40
    for bad, message in (("a bad film \t7\n", "label"), ("a bad fi", "truncated")):
        (folder / "train.tsv").write_text(good)
        (folder / "dev.tsv").write_text(good + bad)
        config = tiny_config(backbone, task="sst2", output_dir=str(tmp_path / "runs"))
        assert main(flags(config, glue_dir=folder.parent)) == 2
        error = capsys.readouterr().err
        assert message in error and "dev.tsv" in error and "line 42" in error
    assert not (tmp_path / "runs").exists()


def test_regression_runs_to_a_summary(glue_dir, tmp_path):
    backbone = save_tiny_backbone(tmp_path / "backbone", letters=True)
    config = tiny_config(backbone, task="stsb", glue_dir=str(glue_dir), output_dir=str(tmp_path), draws=2)
    folder = train_run(config)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metric"]["name"] == "pearson" and summary["accuracy"] is None and summary["ece"]["value"] is None
    assert set(summary["scores"]) == {"pearson", "spearmanr"}
    assert "mean" in arviz.from_netcdf(str(folder / "posterior.nc"))["predictions"]


def test_a_run_is_trained_by_one_process_at_a_time(backbone, tmp_path):
    import filelock

    config = tiny_config(backbone, method="lora", output_dir=str(tmp_path / "runs"))
    place = tmp_path / "runs"
    place.mkdir()
    with (
        filelock.FileLock(place / f".{config.folder_name}.lock"),  # as the other process holds it
        pytest.raises(ValueError, match="is being trained by another process: wait for it"),
    ):
        train_run(config)
    assert not list(place.glob("*.partial"))
    assert train_run(config).is_dir() and not list(place.glob("*.lock"))


@pytest.fixture(scope="module")
def usual(backbone, tmp_path_factory):
    """The finished run of a configuration that changes nothing: not to be changed."""
    return train_run(tiny_config(backbone, output_dir=str(tmp_path_factory.mktemp("usual"))))


@pytest.mark.parametrize(
    "distributions", [{}, {"guide": "mixture", "prior": "hierarchical"}], ids=["defaults", "sampled-kl"]
)
def test_an_interrupted_run_is_finished_by_the_same_command(backbone, usual, tmp_path, monkeypatch, distributions):
    config = tiny_config(backbone, output_dir=str(tmp_path / "cut"), **distributions)
    cut_off(config, "export", monkeypatch)
    assert [path.name for path in Path(config.output_dir).iterdir()] == [f".{config.folder_name}.partial"]
    cut = train_run(config)
    whole = usual
    if distributions:
        whole = train_run(tiny_config(backbone, output_dir=str(tmp_path / "whole"), **distributions))
    assert summary_of(cut) == summary_of(whole)


def summary_of(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in ("seconds", "peak_memory_bytes")}


@pytest.fixture(scope="module")
def restarted(backbone, tmp_path_factory):
    """A finished run of two fits."""
    return train_run(tiny_config(backbone, restarts=2, output_dir=str(tmp_path_factory.mktemp("together"))))


def test_restarts_are_runs_of_their_own_and_chains_of_one_posterior(backbone, usual, restarted, tmp_path):
    folder = restarted
    other = train_run(tiny_config(backbone, seed=1, data_seed=0, output_dir=str(tmp_path / "alone")))
    together = arviz.from_netcdf(str(folder / "posterior.nc"))
    assert list(together["posterior"]["seed"].values) == [0, 1]
    for chain, one in enumerate((usual, other)):
        data = arviz.from_netcdf(str(one / "posterior.nc"))
        for group, name in (("posterior", "z"), ("predictions", "log_likelihood"), ("constant_data", "z_marginal")):
            mine, theirs = together[group][name].values[chain], data[group][name].values[0]
            assert np.array_equal(mine, theirs, equal_nan=True), (chain, name)
    summary = summary_of(folder)
    assert [one["seed"] for one in summary["restarts"]] == [1]
    assert summary["restarts"][0]["nll"] == summary_of(other)["nll"] != summary["nll"]
    restart = folder / "restarts" / "seed-1"
    assert RunConfig.from_json(restart / "config.json").data_seed == 0 and load(restart).n_train == 64
    assert [path.name for path in (folder / "restarts").iterdir()] == ["seed-1"]


def test_a_file_that_is_edited_between_two_fits_runs_as_it_was(backbone, tmp_path, monkeypatch):
    """The code of a run is that of its folder's name, in all of its fits."""
    code = """
import torch
from pyro_blora.gates import Gates, NestedBernoulli

def late(layout):
    return Gates(*(NestedBernoulli.from_rate(torch.full(shape, 0.5)) for shape in (layout.z_shape, layout.g_shape)))
"""
    file = tmp_path / "mine.py"
    file.write_text(code)
    config = tiny_config(
        backbone, prior=f"{file}:late", restarts=2, max_train=16, epochs=1, output_dir=str(tmp_path / "runs")
    )
    fits, name = [], config.folder_name

    def edited(*arguments, **settings):
        trained = fit(*arguments, **settings)
        file.write_text(code.replace("0.5", "2.0"))
        fits.append((trained.parts.config.seed, trained.parts.config.digest))
        return trained

    monkeypatch.setattr("pyro_blora.run.fit", edited)
    folder = train_run(config)
    assert folder.name == name and [seed for seed, _ in fits] == [1, 0] and name.endswith(fits[1][1])
    file.write_text(code)
    for place in (folder / "restarts" / "seed-1", folder):
        stated = load_file(place / "adapter" / "gates.safetensors")["prior_log_probs.z"]
        assert torch.allclose(stated.exp(), torch.tensor(-0.5).exp())
        assert load(place, allow_code=[f"{file}:late"]).n_train == 16


def test_code_that_was_edited_before_it_is_held_is_imported_again(tmp_path):
    file, name = tmp_path / "mine.py", f"{tmp_path}/mine.py:value"
    file.write_text("value = 1")
    assert module_of(name, "prior").value == 1
    file.write_text("value = 2")
    with held([name]):
        assert module_of(name, "prior").value == 2
        now = content_in_use(name)
        file.write_text("value = 3")
        assert module_of(name, "prior").value == 2 and content_in_use(name) == now
    assert module_of(name, "prior").value == 3


def test_restarts_have_the_same_training_rows_and_a_seed_of_their_own(backbone):
    config = tiny_config(backbone, restarts=3, seed=4)
    each = each_restart(config)
    assert [(one.seed, one.data_seed, one.restarts) for one in each] == [(5, 4, 1), (6, 4, 1)]
    rows = [build(one).rows["train"]["sentence"] for one in (config, *each, tiny_config(backbone, seed=5))]
    assert rows[0] == rows[1] == rows[2] != rows[3]
    assert [one.data_seed for one in each_restart(tiny_config(backbone, restarts=2, data_seed=9))] == [9]


def cut_off(config, function, monkeypatch):
    """Kill the run where it calls a function of run.py."""
    from pyro_blora import run as run_module

    with monkeypatch.context() as patch:
        patch.setattr(run_module, function, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train_run(config)


def test_a_run_that_is_cut_off_in_its_restart_goes_on(backbone, restarted, tmp_path, monkeypatch, capsys):
    """After the restart has trained, and before its folder has its name."""
    config = tiny_config(backbone, restarts=2, output_dir=str(tmp_path / "cut"))
    cut_off(config, "export", monkeypatch)
    left = Path(config.output_dir) / f".{config.folder_name}.partial"
    assert [path.name for path in (left / "restarts").iterdir()] == [".seed-1.partial"]
    capsys.readouterr()
    folder = train_run(config)
    said = capsys.readouterr().err
    assert "fit 1 of 2, seed 1: training: 8 steps, 8 done" in said and "fit 2 of 2, seed 0: training: 8 steps" in said
    assert [path.name for path in (folder / "restarts").iterdir()] == ["seed-1"]
    names = {path.name for path in (folder / "restarts" / "seed-1").iterdir()}
    assert names == {path.name for path in folder.iterdir()} - {"restarts"}
    assert summary_of(folder) == summary_of(restarted)


def test_an_interrupted_restart_is_resumed(backbone, restarted, tmp_path, monkeypatch):
    config = tiny_config(backbone, restarts=2, output_dir=str(tmp_path / "cut"))
    cut_off(config, "concatenate", monkeypatch)
    kept = Path(config.output_dir) / f".{config.folder_name}.partial" / "restarts" / "seed-1" / "summary.json"
    before = kept.stat().st_mtime_ns
    folder = train_run(config)
    assert (folder / "restarts" / "seed-1" / "summary.json").stat().st_mtime_ns == before
    assert summary_of(folder) == summary_of(restarted)


def test_a_tracker_gets_numbers_and_pictures_of_the_gates(backbone, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train_run(tiny_config(backbone, tracker="tensorboard", output_dir=str(tmp_path)))
    found = {"images": set(), "scalars": set()}
    for path in folder.rglob("events.out.*"):
        events = EventAccumulator(str(path))
        tags = events.Reload().Tags()
        for kind, seen in found.items():
            seen.update(tags[kind])
    assert {"loss", "expected_bits", "grad_norm"} <= found["scalars"]
    assert any("expected_bits" in name for name in found["images"])
    assert any("expected_rank" in name for name in found["images"])


FORGETFUL = """
import transformers


class Forgetful(transformers.BertForSequenceClassification):
    made = 0

    def __init__(self, config):
        super().__init__(config)
        Forgetful.made += 1
        self.secret = float(Forgetful.made)

    def forward(self, input_ids, attention_mask=None, **_):
        out = super().forward(input_ids, attention_mask)
        out.logits = out.logits + self.secret
        return out


def forgetful(num_labels):
    tokenizer = transformers.AutoTokenizer.from_pretrained("{folder}")
    return Forgetful.from_pretrained("{folder}", num_labels=num_labels), tokenizer
"""


def test_what_could_not_be_exported_is_not_trained(backbone, tmp_path, monkeypatch):
    """A model that adds what it does not save: read back, it is another one."""
    (tmp_path / "own.py").write_text(FORGETFUL.format(folder=backbone), encoding="utf-8")
    monkeypatch.setattr(_Loop, "run", lambda *_: pytest.fail("it was trained"))
    config = tiny_config(f"{tmp_path}/own.py:forgetful", method="full", output_dir=str(tmp_path / "runs"))
    with pytest.raises(ValueError, match=r"could not be exported and read back \(the exported .* differ"):
        train_run(config)
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_costs_were_counted_at_batch_one_loads_with_them(tmp_path):
    """DeBERTa's positions were not shared by a batch then; its layout did not say a batch size."""
    folder = save_tiny_backbone(tmp_path / "backbone")
    with torch.random.fork_rng():
        v3 = next(row for row in ROWS if row.name == "DebertaV3")
        words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        v3.build(vocab_size=len(words)).save_pretrained(folder)
    config = tiny_config(folder, output_dir=str(tmp_path / "runs"))
    run, path = train_run(config), "adapter/gates.safetensors"
    assert load(run).net.layout.batch_size == 32
    tensors, notes = read_tensors(run / path)
    older = AdapterLayout.of(v3.build(), rank=config.rank, sequence_length=config.max_length, batch_size=1).to_dict()
    del older["batch_size"]
    save_file(tensors, run / path, {"layout": json.dumps(older), "n_train": notes["n_train"]})  # nothing else was said
    (run / "SHA256SUMS").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match="older than the hashes"):
        again = load(run)
    assert again.net.layout.batch_size == 1 and again.net.layout.macs.tolist() == [
        p["tokens"] * p["in_features"] * p["out_features"] for p in older["projections"]
    ]
