"""experiments/chaos.py in small, and that its comparison finds what it is there to find."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from tiny import save_tiny_backbone, tiny_config

from experiments.kills.contents import contents
from experiments.kills.page import write
from experiments.kills.subjects import SUBJECTS, words
from experiments.kills.trials import is_fine
from pyro_blora.__main__ import _parser
from pyro_blora.config import RunConfig, run_fields, take_settings
from pyro_blora.run import train_run

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "chaos.py"


def test_killed_runs_end_with_the_bits_of_undisturbed_ones(tmp_path):
    words = ["--kills", "1", "--only", "bayesian_lora", "--seed", "3"]
    words += ["--folder", str(tmp_path / "runs"), "--report", str(tmp_path / "chaos.md")]
    # in a process of its own: what it forks must not inherit threads and locks of the tests before it
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = [json.loads(line) for line in (tmp_path / "runs" / "kills-0.jsonl").read_text().splitlines()]
    assert kills and all(kill["resumed"] and kill["equal"] and kill["report"] for kill in kills)
    assert f"{len(kills)} kills: {len(kills)} resumed by the next command" in (tmp_path / "chaos.md").read_text()


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_is_a_configuration(name, tmp_path):
    settings, rest = take_settings(words(name, tmp_path, tmp_path))
    config = RunConfig(**run_fields(_parser().parse_args(rest), settings))
    assert config.max_train // (config.batch_size * config.accumulation) * config.epochs in (6, 12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("backbone"))
    return train_run(tiny_config(backbone, output_dir=str(tmp_path_factory.mktemp("runs"))))


def one_bit(path):
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name] + (tensors[name] == tensors[name].flatten()[0]) * 1e-7
    save_file(tensors, path, metadata={"notes": "{}"})


def one_word(path):
    path.write_text(path.read_text().replace('"nll": 0', '"nll": 1', 1))


def one_answer(path):
    table = pd.read_parquet(path)
    table.loc[3, "decision"] = 1 - table.loc[3, "decision"]
    table.to_parquet(path)


@pytest.mark.parametrize(
    ("name", "edit"),
    [("checkpoints/state.safetensors", one_bit), ("summary.json", one_word), ("metrics.jsonl", one_word),
     ("predictions.parquet", one_answer), ("posterior.nc", Path.unlink)],
)  # fmt: skip
def test_the_comparison_sees_a_difference_and_no_seconds(finished, tmp_path, name, edit):
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    before = contents(copy)
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"seconds": {}}))
    assert contents(copy) == before
    edit(copy / name)
    after = contents(copy)
    different = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert different and all(key.startswith(name) for key in different)


def test_the_page_counts_and_lists_what_went_wrong(tmp_path):
    fine = {"subject": "a", "signal": "KILL", "moment": "training", "lost": 2, "code": -9, "right code": True,
            "seconds to end": 0.1, "resumed": True, "equal": True, "different": [], "report": True, "left over": [],
            "codes": [0], "said": "done"}  # fmt: skip
    bad = fine | {"subject": "b", "signal": "TERM", "equal": False, "report": False, "different": ["summary.json nll"],
                  "code": 143}  # fmt: skip
    crumbs = fine | {"left over": [".a.lock"]}
    write(tmp_path / "page.md", [fine, fine, bad], "python x", "cpu")
    text = (tmp_path / "page.md").read_text()
    counted = "3 kills: 3 resumed by the next command, 2 equal to the bit, 1 reports missing, 0 of runs that were lost."
    assert counted in text
    assert "| a | 2 | 0 | 2 | 0 | 0 | 0 | 2 | 2 | 0 | 0 |" in text and "different: ['summary.json nll']" in text
    write(tmp_path / "page.md", [fine, crumbs], "python x", "cpu")
    assert "left over: ['.a.lock']" in (tmp_path / "page.md").read_text()
    assert is_fine(fine) and not is_fine(bad) and not is_fine(crumbs)
