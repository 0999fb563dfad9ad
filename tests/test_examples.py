"""Every script in experiments/ runs: a script that is not in the table below fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {  # script: the arguments of a short run; OUT: a fresh folder, GLUE: the official release (or a skip)
    "allocation.py": "--glue_dir GLUE --tasks wnli --seeds 0 --budgets W4A4 --cells lora uniform budget --max_train 64 "
    "--epochs 1 --output_dir OUT --keep OUT/cells --report OUT/report.md --figures OUT",
    "dial.py": "--glue_dir GLUE --task wnli --rates 0.1 --learning_rates 0.02 --max_train 64 --epochs 1 "
    "--output_dir OUT --keep OUT/cells --report OUT/report.md --figures OUT",
    "targets.py": "--glue_dir GLUE --tasks wnli --targets 0.1 --max_train 64 --epochs 1 "
    "--output_dir OUT --keep OUT/cells --report OUT/report.md --figures OUT",
    "check_posterior.py": "--rungs a e --simulations 20 --trained_simulations 1 --output_dir OUT "
    "--report OUT/report.md --figures OUT/copied",
    "glue_small.py": "--glue_dir GLUE --tasks wnli --max_train 64 --epochs 1 --draws 2 "
    "--output_dir OUT --table OUT/table.md",
    "train.py": "--task acceptability --backbone demo --max_train 64 --epochs 1 --draws 2 --output_dir OUT",
}


def test_every_script_is_in_the_table():
    assert {path.name for path in (ROOT / "experiments").glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_runs_and_leaves_results(script, tmp_path, request):
    arguments = SCRIPTS[script].replace("OUT", str(tmp_path / "out"))
    if "GLUE" in arguments:
        arguments = arguments.replace("GLUE", str(request.getfixturevalue("glue_dir")))
    done = subprocess.run(
        [sys.executable, f"experiments/{script}", *arguments.split()],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYRO_BLORA_TRACEBACK": "1",
            "HF_HUB_OFFLINE": "1",
            "PYRO_BLORA_COMPILE": "1" if script == "train.py" else "0",  # compiling takes longer than these runs do
        },  # fmt: skip
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert any((tmp_path / "out").rglob("summary.json")), done.stdout + done.stderr
