"""Signals, locks, full disks, lost folders and lost pages: what is kept, what is said, and how the process ends."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from forked import started
from safetensors.torch import load_file
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import run as run_module
from pyro_blora import signals
from pyro_blora.__main__ import main
from pyro_blora.checkpoint import read_tensors
from pyro_blora.files import NotWritten, new_folder, require_whole, writing
from pyro_blora.progress import phase
from pyro_blora.report import RunFiles
from pyro_blora.run import each_restart, train_run
from pyro_blora.signals import Interrupted, deferred, heeded
from pyro_blora.tasks import get_task
from pyro_blora.training import fit
from pyro_blora.training.loop import _Loop

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory):
    """The folder of a run that nothing has disturbed."""
    return train_run(tiny_config(backbone, output_dir=str(tmp_path_factory.mktemp("whole"))))


def partial_of(config) -> Path:
    return Path(config.output_dir) / f".{config.folder_name}.partial"


def line_of(config) -> list[str]:
    names = ("task", "backbone", "max_train", "epochs", "batch_size", "rank", "draws", "logging_steps",
             "checkpoint_steps", "max_length", "output_dir")  # fmt: skip
    return ["train", *(word for name in names for word in (f"--{name}", str(getattr(config, name))))]


def at_step(monkeypatch, wanted, act):
    """Call `act` within optimizer step `wanted` (from 1)."""
    step_of = _Loop._optimizer_step

    def step(self, number, *arguments):
        step_of(self, number, *arguments)
        if number + 1 == wanted:
            act()

    monkeypatch.setattr(_Loop, "_optimizer_step", step)


def load_checkpoint_step(path: Path) -> int:
    return int(read_tensors(path)[1]["step"])


def same_training(one: Path, two: Path) -> None:
    states = [load_file(folder / "checkpoints" / "state.safetensors") for folder in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
    logs = [[json.loads(line) | {"seconds": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (one, two)]  # fmt: skip
    assert logs[0] == logs[1]


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=["term", "int", "hup"]
)
def test_a_signal_ends_a_training_with_a_checkpoint_of_its_step(
    backbone, finished, tmp_path, capsys, signum, code, monkeypatch
):
    config = tiny_config(backbone, output_dir=str(tmp_path), checkpoint_steps=100)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(signum))
        assert main(line_of(config)) == code
    said = capsys.readouterr().err.splitlines()[-1]
    state = partial_of(config) / "checkpoints" / "state.safetensors"
    assert said == f"pyro-blora: interrupted; step 5 of 8 is saved in {state}, from where the same command goes on"
    assert load_checkpoint_step(state) == 5
    if signum == signal.SIGTERM:
        assert main(line_of(config)) == 0
        same_training(finished, tmp_path / config.folder_name)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handlers are given back


def test_without_a_checkpoint_none_is_promised(backbone, tmp_path, monkeypatch):
    config = tiny_config(backbone, output_dir=str(tmp_path))
    monkeypatch.setattr(_Loop, "_calibrate", lambda self: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="no checkpoint yet: the same command starts the run again") as found:
        train_run(config)
    assert found.value.exit_code == 143


def test_an_interruption_of_the_evaluation_names_the_last_checkpoint(backbone, tmp_path, monkeypatch):
    config = tiny_config(backbone, output_dir=str(tmp_path))
    monkeypatch.setattr(run_module, "evaluate", lambda parts: signal.raise_signal(signal.SIGHUP))
    with pytest.raises(Interrupted, match=r"step 8 of 8 is saved in .*state\.safetensors"):
        train_run(config)


def test_a_second_signal_stops_at_once_and_one_that_comes_with_the_first_does_not(tmp_path):
    def work():
        with deferred():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            print("still here", flush=True)
            time.sleep(1.2)
            signal.raise_signal(signal.SIGINT)
            print("never", flush=True)

    process = started(work, tmp_path / "printed.txt")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    said = [line for line in (tmp_path / "printed.txt").read_text("utf-8").splitlines() if line]
    assert said == ["still here", "pyro-blora: stopped at once, by a second signal"]


def test_signals_that_are_ignored_or_heeded_by_others_stay():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with heeded():
            signal.raise_signal(signal.SIGHUP), signal.raise_signal(signal.SIGTERM)
            assert signals.asked() is None and signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before), signal.signal(signal.SIGTERM, mine)


def test_a_signal_that_nothing_acted_on_ends_the_work_after_the_loop():
    with pytest.raises(Interrupted), deferred():
        signal.raise_signal(signal.SIGTERM)
    assert signals.asked() is None


def test_checkpoints_are_written_by_time(backbone, tmp_path, monkeypatch):
    config = tiny_config(backbone, checkpoint_steps=100, checkpoint_minutes=1e-9)
    at_step(monkeypatch, 3, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError):
        fit(config, folder=tmp_path, quiet=True)
    assert (tmp_path / "checkpoints" / "state.safetensors").exists()
    monkeypatch.undo()
    assert fit(config, folder=tmp_path, quiet=True).metrics[-1]["step"] == 8


def test_what_a_kill_of_the_rehearsed_export_leaves_is_no_obstacle(backbone, tmp_path):
    left = tmp_path / "run" / ".exportable"
    left.mkdir(parents=True)
    (left / "README.md").write_text("half")
    fit(tiny_config(backbone), folder=tmp_path / "run", quiet=True, until=1)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl", "checkpoints"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_in_a_finalizer_where_errors_are_lost_ends_the_work_all_the_same():
    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    came = []
    with pytest.raises(Interrupted) as interruption, heeded(), phase("working", total=2) as progress:
        Dropped()
        came.append("on")
        progress.advance()
        came.append("too far")
    assert came == ["on"] and interruption.value.exit_code == 143


# --- one process a run ------------------------------------------------------------------------------------------------

HOLDS = """
import sys
from pathlib import Path
from pyro_blora.run_lock import alone, claimed
folder = Path(sys.argv[1])
with alone(folder), claimed(folder.with_name(f".{folder.name}.partial"), folder):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_is_trained_by_one_process_whose_host_number_and_time_are_told(backbone, finished, tmp_path):
    """Also where somebody deletes the lock file that it holds."""
    config = tiny_config(backbone, output_dir=str(tmp_path / "runs"))
    folder = tmp_path / "runs" / config.folder_name
    lock = folder.with_name(f".{folder.name}.lock")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        owner = rf"process {other.pid} on {os.uname().nodename} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        for _ in range(2):  # being refused does not take its name away
            with pytest.raises(ValueError, match=rf"is being trained by another process \({owner}\): wait for it"):
                train_run(config)
        lock.unlink()
        with pytest.raises(ValueError, match="is being trained by another process: wait for it"):
            train_run(config)
        other.stdin.close()
        assert other.wait() == 0
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []
    same_training(train_run(config), finished)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]


HOLDS_OUTPUT = """
import sys
from pathlib import Path
from pyro_blora.run_lock import alone
with alone(Path(sys.argv[1]), what="written", remedy=""):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("command", ["export", "predict"])
def test_an_output_is_written_by_one_process(finished, tmp_path, capsys, command):
    """The other one is refused, and what the first has begun stays as it is."""
    rows = tmp_path / "rows.csv"
    rows.write_text("sentence\nThe soldier painted the bike.\n", encoding="utf-8")
    out = tmp_path / ("out.csv" if command == "predict" else "out")
    begun = tmp_path / (".out.csv.partial" if command == "predict" else "out.partial/begun")
    begun.parent.mkdir(exist_ok=True)
    given = [str(finished), *([str(rows), "--out"] if command == "predict" else ["--to"]), str(out)]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_OUTPUT, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        begun.write_text("half")
        assert main([command, *given]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{out} is being written by another process (process {other.pid} on " in error
        assert "wait for it, or give another " in error and begun.read_text() == "half" and not out.exists()
        other.stdin.close()
        assert other.wait() == 0
    assert main([command, *given]) == 0
    assert out.exists() and not begun.exists() and not (tmp_path / f".{out.name}.lock").exists()


def test_an_output_that_appears_while_its_lock_is_waited_for_stays(tmp_path, monkeypatch):
    def alone(folder, **_):
        folder.mkdir()
        return contextlib.nullcontext()

    monkeypatch.setattr("pyro_blora.files.alone", alone)
    with (
        pytest.raises(FileExistsError, match="an adapter is never overwritten"),
        new_folder(tmp_path / "out", "an adapter"),
    ):
        pass
    assert (tmp_path / "out").is_dir()


# --- disks and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "names"),
    [(500, ".exportable"), (20_000, "state.safetensors"), (40_000, "posterior.nc"), (300_000, "report.html")],
)
def test_a_full_disk_is_one_sentence_with_the_path_and_the_same_command_goes_on(
    backbone, finished, tmp_path, capsys, drawn_here, limit, names
):
    """The system's own refusal, EFBIG, at several sizes."""
    config = tiny_config(backbone, output_dir=str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = main(line_of(config))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and said.startswith("pyro-blora: error: ") and "File too large" in said
    assert names in said and str(tmp_path) in said
    assert not list(tmp_path.rglob("*.partial/**/.*.partial"))
    if limit > 1000:
        assert main(line_of(config)) == 0
        same_training(tmp_path / config.folder_name, finished)
        assert (tmp_path / config.folder_name / "report.html").exists()


@pytest.mark.parametrize("step", [2, 8])
def test_a_run_whose_folder_is_removed_ends_with_an_error(backbone, tmp_path, monkeypatch, capsys, step):
    config = tiny_config(backbone, output_dir=str(tmp_path), logging_steps=100)
    at_step(monkeypatch, step, lambda: shutil.rmtree(partial_of(config)))
    assert main(line_of(config)) == 2
    assert "was removed or replaced while it was in use" in capsys.readouterr().err
    assert not (tmp_path / config.folder_name).exists()


def test_a_log_that_lacks_lines_is_refused(backbone, tmp_path):
    config = tiny_config(backbone)
    fit(config, folder=tmp_path, quiet=True, until=6)
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[2:]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 4 lines up to step 6, at the checkpoint.* it had 6"):
        fit(config, folder=tmp_path, quiet=True)


# --- finished folders -------------------------------------------------------------------------------------------------


def test_a_page_that_is_missing_is_written_by_the_same_command(backbone, finished, tmp_path, capsys, drawn_here):
    config = tiny_config(backbone, output_dir=str(tmp_path))
    folder = tmp_path / config.folder_name
    shutil.copytree(finished, folder)
    (folder / "report.html").unlink()
    assert main(line_of(config)) == 0 and (folder / "report.html").stat().st_size > 0
    assert main(line_of(config)) == 2 and "is a finished run already" in capsys.readouterr().err


def test_a_place_that_is_read_only_is_not_called_full(tmp_path):
    said = r"\(Read-only file system\): choose a place that can be written"
    with pytest.raises(NotWritten, match=said), writing(tmp_path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_restart_of_other_rows_is_not_taken_up(backbone, tmp_path):
    """A run of two fits was cut off after the first one; then its data changed."""
    data = tmp_path / "data.csv"
    rows = get_task("acceptability").load(n_train=60)["train"]
    pd.DataFrame({"text": rows["sentence"], "label": rows["label"]}).to_csv(data, index=False)
    settings = {"data": str(data), "text": "text", "label": "label"}
    config = tiny_config(
        backbone, task="files", task_settings=settings, max_train=None, restarts=2, output_dir=str(tmp_path / "runs")
    )
    (other,) = each_restart(config)
    restarts = config.folder.with_name(f".{config.folder.name}.partial") / "restarts"
    restarts.mkdir(parents=True)
    train_run(other, quiet=True).rename(restarts / f"seed-{other.seed}")
    pd.DataFrame({"text": rows["sentence"], "label": rows["label"][::-1]}).to_csv(data, index=False)
    with pytest.raises(ValueError, match="as it was before it changed"):
        train_run(config, quiet=True)


def test_a_page_is_replaced_in_one_rename(finished, tmp_path, monkeypatch):
    from pyro_blora.report import page

    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = page.write_report(folder).read_bytes()
    monkeypatch.setattr(page, "_run_page", lambda *_: "a page" * 10_000)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(NotWritten, match=r"report\.html could not be written \(File too large\): make room"):
            page.write_report(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (folder / "report.html").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished.iterdir()}


def test_the_hashes_of_a_finished_run_are_those_of_its_files(finished):
    require_whole(finished)
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=finished, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    listed = {line.split("  ")[1] for line in (finished / "SHA256SUMS").read_text().splitlines()}
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert names - listed == {"SHA256SUMS", "report.html"} and listed < names
    assert "checkpoints/state.safetensors" in listed and "checkpoints/state.previous.safetensors" not in names


@pytest.mark.parametrize(
    ("name", "edit"),
    [("summary.json", lambda text: text.replace('"nll": 0', '"nll": 1', 1)), ("summary.json", None)],
    ids=["edited", "missing"],
)
def test_a_damaged_summary_is_refused_by_show_and_report(finished, tmp_path, capsys, name, edit):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / name).read_text()
    if edit:
        assert edit(text) != text
        (folder / name).write_text(edit(text))
    else:
        (folder / name).unlink()
    assert main(["show", str(folder)]) == 2
    assert f"{name} is {'not what the run wrote' if edit else 'missing'}" in capsys.readouterr().err
    assert main(["report", str(folder)]) == 2


@pytest.mark.parametrize(
    ("name", "part"),
    [("metrics.jsonl", "log"), ("predictions.parquet", "predictions"), ("posterior.nc", "posterior"),
     ("config.json", "config")],
)  # fmt: skip
def test_a_changed_file_has_its_sentence(finished, tmp_path, name, part):
    """For the section of the report that reads it."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    getattr(RunFiles(folder), part)
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    changed = [("0" * 64 + line[64:]) if line.endswith(f"  {name}") else line for line in sums]
    (folder / "SHA256SUMS").write_text("\n".join(changed))
    with pytest.raises(ValueError, match=f"{name} is not what the run wrote"):
        getattr(RunFiles(folder), part)
