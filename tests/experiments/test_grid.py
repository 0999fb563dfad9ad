"""Grids: what a file means, what is wrong with it and where, and that no finished run is lost or repeated."""

import functools
import json
import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from forked import ended, started
from tiny import save_tiny_backbone, tiny_config, tiny_grid

from experiments.grid import main
from experiments.studies import launchers, one_run
from experiments.studies.grid_file import read_grid
from experiments.studies.launchers import in_queue
from experiments.studies.one_run import Job, train_or_make_room
from pyro_blora.checkpoint import read_tensors
from pyro_blora.run import train_run

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYRO_BLORA_COMPILE": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


def written(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def environment(monkeypatch):
    """Of the runs that a grid of this process starts."""
    for name in ("PYRO_BLORA_COMPILE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])


# --- the file ---------------------------------------------------------------------------------------------------------

GOOD = """
base:
  max_train: 2000
axes:
  task: [sst2, mrpc]
  prior:
    - nested
    - {prior: budget, prior.bops: 0.2}
    - {prior: bops, prior.g: depth, label: flat ranks}
  seed: [0, 1]
"""


def test_a_file_is_every_combination_of_its_axes(tmp_path):
    cells = read_grid(written(tmp_path, GOOD), glue_dir=str(tmp_path))
    assert len(cells) == 12 and len({cell.folder for cell in cells}) == 12
    assert [cell.labels for cell in cells[:2]] == [
        {"task": "sst2", "prior": "nested", "seed": "0"},
        {"task": "sst2", "prior": "nested", "seed": "1"},
    ]
    last = cells[-1]
    assert last.labels == {"task": "mrpc", "prior": "flat ranks", "seed": "1"}
    assert (last.config.prior, last.config.prior_settings) == ("bops", {"g": "depth"})
    assert cells[2].config.prior_settings == {"bops": 0.2}
    assert {(c.config.max_train, c.config.glue_dir, c.config.output_dir) for c in cells} == {
        (2000, str(tmp_path), "runs/study")
    }
    assert read_grid(written(tmp_path, GOOD), "elsewhere")[0].config.output_dir == "elsewhere"


def test_a_flag_of_a_task_is_one_of_a_grid(tmp_path):
    data = tmp_path / "reviews.csv"
    data.write_text("".join(["review,title,label\n", *(f"film {n},{n} films,{n % 2}\n" for n in range(40))]))
    text = f"base:\n  data: {data}\n  max_train: 16\naxes:\n  text: [review, title]\n"
    cells = read_grid(written(tmp_path, text))
    assert {(cell.config.task, cell.config.task_settings["data"]) for cell in cells} == {("files", str(data))}
    assert [cell.config.task_settings["text"] for cell in cells] == ["review", "title"]


def test_a_preset_is_under_everything_that_the_file_says(tmp_path):
    text = """
base:
  epochs: 1
axes:
  method: [lora, {method: bayesian_lora, prior: nested, label: ours}, full]
  task: [{preset: sst2}, {preset: cola, lr: 0.5}]
"""
    cells = {tuple(c.labels.values()): c.config for c in read_grid(written(tmp_path, text), glue_dir=str(tmp_path))}
    sst2, own, full = cells["lora", "sst2"], cells["ours", "cola"], cells["full", "sst2"]
    assert (sst2.task, sst2.backbone, sst2.epochs, sst2.lr) == ("sst2", "microsoft/deberta-v3-base", 1, 8e-4)
    assert (sst2.prior, sst2.prior_settings) == ("fixed", {"bits": 32})  # the preset's prior gave way
    assert (own.task, own.prior, own.lr) == ("cola", "nested", 0.5)
    assert (full.lr, cells["full", "cola"].lr) == (5e-5, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes:\n  method: [lora]\n  prior: [fixed, nested]\n", r"line 3 \(nested\).*contradicts --method lora"),
        ("base:\n  method: lora\naxes:\n  prior: [bops]\n", "line 4 .bops.: --prior bops contradicts --method lora"),
        ("axes:\n  method: [lora, loar]\n", r"line 2 \(loar\): unknown method 'loar': did you mean 'lora'"),
        ("axes:\n  task: [sst2, {preset: sst3}]\n", r"line 2 \(sst3\): unknown preset 'sst3': did you mean 'sst2'"),
        ("base:\n  preset: sst3\naxes:\n  seed: [0]\n", "base: unknown preset 'sst3'"),
        ("axes:\n  method:\n    - lora\n    - {method: adalora, rank: 8, guide.target_rank: 8}\n",
         r"line 4 \(adalora\): guide 'allocated': target_rank must be from 1 to 7"),
    ],
)  # fmt: skip
def test_methods_and_presets_that_cannot_work_are_refused_with_their_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_grid(written(tmp_path, text), glue_dir=str(tmp_path))


def test_the_files_that_come_along_are_right():
    files = sorted((ROOT / "experiments" / "grids").glob("*.yaml"))
    assert files
    for file in files:
        assert read_grid(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nested\n", "nestd\n", r"line 7 \(nestd\): unknown prior 'nestd': did you mean 'nested'"),
        ("[0, 1]", "[0, -1]", r"line 10 \(-1\): seed must be between 0 and 4294967295, got -1"),
        ("  seed:", "  sed:", "line 10: unknown flag 'sed': did you mean 'seed'"),
        ("max_train: 2000", "max_train: many", "base: max_train must be a whole number or none, got 'many'"),
        ("max_train: 2000", "max_trian: 2000", "line 3: unknown flag 'max_trian': did you mean 'max_train'"),
        (
            "prior.bops: 0.2",
            "prior.bps: 0.2",
            r"line 8 \(budget\): prior 'budget': unknown setting 'bps': did you mean 'bops'",
        ),
        ("axes:", "axis:", "line 4: unknown key 'axis': did you mean 'axes'"),
        ("[0, 1]", "[0, 0]", "line 10: axis 'seed' has two entries '0': give one a `label:`"),
        ("[0, 1]", "0", "line 10: axis 'seed' must be a list"),
        ("[0, 1]", "[]", "line 10: axis 'seed' must be a list"),
        ("[0, 1]", "[0, {lr: 0.1}]", "line 10: an entry of axis 'seed' that does not set 'seed' needs a `label:`"),
        ("[0, 1]", "[0, {label: x, task: cola}]", "line 10: 'task' is set by the axes 'task' and 'seed'"),
        ("[0, 1]", "[0, {seed: 1, seed: 2}]", "line 10: 'seed' is given twice"),
        ("[0, 1]", "[0, {label: same, seed: 0}]", "are the same run: drop one of them"),
        ("[0, 1]", "[0, {label: x, prior.rate: -1}]", "rate must be a finite number >= 0"),
        ("- nested", "- {prior: fixed, prior.bits: 5}", r"line 7 \(fixed\): prior 'fixed': bits must be one of"),
        ("max_train: 2000", "glue_dir: nowhere", "glue_dir nowhere is no folder"),
        ("max_train: 2000", "max_train: 4", "4 training examples do not fill one step of 16"),
        ("  seed:", "  score:", "line 10: axis 'score' would hide that column"),
        ("[0, 1]", "[0, !foo 1]", "could not determine a constructor"),
        ("  task: [sst2, mrpc]\n", "  task: [sst2, mrpc\n", "is not YAML"),
        ("label: flat ranks", "label: nested", "line 9: axis 'prior' has two entries 'nested'"),
    ],
)
def test_a_mistake_is_refused_with_its_line(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(ValueError, match=message):
        read_grid(written(tmp_path, GOOD.replace(old, new)), taken=("score",))


def test_settings_of_a_replaced_prior_go_and_numbers_are_numbers(tmp_path):
    text = "base: {prior: budget, prior.bops: 0.2}\naxes:\n  prior: [budget, nested, {prior: bops, prior.rate: 1e-3}]\n"
    cells = read_grid(written(tmp_path, text))
    assert [cell.config.prior_settings for cell in cells] == [{"bops": 0.2}, {}, {"rate": 1e-3}]


def test_settings_of_a_part_stay_in_whatever_order_the_axes_are(tmp_path):
    """A label that says a setting is of a run that has it."""
    axes = ("  prior.rate: [1.5, 3]\n", "  prior: [nested, bops]\n")
    for order in (axes, axes[::-1]):
        cells = read_grid(written(tmp_path, "axes:\n" + "".join(order)), "runs")
        assert len(cells) == 4
        assert all(cell.config.prior_settings == {"rate": float(cell.labels["prior.rate"])} for cell in cells)
    loose = "base:\n  prior.rate: 3\naxes:\n  prior: [nested, bops]\n"
    with pytest.raises(
        ValueError, match=r"base sets 'prior.rate' and an axis chooses the prior: name its prior in base"
    ):
        read_grid(written(tmp_path, loose), "runs")


@pytest.mark.parametrize("text", ["", "[]", "base: {seed: 1}\n", "axes: [1]\n", "axes: {}\nbase: 3\n"])
def test_a_file_of_another_shape_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"grid .*study\.yaml"):
        read_grid(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_grid(tmp_path / "none.yaml")


def test_a_wrong_file_ends_the_command_before_anything_is_written(tmp_path, refusal):
    file = written(tmp_path, GOOD.replace("nested\n", "nestd\n"))
    assert "did you mean 'nested'" in refusal(main, file, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--job", "partition"], "--job takes NAME=VALUE, got 'partition'"),
        (["--job", "colour=blue"], "--cluster local does not take these parameters"),
        (["--job", "a=["], "--job a is not YAML: "),
        (["--at_a_time", "-1"], "--at_a_time must be at least 1, got -1"),
    ],
)
def test_wrong_words_are_refused(tmp_path, backbone, refusal, words, message):
    file = tiny_grid(tmp_path / "grid.yaml", backbone)
    assert message in refusal(main, file, "--output_dir", tmp_path / "out", "--cluster", "local", *words)
    assert not (tmp_path / "out").exists()


def test_words_for_jobs_need_a_cluster(tmp_path, backbone, refusal):
    file = tiny_grid(tmp_path / "grid.yaml", backbone)
    assert "add --cluster slurm" in refusal(main, file, "--job", "timeout_min=3")


def test_slurm_is_refused_where_there_is_none(tmp_path, backbone, refusal, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tiny_grid(tmp_path / "grid.yaml", backbone)
    said = refusal(main, file, "--output_dir", tmp_path / "out", "--cluster", "slurm")
    assert "--cluster slurm does not work here" in said
    assert not (tmp_path / "out").exists()


def test_a_job_is_in_the_queue_while_slurm_names_it(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"  # answers as Slurm's does: a line while the job is there, an error after it
    squeue.write_text(
        '#!/bin/sh\n[ "$3" = 17 ] && echo "17 gpu RUNNING" && exit 0\necho "Invalid job id" >&2; exit 1\n'
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert in_queue("17") and not in_queue("18")


# --- running ----------------------------------------------------------------------------------------------------------


def test_a_failing_run_costs_its_own_cell_only(tmp_path, backbone, environment, capsys):
    where = ["--cluster", "local", "--job", "timeout_min=20"]
    file = tiny_grid(tmp_path / "grid.yaml", backbone, "  lr: [0.001, 1.0e+30]\n")
    out = tmp_path / "out"
    train_run(read_grid(file, str(out))[0].config)  # a job takes ten seconds to import its libraries
    assert main([str(file), "--output_dir", str(out), "--at_a_time", "2", *where]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 runs are finished" in said and "failed: lr=1e+30" in said and "diverged" in said
    table = pd.read_parquet(out / "results.parquet")
    assert len(table) == 1 and table.lr.tolist() == ["0.001"] and Path(table.folder[0]).is_dir()
    assert json.loads((out / "cells.json").read_text("utf-8")) == [{"lr": "0.001"}, {"lr": "1e+30"}]
    assert pd.read_csv(out / "results.csv").score[0] == pytest.approx(table.score[0])
    assert table.bops_adapted.between(0, 1).all() and table.metric[0] == "accuracy"


class Forked:
    """A run in a copy of this process instead of a new one, which would import its libraries for five seconds."""

    def __init__(self, config, log):
        run = functools.partial(one_run.train, str(config), str(log), os.getpid())
        self.process, self.code = started(run, Path(log).with_suffix(".printed")), None

    def ended(self):
        self.code = ended(self.process) if self.code is None else self.code
        return self.code is not None


def test_a_killed_grid_goes_on_and_repeats_nothing(tmp_path, backbone, environment, capsys, monkeypatch):
    monkeypatch.setattr(launchers.Processes, "start", lambda self, *arguments: Forked(*arguments))
    file, out = tiny_grid(tmp_path / "grid.yaml", backbone, "  seed: [0, 1]\n"), tmp_path / "out"

    def summaries():
        return sorted(out.glob("[!.]*/summary.json"))  # of runs that have their name

    process = started(lambda: main([str(file), "--output_dir", str(out)]), tmp_path / "printed.txt")
    deadline = time.monotonic() + 300
    while not (summaries() and list(out.glob(".*.partial"))):  # one run is finished, the next one has begun
        assert ended(process) is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    time.sleep(1.0)
    logs = [out / "logs" / f"{path.parent.name}.txt" for path in summaries()]  # of a run that is not started again
    kept = {path: path.stat().st_mtime_ns for path in [*summaries(), *logs]}
    lines = {path: path.read_text("utf-8") for path in out.glob(".*.partial/metrics.jsonl")}
    time.sleep(1.5)  # no orphan goes on
    assert lines == {path: path.read_text("utf-8") for path in out.glob(".*.partial/metrics.jsonl")}
    assert main([str(file), "--output_dir", str(out)]) == 0
    assert "2 of 2 runs are finished" in capsys.readouterr().out and len(kept) == 2
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    table = pd.read_parquet(out / "results.parquet")
    assert table.seed.tolist() == ["0", "1"]
    for folder, nll in zip(table.folder, table.nll, strict=True):
        assert json.loads((Path(folder) / "summary.json").read_text("utf-8"))["nll"] == nll


def test_an_interrupted_grid_lets_its_runs_write_a_checkpoint(tmp_path, backbone, environment):
    out, printed = tmp_path / "out", tmp_path / "printed.txt"
    file = tiny_grid(tmp_path / "grid.yaml", backbone, "  seed: [0]\n  epochs: [500]\n")
    file.write_text(file.read_text().replace("checkpoint_steps: 3", "checkpoint_steps: 100000"))
    process = started(lambda: main([str(file), "--output_dir", str(out)]), printed)
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in out.glob(".*.partial/metrics.jsonl")):
        assert ended(process) is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 143
    assert "interrupted: the same command goes on from here" in printed.read_text("utf-8")
    (state,) = out.glob(".*.partial/checkpoints/state.safetensors")
    step = int(read_tensors(state)[1]["step"])
    assert len((state.parents[1] / "metrics.jsonl").read_text().splitlines()) == step
    (log,) = (out / "logs").glob("*.txt")
    assert f"interrupted; step {step} of 2000 is saved in {state}" in log.read_text()


def test_a_job_that_is_to_make_room_writes_a_checkpoint_first(tmp_path, backbone, monkeypatch):
    from pyro_blora.training.loop import _Loop

    answered, config = [], tiny_config(backbone, output_dir=str(tmp_path), checkpoint_steps=100)
    folder = tmp_path / f".{config.folder_name}.partial"
    step_of = _Loop._optimizer_step

    def step(self, number, *arguments):
        step_of(self, number, *arguments)
        if number == 4:
            signal.raise_signal(signal.SIGUSR2)

    monkeypatch.setattr(_Loop, "_optimizer_step", step)
    before = signal.signal(signal.SIGUSR2, lambda *_: answered.append(list(folder.glob("checkpoints/state.*"))))
    try:
        train_or_make_room(config)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert answered == [[folder / "checkpoints" / "state.safetensors"]]
    again = Job().checkpoint("a", "b")
    assert isinstance(again.function, Job) and again.args == ("a", "b")


def test_pages_that_are_missing_are_written_by_the_next_command(tmp_path, backbone, capsys):
    file, out = tiny_grid(tmp_path / "grid.yaml", backbone), tmp_path / "out"
    (cell,) = read_grid(str(file), str(out))
    train_run(cell.config)
    (cell.folder / "report.html").unlink()
    assert main([str(file), "--output_dir", str(out)]) == 0
    assert (cell.folder / "report.html").is_file() and (out / "report.html").is_file()
