"""Every script in experiments/ runs: a script that is not in the table below fails."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny import save_tiny_backbone, tiny_config

from experiments.grid import write_results
from experiments.studies.grid_file import Cell
from pyro_blora.run import train_run
from pyro_blora.tasks import get_task

pytestmark = pytest.mark.usefixtures("eager")

ROOT = Path(__file__).resolve().parents[2]
KEPT = "--output_dir RUNS --keep OUT/cells --report OUT/report.md --figures OUT"
SMALL = f"--glue_dir GLUE --backbone TINY --max_train 64 --epochs 1 {KEPT}"
SCRIPTS = {  # script: a short run's arguments; OUT: a fresh folder, TINY: a small BERT, GLUE: the release (or a skip)
    # RUNS: a folder of all scripts, in which a study finds what another one has trained already
    "allocation.py": f"--tasks wnli --seeds 0 --budgets W3A4 --cells lora budget hessian {SMALL}",
    "benchmark.py": "--only quantizer gates --seconds 0.01 --output_dir OUT",
    "compare.py": "RESULTS --axis prior --against nested --report OUT/page.md",
    "demo_deberta.py": "--backbones TINY --tasks acceptability --max_train 32 --epochs 1 --draws 2 "
    "--lengths 16 --output_dir OUT --table OUT/table.md",
    "dial.py": f"--task wnli --rates 0.1 --blind_rates 0.1 --learning_rates 0.1 {SMALL}",
    "low_bit_products.py": "--report OUT/page.md --low_bit",
    "mrpc_as_pairs.py": "--glue_dir GLUE --max_train 20 --output_dir OUT",
    "ranks.py": f"--tasks wnli --seeds 0 --backbones TINY --cells hierarchical {SMALL}",
    "reading.py": "RUN --figures OUT/figures",
    "gate_noise.py": "RUN --report OUT/page.md",
    "targets.py": f"--tasks wnli --targets 0.1 {SMALL}",
    "check_posterior.py": "--rungs e --simulations 5 --simulated_steps 10 --output_dir OUT "
    "--report OUT/report.md --figures OUT/copied",
    "fewest_bops.py": f"--tasks wnli --seeds 0 --methods uniform --steps 0 {SMALL}",
    "gates.py": f"--tasks wnli --seeds 0 --cells frozen alone {SMALL}",
    "levers.py": f"--tasks wnli --seeds 0 --methods uniform --levers all --without OUT/without {SMALL}",
    "glue_small.py": "--glue_dir GLUE --backbone TINY --tasks wnli --max_train 64 --max_length 64 --epochs 1 --draws 2 "
    "--output_dir OUT --table OUT/table.md",
    "weights.py": f"--tasks wnli --seeds 0 1 --paths lora xs8-swag --max_train 100 --epochs 4 --draws 2 "
    f"--glue_dir GLUE --backbone TINY {KEPT}",
    "train.py": "--task acceptability --backbone TINY --max_train 64 --max_length 32 --epochs 1 "
    "--draws 2 --output_dir OUT",
}


FOUND = {  # what a script leaves in OUT: none of it is there before
    "benchmark.py": "benchmark.json",
    "compare.py": "page.md",
    "low_bit_products.py": "page.md",
    "gate_noise.py": "page.md",
    "mrpc_as_pairs.py": "dev.csv",
    "reading.py": "*.png",
}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """What several scripts are given: a backbone, a folder for runs, a finished run, the table of it and of another."""
    folder = tmp_path_factory.mktemp("things")
    backbone, runs = save_tiny_backbone(folder / "tiny", letters=True), folder / "finished"
    configs = [tiny_config(backbone, prior=prior, output_dir=str(runs)) for prior in ("nested", "bops")]
    cells = [Cell({"task": c.task, "prior": c.prior, "seed": str(c.seed)}, c) for c in configs]
    for cell in cells:
        train_run(cell.config)
    write_results(cells, runs)
    return {"TINY": backbone, "RUNS": folder / "runs", "RUN": configs[1].folder, "RESULTS": runs / "results.parquet"}


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
        "language_models.py",
        "onnx_times.py",
    }
    assert {path.name for path in (ROOT / "experiments").glob("*.py")} == set(SCRIPTS) | with_their_own_tests


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_runs_and_leaves_results(script, things, tmp_path, request, monkeypatch):
    said = SCRIPTS[script]
    given = {"OUT": tmp_path / "out", **things}
    if "GLUE" in said:
        given["GLUE"] = request.getfixturevalue("glue_dir")
    for name, path in given.items():
        said = re.sub(rf"\b{name}\b", str(path), said)
    _here(script, said.split(), monkeypatch)
    found = FOUND.get(script, "report.md" if KEPT in SCRIPTS[script] else "summary.json")
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
