"""What a training says in a log and on a terminal, what can be done next, and how it ends when it is asked to."""

import contextlib
import dataclasses
import functools
import io
import os
import re
import shlex
import subprocess
import sys

import pytest
from terminal import on_terminal, screen
from tiny import save_tiny_backbone, tiny_config

from pyro_blora.__main__ import main
from pyro_blora.config.command_line import command_line

COMMAND = [sys.executable, "-m", "pyro_blora"]
PHASES = (
    "importing PyTorch, Pyro and transformers", "reading the data of task acceptability", "loading backbone",
    "tokenizing 64 rows of train", "tokenizing 120 rows of eval", "checking that it can be exported",
    "calibrating ranges", "training", "fitting ranges", "initializing gates", "predicting eval", "predicting train",
    "counting clipped values", "saving the posterior", "exporting the adapter", "scoring", "drawing the report",
)  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


def line_of(config):
    """The words that train it."""
    return shlex.split(command_line(config))[1:]


def run(*words, **environment):
    return subprocess.run(
        [*COMMAND, *words], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def logged(backbone, tmp_path_factory, drawn):
    """(configuration, what its training has put out, what it has told), neither to a terminal."""
    config = tiny_config(backbone, output_dir=str(tmp_path_factory.mktemp("runs")))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(line_of(config)) == 0
    return config, out.getvalue(), err.getvalue()


def test_a_log_names_every_phase_in_lines(logged):
    config, out, err = logged
    assert not {"\r", "\x1b"} & set(out + err)
    lines = [re.fullmatch(r"\d\d:\d\d:\d\d (.*)", line) for line in err.splitlines()]
    assert all(lines), err
    named = [line[1] for line in lines]
    places = [next(i for i, line in enumerate(named) if line.startswith(phase)) for phase in PHASES]
    assert places == sorted(places)
    last = [line for line in named if line.startswith("training: 8/8 steps")]
    assert all("loss " in line and "BOPs " in line for line in last)
    assert out.splitlines()[-1] == str(config.folder)


def test_what_a_run_says_can_be_done_next_can_be_done(logged, capsys, tmp_path, monkeypatch):
    config, out, _ = logged
    steps = dict(re.findall(r"^  (\w[\w ]+?)  +(.+)$", out, re.MULTILINE))
    assert len(steps) == 7
    assert os.path.isfile(steps.pop("open its page in a browser"))
    assert os.path.isfile(steps.pop("use the exported adapter").removeprefix("the code in "))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.csv").write_text("sentence\nThe soldier lost these cameras.\n", encoding="utf-8")
    predict = shlex.split(steps.pop("predict new texts").replace(" FILE ", " new.csv "))
    assert main(predict[1:]) == 0 and len((tmp_path / "answers.csv").read_text("utf-8").splitlines()) == 2
    exec(steps.pop("go on in Python"), found := {})
    assert found["program"].net.layout.rank == config.rank
    again = dataclasses.replace(config, seed=config.seed + 1)
    assert steps.pop("repeat it from another seed") == command_line(again)
    for line in steps.values():
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err


def test_ctrl_c_ends_a_training_with_code_130_and_the_same_command_goes_on(backbone, tmp_path):
    config = tiny_config(backbone, output_dir=str(tmp_path), epochs=200, max_train=480)  # longer than anybody waits
    training = functools.partial(main, line_of(config))
    code, written = on_terminal(training, columns=1000, press=("training", "\x03"))
    said = screen(written)
    assert code == 130 and "once more to end at once" in written
    step = re.match(r"pyro-blora: interrupted; step (\d+) of 6000 is saved in \S+/state.safetensors, from where the "
                    r"same command goes on$", said[-1])  # fmt: skip
    assert step, said
    code, written = on_terminal(training, columns=1000, press=(" steps in", "\x03"))
    assert code == 130
    assert int(re.search(r"(\d+)/6,000 steps in", written)[1]) >= int(step[1])


def test_ctrl_c_before_anything_was_read_says_so(backbone, tmp_path):
    line = [*COMMAND, *line_of(tiny_config(backbone, output_dir=str(tmp_path / "runs")))]
    code, written = on_terminal(line, press=("importing", "\x03"))
    assert code == 130 and not (tmp_path / "runs").exists()
    assert screen(written)[-1] == "pyro-blora: interrupted; nothing had begun: the same command starts the run"


def test_quiet_prints_the_folder_and_nothing_else(logged, backbone, tmp_path, capsys):
    config, *_ = logged
    other = dataclasses.replace(config, output_dir=str(tmp_path))
    for line, path in [
        ([*line_of(other), "--quiet"], other.folder),
        ([*line_of(config), "--quiet", "--if_finished", "show"], config.folder),
        (["report", str(config.folder), "--quiet"], config.folder / "report.html"),
    ]:
        assert main(line) == 0
        assert capsys.readouterr() == (f"{path}\n", "")


def test_of_several_processes_one_says_what_is_wrong(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "pyro_blora"]
    done = subprocess.run([*launcher, "train", "--rank", "0"], capture_output=True, text=True, timeout=300)
    assert done.stderr.count("pyro-blora: error: rank must be from 1 to 65,536") == 1


def test_a_process_that_fails_alone_says_so():
    done = run("train", "--rank", "0", RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2 and done.stderr.startswith("pyro-blora: error: rank must be") and done.stdout == ""


def test_what_is_not_installed_is_a_sentence_that_names_the_doctor():
    code = (
        "import sys; sys.modules['accelerate'] = None; from pyro_blora.__main__ import main; sys.exit(main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("pyro-blora: error: ") and "pyro-blora doctor" in done.stderr
