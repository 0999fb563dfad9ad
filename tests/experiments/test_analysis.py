"""The notebooks run on the stored runs, and what they show is what the runs' summaries say."""

import json
import re
import runpy
import sys
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import nbclient
import numpy as np
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from pyro_blora.posterior import Posterior
from pyro_blora.posterior.arviz_compat import held_out_elpd, read
from pyro_blora.report import RunFiles

ANALYSIS = Path(__file__).resolve().parents[2] / "analysis"
NAMES = ["gates", "convergence", "ablation"]


class ThisPython(KernelSpecManager):
    """One kernel, of the running interpreter, whatever kernels are installed for its user."""

    def get_kernel_spec(self, kernel_name):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name=kernel_name, language="python")


@pytest.fixture
def executed(monkeypatch, tmp_path):
    """A function of a notebook's name that runs it as a reader would: (text put out, number of pictures)."""
    for variable in ("PYRO_BLORA_RUN", "PYRO_BLORA_RUNS", "PYTHONWARNINGS"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("IPYTHONDIR", "XDG_CACHE_HOME"):  # ArviZ announces its next version once a day and cache
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("PYTHONPATH", str(ANALYSIS.parent))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def run(name, **variables):
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        notebook = jupytext.read(ANALYSIS / f"{name}.py")
        kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())
        here = {"metadata": {"path": str(ANALYSIS)}}
        nbclient.NotebookClient(notebook, km=kernel, timeout=120, resources=here).execute()
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        outputs = [output for cell in code for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
        return "\n".join(texts), pictures

    return run


def summary_of(name):
    return json.loads((ANALYSIS / "example" / name / "summary.json").read_text(encoding="utf-8"))


def line(text, start):
    """The numbers of the only line that starts so."""
    (found,) = re.findall(rf"^{re.escape(start)}[ :]+(.*)$", text, re.MULTILINE)
    return [float(x) for x in re.findall(r"-?(?:inf|\d+\.?\d*)", found)]


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


def test_gates(executed):
    text, pictures = executed("gates")
    summary, posterior = summary_of("bops"), Posterior(read(ANALYSIS / "example" / "bops"))
    assert pictures == 5
    assert line(text, "3 chains, E[BOPs]")[0] == pytest.approx(100 * summary["bops"]["adapted_ratio"], abs=1e-4)
    for kind, rank in summary["expected_rank"].items():
        assert line(text, kind) == [pytest.approx(rank, abs=0.0051)]
    widths = posterior.depth_probs().z.mean(0).numpy()
    for t, tensor in enumerate(posterior.layout.tensors[:2]):
        np.testing.assert_allclose(line(text, f"{tensor}  "), widths[t], atol=0.0051)
        by_layer = line(text, f"{tensor}: E[bits] by layer")
        assert np.mean(by_layer) == pytest.approx(summary["expected_bits"][tensor], abs=0.05)
    silent = sum(int((kl[free] < 0.05).sum()) for kl, free in zip(posterior.kl(), posterior.free(), strict=True))
    assert f"{silent} of 108 chains" in text and "input: 4.query, 5.query" in text and "hidden: all" in text


def test_convergence(executed):
    text, pictures = executed("convergence")
    summary, data = summary_of("bops"), read(ANALYSIS / "example" / "bops")
    assert pictures == 4 and "The weights are point estimates" in text
    for chain, one in enumerate([summary, *summary["restarts"]]):
        assert line(text, "E[BOPs] of the chains")[chain] == pytest.approx(100 * one["bops"]["adapted_ratio"], abs=1e-4)
        assert line(text, "averaged has")[chain] == pytest.approx(one["metric"]["value"], abs=0.0006)
    assert f"KL 217.6 nats at first and {sum(summary['kl'].values()):.1f} at the end" in text
    for name, rhat in zip(("bits", "ranks"), Posterior(data).rhat(), strict=True):
        assert f"R-hat of {name}: exact median {np.median(rhat):.2f}, worst {rhat.max():.2f}" in text
    assert float(re.search(r"at most (\S+)", text)[1]) < 1e-6  # the loss is the sum of its parts


@pytest.mark.parametrize("name, pictures", [("gates", 5), ("convergence", 3)])
def test_one_chain(executed, name, pictures):
    text, found = executed(name, PYRO_BLORA_RUN="example/nested")
    assert found == pictures and f"{summary_of('nested')['bops']['adapted_ratio']:.4%}" in text
    if name == "convergence":
        assert "One chain: --restarts 3 would tell." in text and "The weights are point estimates" in text


def test_ablation(executed):
    text, pictures = executed("ablation")
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


@pytest.mark.parametrize("run", ["example/depth", str(ANALYSIS / "example" / "depth")])
def test_a_notebook_is_a_script_too(run, monkeypatch, tmp_path, capsys):
    """From any folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYRO_BLORA_RUN", run)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    runpy.run_path(str(ANALYSIS / "gates.py"))
    spent = summary_of("depth")["bops"]["adapted_ratio"]
    assert capsys.readouterr().out.startswith(f"1 chains, E[BOPs] {spent:.4%}")


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
