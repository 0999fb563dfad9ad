"""The notebooks run on the stored runs, and what they show, and have stored, is what the runs' summaries say."""

import functools
import json
import re
import runpy
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

from experiments import notebooks
from pyro_blora.posterior import Posterior
from pyro_blora.posterior.arviz_compat import held_out_elpd, read
from pyro_blora.report import RunFiles

ANALYSIS = Path(__file__).resolve().parents[2] / "analysis"
NAMES = ["gates", "convergence", "ablation", "own_data"]
NUMBER = r"-?(?:inf|\d+\.?\d*(?:e-?\d+)?)"


def stored(name):
    return nbformat.read(ANALYSIS / f"{name}.ipynb", as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook):
    """(Text put out, number of pictures) of an executed notebook."""
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "\n".join(output.get("text") or output.data["text/plain"] for output in outputs), pictures


def printed(notebook):
    return "".join(
        output.text for cell in code_of(notebook) for output in cell.outputs if output.output_type == "stream"
    )


@functools.cache
def executed(name, **variables):
    return notebooks.executed(name, **variables)


@pytest.fixture
def here(monkeypatch, tmp_path, capsys):
    """Runs a script in this process, not in a kernel, and gives (text put out, number of pictures)."""

    def run(name, **variables):
        pictures = []
        monkeypatch.chdir(tmp_path)
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(plt, "show", lambda: (pictures.append(1), plt.close("all")))
        runpy.run_path(str(ANALYSIS / f"{name}.py"))
        out, err = capsys.readouterr()
        assert not err
        return out, len(pictures)

    return run


def summary_of(name):
    return json.loads((ANALYSIS / "example" / name / "summary.json").read_text(encoding="utf-8"))


def line(text, start):
    """The numbers of the only line that starts so."""
    (found,) = re.findall(rf"^{re.escape(start)}[ :]+(.*)$", text, re.MULTILINE)
    return [float(x) for x in re.findall(NUMBER, found)]


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_is_its_script_executed(name):
    notebook, script = stored(name), jupytext.read(ANALYSIS / f"{name}.py")
    again = f"{name}.py was changed: make notebooks"
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ], again
    code = code_of(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    for cell in code:
        assert not cell.metadata and (cell.outputs or "print(" not in cell.source)
        shows = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(shows) == cell.source.count("plt.show()")


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_is_small_and_holds_nothing_of_the_machine_that_made_it(name):
    path = ANALYSIS / f"{name}.ipynb"
    assert path.stat().st_size < 500_000
    cells = nbformat.read(path, as_version=4).cells
    outputs = json.dumps([cell.outputs for cell in cells if cell.cell_type == "code"])
    assert not re.search(
        r"/(?:home|root|tmp|Users|work)\b|[A-Z]:\\\\|site-packages|Warning|\d\d:\d\d|0x[0-9a-f]{6}", outputs
    )
    assert set(stored(name).metadata) == {"kernelspec", "language_info"}
    assert "version" not in stored(name).metadata["language_info"]


def test_every_script_has_its_notebook():
    assert sorted(NAMES) == notebooks.NAMES == sorted(path.stem for path in ANALYSIS.glob("*.ipynb"))


def test_making_a_notebook_again_changes_nothing(monkeypatch):
    """Not a byte on one machine; nothing that is printed on another, whose matplotlib may draw otherwise."""
    monkeypatch.setenv("PYRO_BLORA_RUN", "example/nested")  # a reader's own run stays out of the repository
    again = notebooks.executed("gates")
    assert nbformat.writes(again) == nbformat.writes(executed("gates"))
    assert [cell.id for cell in again.cells] == [cell.id for cell in stored("gates").cells]
    before, after = printed(stored("gates")), printed(again)
    assert re.sub(NUMBER, "#", before) == re.sub(NUMBER, "#", after)
    np.testing.assert_allclose(*([float(x) for x in re.findall(NUMBER, text)] for text in (before, after)), atol=0.011)


def test_a_notebook_that_warns_is_not_stored(tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text("# %%\nimport warnings\n\nwarnings.warn('look out')\n", encoding="utf-8")
    monkeypatch.setattr(notebooks, "ANALYSIS", tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)loud\.py writes to stderr: .*look out"):
        notebooks.executed("loud")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_reads_as_text_and_code_in_turn(name):
    notebook = jupytext.read(ANALYSIS / f"{name}.py")
    assert notebook.metadata["jupytext"]["text_representation"]["format_name"] == "percent"
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[::2] == ["markdown"] * len(kinds[::2]) and kinds[1::2] == ["code"] * len(kinds[1::2])
    assert kinds[-1] == "markdown"
    for before, code, after in zip(notebook.cells, notebook.cells[1:], notebook.cells[2:], strict=False):
        if "plt.show()" in code.source:
            assert "\n## " in f"\n{before.source}" and re.search("stored runs?", after.source.split("\n## ")[0])


def test_gates():
    text, pictures = shown(executed("gates"))
    summary, posterior = summary_of("bops"), Posterior(read(ANALYSIS / "example" / "bops"))
    assert pictures == 5
    assert line(text, "E[BOPs]")[0] == pytest.approx(100 * summary["bops"]["adapted_ratio"], abs=1e-4)
    for kind, rank in summary["expected_rank"].items():
        assert line(text, kind) == [pytest.approx(rank, abs=0.0051)]
    widths = posterior.depth_probs().z.mean(0).numpy()
    for t, tensor in enumerate(posterior.layout.tensors[:2]):
        np.testing.assert_allclose(line(text, f"{tensor}  "), widths[t], atol=0.0051)
        by_layer = line(text, f"{tensor}: E[bits] by layer")
        assert np.mean(by_layer) == pytest.approx(summary["expected_bits"][tensor], abs=0.05)
    silent = sum(int((kl[free] < 0.05).sum()) for kl, free in zip(posterior.kl(), posterior.free(), strict=True))
    assert f"{silent} of 108 ladders" in text and "base: 4.query, 5.query" in text and "hidden: all" in text


def test_convergence(here):
    text, pictures = here("convergence")
    summary, data = summary_of("bops"), read(ANALYSIS / "example" / "bops")
    assert pictures == 4 and "The weights are point estimates" in text
    for chain, one in enumerate([summary, *summary["restarts"]]):
        assert line(text, "E[BOPs] of the chains")[chain] == pytest.approx(100 * one["bops"]["adapted_ratio"], abs=1e-4)
        assert line(text, "accuracy, averaged")[chain] == pytest.approx(one["metric"]["value"], abs=0.0006)
    last = json.loads((ANALYSIS / "example" / "bops" / "metrics.jsonl").read_text().splitlines()[-1])  # before its step
    assert f"KL 217.6 nats at first and {last['kl_z'] + last['kl_g']:.1f} at the end" in text
    for name, rhat in zip(("bits", "ranks"), Posterior(data).rhat(), strict=True):
        assert f"R-hat of {name}: exact median {np.median(rhat):.2f}, worst {rhat.max():.2f}" in text
    assert float(re.search(r"at most (\S+)", text)[1]) < 1e-6  # the loss is the sum of its parts


@pytest.mark.parametrize(
    ("name", "run", "pictures"),
    [("gates", "example/nested", 5), ("convergence", str(ANALYSIS / "example" / "nested"), 3)],
)
def test_a_notebook_is_a_script_too_and_reads_a_run_of_one_chain(name, run, pictures, here):
    """From any folder; the run's may be relative to the script's."""
    text, found = here(name, PYRO_BLORA_RUN=run)
    assert found == pictures and f"{summary_of('nested')['bops']['adapted_ratio']:.4%}" in text
    if name == "convergence":
        assert "One chain: --restarts 3 would tell." in text and "The weights are point estimates" in text


def test_ablation():
    text, pictures = shown(executed("ablation"))
    summaries = [summary_of(name) for name in ("bops", "nested", "depth")]
    assert pictures == 2 and "priors: bops, nested, depth" in text
    for label, values in {
        "accuracy ": [one["accuracy"] for one in summaries], "NLL": [one["nll"] for one in summaries],
        "ECE": [one["ece"]["value"] for one in summaries],
        "E[BOPs]": [one["bops"]["adapted_ratio"] for one in summaries],
        "rank value": [one["expected_rank"]["value"] for one in summaries],
    }.items():  # fmt: skip
        np.testing.assert_allclose(line(text, label), values, atol=6e-5)
    for one in summaries:
        (found,) = re.findall(rf"^{one['prior']} +(-0\.\d+) +(0\.\d+)$", text, re.MULTILINE)
        elpd, error = map(float, found)
        assert elpd == pytest.approx(-one["nll"], abs=6e-5) and 0.015 < error < 0.025
    assert "elpd_loo" in text or "elpd_diff" in text
    posterior = Posterior(read(ANALYSIS / "example" / "bops"))
    for factor in (0.5, 1.0, 2.0):
        weighted, exact, k, effective, _ = line(text, f"{factor:.2f}")
        again = posterior.reweighted(factor)
        assert (weighted, exact, k) == pytest.approx((again.bops_adapted, again.bops_exact, again.pareto_k), abs=6e-5)
        assert effective == pytest.approx(1 / np.square(again.weights).sum(), abs=1e-3)


def test_the_page_about_reading_quotes_what_the_stored_run_says():
    page = (ANALYSIS.parent / "docs" / "tutorial" / "reading-the-posterior.md").read_text(encoding="utf-8")
    summary = summary_of("bops")
    for one in [summary, *summary["restarts"]]:
        row = f"| {one['metric']['value']:.4f} | {one['nll']:.4f} | {one['bops']['adapted_ratio']:.2%} |"
        assert f"| {one['seed']} {row}" in page
    low, high = summary["bops"]["interval"]
    assert f"{summary['bops']['adapted_ratio']:.2%} [{low:.2%}, {high:.2%}]" in page
    assert f"{summary['ece']['value']:.4f}" in page and f"{summary['adapter_parameters']:,} parameters" in page
    beside = RunFiles(ANALYSIS / "example" / "bops").summary["beside"]
    assert f"accuracy {beside['accuracy']['constant']:.4f}" in page and f"NLL {beside['nll']['constant']:.4f}" in page
    chance = beside["ece"]["chance"]
    assert re.search(rf"ECE of {chance['mean']:.3f}\sby\schance, and below {chance['high']:.3f} in 95 %", page)
    elpd, error = held_out_elpd(read(ANALYSIS / "example" / "bops"))
    assert f"held_out_elpd(data)  # ({elpd:.4f}, {error:.4f})" in page
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ANALYSIS.parent / "docs" / "tutorial" / link).exists(), link
