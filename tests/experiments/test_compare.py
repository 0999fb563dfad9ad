"""Comparisons of a grid's results: what the page says is what the runs say, and what is missing is named."""

import json
import shutil
from pathlib import Path

import arviz
import numpy as np
import pandas as pd
import pytest
from tiny import save_tiny_backbone, tiny_grid

from experiments import compare, grid
from experiments.studies import loo
from experiments.studies.compare_page import kept, what_differs
from experiments.studies.grid_file import read_grid
from experiments.studies.loo import loo_of_run
from pyro_blora import draw, load
from pyro_blora.bops import at_full_width
from pyro_blora.checkpoint import read_tensors, write_tensors
from pyro_blora.config import RunConfig
from pyro_blora.posterior.arviz_compat import held_out, leave_one_out
from pyro_blora.run import train_run

AXES = """  task: [acceptability]
  method: [lora, bayesian_lora, {method: qat_lora, prior.bits: 2}]
  seed: [0, 1]
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The table of a finished grid of six small runs."""
    folder = tmp_path_factory.mktemp("grid")
    path = tiny_grid(folder / "study.yaml", save_tiny_backbone(folder / "tiny"), AXES)
    cells = read_grid(path, str(folder / "runs"))
    for cell in cells:
        train_run(cell.config)
    grid.write_results(cells, folder / "runs")
    return folder / "runs" / "results.parquet"


def page(results, *more):
    compare.main([str(results), "--axis", "method", "--against", "lora", *more])
    return results.with_name("compare.md").read_text(encoding="utf-8")


def rows(text, heading, first):
    """Cells of the table rows of a section that hold an entry."""
    lines = [line for line in text.split(heading)[1].split("\n## ")[0].splitlines() if f"`{first}`" in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| accept")]


def test_the_page_says_what_the_runs_say(results):
    text, table = page(results), pd.read_parquet(results)
    mine = table[table["method"] == "qat_lora"]
    (line,) = rows(text, "# compare", "qat_lora")
    assert line[2] == "0, 1" and line[4].startswith(f"{mine['deployed_nll'].mean():.3f} ± ")
    full = [at_full_width(load(folder).layout).adapted.item() for folder in mine["folder"]]
    assert line[5] == f"{(mine['deployed_bops_adapted'] * full).mean() / 1e9:.1f}"
    (line,) = rows(text, "## Paired differences", "qat_lora")
    theirs = table[table["method"] == "lora"]
    assert line[2] == "2" and line[4].startswith(
        f"{mine['deployed_nll'].mean() - theirs['deployed_nll'].mean():+.3f} ["
    )
    assert rows(text, "## Paired differences", "lora") == []
    bits = [json.loads((Path(folder) / "summary.json").read_text())["expected_bits"] for folder in mine["folder"]]
    (line,) = rows(text, "## What the gates keep", "qat_lora")
    assert line[2] == f"{np.mean([x['input'] for x in bits]):.1f} ± 0.0" and line[2:].count("2.0 ± 0.0") == 5
    assert "training examples, in float32." in text and "Missing of the grid: none." in text
    assert (results.parent / "compare.png").stat().st_size > 10_000


def test_the_page_opens_with_what_is_beyond_noise(results):
    apart, near = (0.2, 0.1, 0.3), (0.1, -0.1, 0.3)
    found = {("sst2", "wide"): (3, [near, apart, near, near]), ("sst2", "flat"): (3, [near, near, near, apart]),
             ("stsb", "wide"): (1, [near, apart, near, near]), ("rte", "wide"): (0, []),
             ("mrpc", "eva"): (3, [apart, near, apart, near])}  # fmt: skip
    assert what_differs(found, "lora").splitlines() == [
        "- **sst2**, minus `lora`: `wide` NLL +0.200 [+0.100, +0.300]; `flat` NLL of draws +0.200 [+0.100, +0.300] "
        "beyond noise.",
        "- **stsb**, minus `lora`: `wide` NLL +0.200 [+0.100, +0.300] (one seed) beyond noise.",
        "- **rte**, minus `lora`: nothing beyond noise.",
        "- **mrpc**, minus `lora`: `eva` score +0.200 [+0.100, +0.300] beyond noise.",
    ]
    assert page(results).splitlines()[2].startswith("- **acceptability**, minus `lora`: ")


@pytest.mark.parametrize(
    ("metric", "known"), [("accuracy", True), ("bleu", False), ("macro_f1", False)], ids=["known", "unknown", "its own"]
)
def test_a_score_that_resamples_do_not_have_has_no_interval(metric, known, results, tmp_path):
    """Nor does one that has the name of a score, and is another; the NLL has one in any case."""
    table = pd.read_parquet(results)
    table["metric"] = metric
    table.to_parquet(tmp_path / "results.parquet")
    (line,) = rows(page(tmp_path / "results.parquet"), "## Paired differences", "qat_lora")
    assert [cell != "-" for cell in line[3:]] == [known, True, known, True]


def test_arviz_compares_the_log_scores_of_held_out_examples(results):
    text, table = page(results), pd.read_parquet(results)
    lines = [rows(text, "## ArviZ's compare", entry)[0] for entry in ("lora", "bayesian_lora", "qat_lora")]
    for line in lines:
        runs = table[table["method"] == line[1].strip("`")]
        n = len(pd.read_parquet(f"{runs['folder'].iloc[0]}/predictions.parquet"))
        assert float(line[2]) == pytest.approx(-n * runs["nll"].mean(), abs=0.06)
    assert sum(float(line[5]) for line in lines) == pytest.approx(1, abs=0.02)
    best = max(float(line[2]) for line in lines)
    assert all(float(line[3]) == pytest.approx(best - float(line[2]), abs=0.11) for line in lines)


def test_a_cell_that_is_missing_is_named(results, tmp_path):
    table = pd.read_parquet(results)
    table.drop(table.index[(table["method"] == "qat_lora") & (table["seed"] == "1")]).to_csv(
        tmp_path / "part.csv", index=False
    )
    compare.main([str(tmp_path / "part.csv"), "--axis", "method", "--against", "lora"])
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert "Missing among the entries and seeds that have a run: acceptability `qat_lora` seed 1." in text
    assert rows(text, "## Paired differences", "qat_lora")[0][2] == "1"


def test_an_entry_and_a_seed_that_nothing_is_finished_of_are_named(results, tmp_path):
    """As the grid wanted them, beside the table; the cells of another grid do not count."""
    table = pd.read_parquet(results)
    table[(table["method"] != "qat_lora") & (table["seed"] == "0")].to_parquet(tmp_path / "results.parquet")
    cells = json.loads(results.with_name("cells.json").read_text())
    for left, said in (
        (cells, "of the grid: acceptability `lora` seed 1, acceptability `bayesian_lora` seed 1, acceptability "
                "`qat_lora` seed 0, acceptability `qat_lora` seed 1."),
        ([cell for cell in cells if cell["method"] != "lora"], "among the entries and seeds that have a run: none."),
        ([{**cell, "rank": "4"} for cell in cells], "among the entries and seeds that have a run: none."),
    ):  # fmt: skip
        (tmp_path / "cells.json").write_text(json.dumps(left))
        assert f"Missing {said}" in page(tmp_path / "results.parquet")


def test_what_only_some_entries_have_is_kept():
    """Tensor roles of one adapter, projection types of one choice of modules."""
    runs = [
        ({"input": 8.0, "lora_A": 4.0}, {"query": 4.0}),
        ({"input": 8.0, "core": 2.0}, {"query": 3.0, "dense": 7.0}),
    ]
    table = pd.DataFrame([
        {"task": "sst2", "adapter": name, "seed": "0", "summary": {"expected_bits": bits, "expected_rank": ranks}}
        for name, (bits, ranks) in zip(("lora", "xs"), runs, strict=True)
    ])  # fmt: skip
    head, _, *lines = kept(table, "adapter").splitlines()
    assert head == "| task | adapter | E[bits] input | lora_A | core | E[rank] query | dense |"
    assert lines == ["| sst2 | `lora` | 8.0 | 4.0 | - | 4.0 | - |", "| sst2 | `xs` | 8.0 | - | 2.0 | 3.0 | 7.0 |"]


def test_leaving_one_out_is_of_random_gates_and_labelled(results):
    text = page(results, "--loo", "16", "--loo_draws", "20")
    section = text.split("## Leave-one-out")[1]
    assert section.count("`bayesian_lora`") == 2 and "`lora`" not in section
    assert ("Not corrected for the guide" in section) == arviz.__version__.startswith("0.")


def test_leave_one_out_of_a_run_is_below_its_fit(results):
    table = pd.read_parquet(results)
    folder = table[table["method"] == "bayesian_lora"]["folder"].iloc[0]
    assert loo_of_run(compare.Path(table[table["method"] == "lora"]["folder"].iloc[0]), 16, 20) is None
    result, _ = loo_of_run(compare.Path(folder), 16, 20)
    assert result.n_data_points == 16 and result.n_samples == 20 and result.p_loo >= 0


def test_leave_one_out_runs_no_code_but_what_is_allowed(results, tmp_path):
    """Also that of the data, which `load` does without."""
    table = pd.read_parquet(results)
    folder = shutil.copytree(table[table["method"] == "bayesian_lora"]["folder"].iloc[0], tmp_path / "run")
    (tmp_path / "mine.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    values = json.loads((folder / "config.json").read_text()) | {"task": f"{tmp_path}/mine.py:task"}
    (folder / "config.json").write_text(json.dumps(values))
    gates = folder / "adapter" / "gates.safetensors"
    tensors, notes = read_tensors(gates)
    config = RunConfig.from_json(folder / "config.json")
    write_tensors(gates, tensors, notes | {"config": config.digest})  # as of a run of that task
    with pytest.raises(ValueError, match=r"mine\.py:task.?, and code never runs because a file names it"):
        loo_of_run(folder, 16, 20)
    assert not (tmp_path / "ran").exists()


def test_leave_one_out_is_given_the_densities_of_its_draws(results, monkeypatch):
    """What ArviZ 1.x corrects with: log p(y, z, g) and log q(z, g) of the same draws."""
    table = pd.read_parquet(results)
    folder = table[table["method"] == "bayesian_lora"]["folder"].iloc[0]
    seen = []
    monkeypatch.setattr(loo, "leave_one_out", lambda *arrays: seen.extend(arrays))
    loo.loo_of_run(compare.Path(folder), 16, 20)
    log_likelihood, log_joint, log_q = seen
    program = load(folder)
    gates, distributions, prior = draw(program, 20), program.gate_guide.posterior(), program.prior()
    of = [sum(distribution.log_prob(x).flatten(1).sum(-1).detach() for distribution, x in zip(pair, gates, strict=True))
          for pair in (prior, distributions)]  # fmt: skip
    assert np.allclose(log_joint, of[0] + log_likelihood.sum(-1) * program.n_train / 16, atol=1e-3)
    assert np.allclose(log_q, of[1], atol=1e-3) and log_likelihood.shape == (20, 16)


def test_leave_one_out_of_a_known_posterior():
    """Normal data with a known mean's posterior: the exact log density of each point given the others."""
    generator = np.random.default_rng(0)
    y = generator.normal(size=20)
    draws = y.mean() + generator.normal(size=4000) / len(y) ** 0.5
    log_likelihood = -0.5 * (y - draws[:, None]) ** 2 - 0.5 * np.log(2 * np.pi)
    log_q = -0.5 * len(y) * (draws - y.mean()) ** 2 + 0.5 * np.log(len(y) / (2 * np.pi))
    result, _ = leave_one_out(log_likelihood, log_likelihood.sum(-1), log_q)  # the guide is the posterior
    others = (y.sum() - y) / (len(y) - 1)
    variance = 1 + 1 / (len(y) - 1)
    exact = (-0.5 * (y - others) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)).sum()
    assert float(getattr(result, "elpd_loo", getattr(result, "elpd", None))) == pytest.approx(exact, abs=0.1)


def test_held_out_scores_have_their_sum_and_its_standard_error():
    scores = np.array([-1.0, -2.0, -0.5, -0.5])
    worse = scores - np.array([0.1, 0.3, 0.1, 0.3])
    error = held_out(scores, 3).se
    assert float(error) == pytest.approx(np.sqrt(len(scores) * scores.var()))
    table = arviz.compare({"one": held_out(scores, 3), "two": held_out(worse, 3)})
    assert list(table.index) == ["one", "two"]
    assert table.loc["two", "elpd_diff"] == pytest.approx(0.8)
    assert table.loc["two", "dse"] == pytest.approx((4 * 0.01) ** 0.5)


def test_other_axes_are_not_pooled(results, tmp_path, refusal):
    table = pd.read_parquet(results)
    other = table.assign(rank="8")
    both = pd.concat([table.assign(rank="4"), other])[["task", "rank", *table.columns[1:]]]
    both.to_csv(tmp_path / "both.csv", index=False)
    compare.main([str(tmp_path / "both.csv"), "--axis", "method", "--against", "lora"])
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    lines = rows(text, "## Paired differences", "qat_lora")
    assert [line[0] for line in lines] == ["acceptability, rank 4", "acceptability, rank 8"]
    assert all(line[2] == "2" for line in lines)
    both.drop(columns="rank").to_csv(tmp_path / "both.csv", index=False)
    refusal(compare.main, tmp_path / "both.csv", "--axis", "method", "--against", "lora")


def test_entries_without_a_common_seed_are_named(results, tmp_path):
    table = pd.read_parquet(results)
    table[(table["method"] == "qat_lora") == (table["seed"] == "1")].to_csv(tmp_path / "part.csv", index=False)
    compare.main([str(tmp_path / "part.csv"), "--axis", "method", "--against", "lora"])
    assert "| acceptability | `qat_lora` | none in common |" in (tmp_path / "compare.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--axis", "prior", "--against", "lora"], "axis 'prior'"),
        (
            ["--axis", "seed", "--against", "0"],
            "cannot be compared: it takes a task, a seed and one of the other axes; here are task, method",
        ),
        (["--axis", "method", "--against", "sgd"], "no run has method 'sgd': lora, bayesian_lora, qat_lora"),
    ],
)
def test_what_cannot_be_compared_is_refused(results, refusal, arguments, message):
    assert message in refusal(compare.main, results, *arguments, "--report", results.with_name("not.md"))
    assert not results.with_name("not.md").exists()


def test_runs_of_other_examples_are_not_paired(results, tmp_path, refusal):
    table = pd.read_parquet(results)
    moved = Path(shutil.copytree(table["folder"].iloc[-1], tmp_path / "run"))
    answers = pd.read_parquet(moved / "predictions.parquet")
    answers.assign(label=1 - answers["label"]).to_parquet(moved / "predictions.parquet")
    table.loc[table.index[-1], "folder"] = str(moved)
    table.to_parquet(tmp_path / "results.parquet")
    said = refusal(compare.main, tmp_path / "results.parquet", "--axis", "method", "--against", "lora")
    assert "run was evaluated on other examples than" in said


def test_a_table_or_a_run_that_is_gone_is_named(results, tmp_path, refusal):
    table = pd.read_parquet(results)
    table["folder"] = "gone"
    table.to_parquet(tmp_path / "results.parquet")
    for path, message in (
        (tmp_path / "results.parquet", "run gone is gone"),
        (tmp_path / "no.parquet", "does not exist"),
    ):
        assert message in refusal(compare.main, path, "--axis", "method", "--against", "lora")
