"""Every script in experiments/ runs: a script that is not in the table below fails."""

import runpy
import sys
from pathlib import Path

import pytest
from tiny import save_tiny_backbone, tiny_config

from experiments.grid import results, write_results
from experiments.studies.grid_file import Cell
from pyro_blora.run import train_run
from pyro_blora.tasks import get_task

pytestmark = pytest.mark.usefixtures("eager")

ROOT = Path(__file__).resolve().parents[2]
KEPT = "--output_dir OUT --keep OUT/cells --report OUT/report.md --figures OUT"
SMALL = f"--glue_dir GLUE --backbone TINY --max_train 64 --epochs 1 {KEPT}"
SCRIPTS = {  # script: a short run's arguments; OUT: a fresh folder, TINY: a small BERT, GLUE: the release (or a skip)
    "allocation.py": f"--tasks wnli --seeds 0 --budgets W3A4 --cells lora budget hessian {SMALL}",
    "benchmark.py": "--only quantizer gates --seconds 0.01 --output_dir OUT",
    "compare.py": "RESULTS --axis prior --against nested --report OUT/page.md",
    "demo_deberta.py": "--backbones TINY --tasks acceptability --max_train 32 --epochs 1 --draws 2 "
    "--lengths 16 --output_dir OUT --table OUT/table.md",
    "dial.py": f"--task wnli --rates 0.1 --blind_rates 0.1 --learning_rates 0.1 {SMALL}",
    "mrpc_as_pairs.py": "--glue_dir GLUE --max_train 20 --output_dir OUT",
    "ranks.py": f"--tasks wnli --seeds 0 --backbones TINY --cells hierarchical {SMALL}",
    "reading.py": "RUN --figures OUT/figures",
    "targets.py": f"--tasks wnli --targets 0.1 {SMALL}",
    "check_posterior.py": "--rungs e --simulations 5 --simulated_steps 10 --output_dir OUT "
    "--report OUT/report.md --figures OUT/copied",
    "fewest_bops.py": f"--tasks wnli --seeds 0 --methods uniform --steps 0 {SMALL}",
    "gates.py": f"--tasks wnli --seeds 0 --cells frozen alone {SMALL}",
    "levers.py": f"--tasks wnli --seeds 0 --methods uniform --levers all --without OUT/without {SMALL}",
    "glue_small.py": "--glue_dir GLUE --backbone TINY --tasks wnli --max_train 64 --max_length 64 --epochs 1 --draws 2 "
    "--output_dir OUT --table OUT/table.md",
    "weights.py": "--tasks wnli --seeds 0 1 --paths lora xs8-swag --max_train 100 --epochs 4 "
    "--draws 2 --glue_dir GLUE --backbone TINY --output_dir OUT --keep OUT/cells --report OUT/report.md --figures OUT",
    "train.py": "--task acceptability --backbone TINY --max_train 64 --max_length 32 --epochs 1 "
    "--draws 2 --output_dir OUT",
}


def tiny_results(folder):
    """The table of two finished runs."""
    backbone = save_tiny_backbone(folder / "tiny")
    configs = [tiny_config(backbone, prior=prior, output_dir=str(folder / "runs")) for prior in ("nested", "bops")]
    cells = [Cell({"task": c.task, "prior": c.prior, "seed": str(c.seed)}, c) for c in configs]
    for cell in cells:
        train_run(cell.config)
    write_results(results(cells), folder / "runs")
    return folder / "runs" / "results.parquet"


def test_every_script_is_in_the_table():
    with_their_own_tests = {
        "chaos.py",
        "deploy_benchmark.py",
        "gpu.py",
        "plan.py",
        "glue_table.py",
        "notebooks.py",
        "uncertainty.py",
        "predict_memory.py",
        "serve_load.py",
        "grid.py",
        "squad_split.py",
        "onnx_times.py",
    }
    assert {path.name for path in (ROOT / "experiments").glob("*.py")} == set(SCRIPTS) | with_their_own_tests


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_runs_and_leaves_results(script, tmp_path, request, monkeypatch):
    arguments = SCRIPTS[script].replace("OUT", str(tmp_path / "out"))
    if "RUN" in arguments:
        config = tiny_config(save_tiny_backbone(tmp_path / "tiny"), output_dir=str(tmp_path / "out"))
        arguments = arguments.replace("RUN", str(train_run(config)))
    if "RESULTS" in arguments:
        arguments = arguments.replace("RESULTS", str(tiny_results(tmp_path / "out")))
    if "TINY" in arguments:
        arguments = arguments.replace("TINY", str(save_tiny_backbone(tmp_path / "tiny", letters=True)))
    if "GLUE" in arguments:
        arguments = arguments.replace("GLUE", str(request.getfixturevalue("glue_dir")))
    _here(script, arguments.split(), monkeypatch)
    found = {
        "benchmark.py": "benchmark.json",
        "mrpc_as_pairs.py": "dev.csv",
        "weights.py": "report.md",
        "gates.py": "report.md",
    }.get(script, "summary.json")
    assert any((tmp_path / "out").rglob(found))


def _here(script, arguments, monkeypatch):
    """As `python experiments/SCRIPT` does, without the ten seconds in which a process imports its libraries."""
    for name, value in (("PYTHONPATH", str(ROOT)), ("PYRO_BLORA_COMPILE", "0"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)  # of the processes that it starts; compiling would take longer than its runs do
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(ROOT / "experiments" / script), run_name="__main__")
    except SystemExit as end:
        assert not end.code


def test_memory_of_predictions_is_printed_by_rows(monkeypatch, capsys):
    _here("predict_memory.py", ["--rows", "30"], monkeypatch)
    assert "| rows | peak memory | seconds |" in (said := capsys.readouterr().out) and "| 30 | " in said


def test_articles_of_squad_are_split(data_dir, tmp_path, monkeypatch, capsys):
    files = [str(data_dir / "squad" / name) for name in ("dev-v1.1.rebuilt.json", "xquad.en.json")]
    if not (data_dir / "squad").is_dir():
        pytest.skip(f"no questions at {data_dir / 'squad'}")
    _here("squad_split.py", ["--dev", files[0], "--xquad", files[1], "--to", str(tmp_path)], monkeypatch)
    assert capsys.readouterr().out.split() == ["train.json:", "7,673", "questions", "eval.json:", "352", "questions"]
    train, held_out = (
        {row["context"] for row in rows}
        for rows in get_task(
            "squad", {"squad_train": str(tmp_path / "train.json"), "squad_eval": str(tmp_path / "eval.json")}
        ).load().values()
    )  # fmt: skip
    assert not train & held_out
