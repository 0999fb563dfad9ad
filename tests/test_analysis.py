"""The notebooks run on the stored runs, and what they show is what the runs' summaries say."""

import json
import re
from pathlib import Path

import jupytext
import nbclient
import pytest

ANALYSIS = Path(__file__).resolve().parents[1] / "analysis"
NAMES = ["gates", "convergence", "ablation"]


def executed(name, monkeypatch, run=None):
    """All that the notebook's cells put out: text, and the number of pictures."""
    for variable in ("PYRO_BLORA_RUN", "PYRO_BLORA_RUNS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ANALYSIS.parent))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    if run:
        monkeypatch.setenv("PYRO_BLORA_RUN", run)
    notebook = jupytext.read(ANALYSIS / f"{name}.py")
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": ANALYSIS}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs), pictures


def summary_of(name):
    return json.loads((ANALYSIS / "example" / name / "summary.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_reads_as_text_and_code_in_turn(name):
    cells = jupytext.read(ANALYSIS / f"{name}.py").cells
    kinds = [cell.cell_type for cell in cells]
    assert kinds[::2] == ["markdown"] * len(kinds[::2]) and kinds[1::2] == ["code"] * len(kinds[1::2])
    assert all(len(cell.source) > 80 for cell in cells if cell.cell_type == "markdown")


def test_gates(monkeypatch):
    text, pictures = executed("gates", monkeypatch)
    summary = summary_of("bops")
    assert pictures == 4 and f"{summary['bops']['adapted_ratio']:.4%}" in text
    for kind, rank in summary["expected_rank"].items():
        assert float(re.search(rf"^{kind}\s+([\d.]+)$", text, re.MULTILINE)[1]) == pytest.approx(rank, abs=0.0051)
    assert "67 of 108 chains" in text


def test_convergence(monkeypatch):
    text, pictures = executed("convergence", monkeypatch)
    summary = summary_of("bops")
    assert pictures == 4 and "no continuous block" in text
    for one in [summary, *summary["restarts"]]:
        assert f"{one['bops']['adapted_ratio']:.3%}"[:-2] in text
    assert "R-hat of ranks: exact median 1.03, worst 1.63" in text


def test_convergence_of_one_chain(monkeypatch):
    text, pictures = executed("convergence", monkeypatch, run="example/nested")
    assert "One chain: --restarts 3 would tell." in text and pictures == 4


def test_ablation(monkeypatch):
    text, pictures = executed("ablation", monkeypatch)
    assert pictures == 2
    for name in ("bops", "nested", "depth"):
        assert f"{summary_of(name)['nll']:.4f}" in text and f"{name}: elpd_loo" in text
    assert re.search(r"^1\.00? +0\.0\d+ +0\.0610 +-inf", text, re.MULTILINE)


def test_the_page_about_reading_quotes_what_the_stored_run_says():
    page = (ANALYSIS.parent / "docs" / "reading-the-posterior.md").read_text(encoding="utf-8")
    summary = summary_of("bops")
    for one in [summary, *summary["restarts"]]:
        row = f"| {one['metric']['value']:.4f} | {one['nll']:.4f} | {one['bops']['adapted_ratio']:.2%} |"
        assert f"| {one['seed']} {row}" in page
    low, high = summary["bops"]["interval"]
    assert f"{summary['bops']['adapted_ratio']:.2%} [{low:.2%}, {high:.2%}]" in page
    assert f"{summary['ece']['value']:.4f}" in page and f"{summary['adapter_parameters']:,} parameters" in page
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ANALYSIS.parent / "docs" / link).exists(), link
