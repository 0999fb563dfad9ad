"""Phases of a command: one live line on a terminal, lines in a log, a line each in a notebook, nothing if silenced."""

import gc
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from terminal import on_terminal, screen

from pyro_blora import progress
from pyro_blora.progress import importing, labelled, phase, silenced

WORK = """
import sys, time
from pyro_blora import progress
from pyro_blora.progress import phase

progress._LONG = 0.0
with phase("loading", still=True):
    print("a library's bar", file=sys.stderr)
with phase("training", 4) as shown:
    for step in range(4):
        if step == 1:
            for _ in range(2):
                with phase("initializing gates", 2, unit="batches") as inner:
                    for _ in inner.over(range(2)):
                        time.sleep(0.3)
            print("a library warns", file=sys.stderr)
        time.sleep(0.3)
        shown.advance(note=f"loss {step}")
print("result")
"""


def work(**environment):
    """That script, its output in pipes."""
    return subprocess.run(
        [sys.executable, "-c", WORK], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    found = SimpleNamespace(now=0.0)
    replaced = SimpleNamespace(monotonic=lambda: found.now, strftime=lambda form: "12:34:56")
    monkeypatch.setattr(progress, "time", replaced)
    return found


def lines_of(capsys):
    return [line.removeprefix("12:34:56 ") for line in capsys.readouterr().err.splitlines()]


def test_a_terminal_has_one_line_that_names_the_phase_and_keeps_one_for_each_that_ended():
    code, written = on_terminal([sys.executable, "-c", WORK])
    assert code == 0
    assert [re.sub(r"\d\d:\d\d", "TIME", line) for line in screen(written)] == [
        "loading",
        "a library's bar",
        "initializing gates: 2/2 batches in TIME",
        "initializing gates: 2/2 batches in TIME",
        "a library warns",
        "training: 4/4 steps in TIME: loss 3",
        "result",
    ]
    drawn = [frame for frame in re.split(r"\r|\n", written) if re.search(r"[/\\|-] \x1b\[1m", frame)]
    assert all(("training" in frame) != ("initializing gates" in frame) for frame in drawn)  # one at a time
    assert any("3/4 steps" in frame and "left: loss 2" in frame for frame in drawn)
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")  # the cursor is there again


def test_the_cursor_stays_visible_for_who_is_killed():
    code = 'import os, time\nfrom pyro_blora.progress import phase\nwith phase("x"):\n time.sleep(0.6)\n os._exit(9)'
    ended, written = on_terminal([sys.executable, "-c", code])
    assert ended == 9 and " x " in re.sub(r"\x1b\[\d*m", "", written)
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")


def test_a_narrow_terminal_cuts_the_end_of_the_line():
    _, written = on_terminal([sys.executable, "-c", WORK], columns=30)
    frames = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", frame) for frame in re.split(r"\r|\n", written)]
    assert max(len(frame) for frame in frames if re.match(r"[/\\|-] ", frame)) <= 30


def test_a_log_has_lines_with_the_time_and_nothing_that_moves_a_cursor():
    done = work()
    assert done.returncode == 0 and done.stdout == "result\n"
    assert "\r" not in done.stderr and "\x1b" not in done.stderr
    stamped = re.sub(r"^\d\d:\d\d:\d\d ", "TIME ", done.stderr, flags=re.MULTILINE)
    assert re.sub(r" \d\d:\d\d", " SPENT", stamped).splitlines() == [
        "TIME loading",
        "a library's bar",
        "TIME training: 4 steps",
        "TIME initializing gates: 2 batches",
        "TIME initializing gates: 2/2 batches in SPENT",
        "TIME initializing gates: 2/2 batches in SPENT",  # named once in a phase
        "a library warns",
        "TIME training: 4/4 steps in SPENT: loss 3",
    ]


def test_a_terminal_that_moves_no_cursor_gets_lines():
    _, written = on_terminal([sys.executable, "-c", WORK], environment={"TERM": "dumb"})
    assert "\x1b" not in written and "training: 4/4 steps" in written


def test_other_processes_than_the_main_one_are_silent():
    assert work(RANK="1").stderr == "a library's bar\na library warns\n"
    _, written = on_terminal([sys.executable, "-c", WORK], environment={"RANK": "1"})
    assert screen(written) == ["a library's bar", "a library warns", "result"]


def test_a_log_that_nobody_reads_any_more_does_not_end_the_work(tmp_path):
    code = f"import sys\nsys.stdin.readline()\n{WORK.replace('print(', '0 and print(')}\nopen(sys.argv[1], 'w')"
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "x"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stderr.close()
    child.communicate("go on\n", timeout=120)
    assert (tmp_path / "x").exists()


def test_a_line_of_a_log_follows_a_tenth_of_the_work_and_a_minute(clock, capsys):
    with phase("training", 100) as shown:
        for step in range(1, 101):
            clock.now += 1
            shown.advance(note=f"loss {step}")
    lines = lines_of(capsys)
    assert lines[0] == "training: 100 steps" and len(lines) == 11
    assert lines[1] == "training: 10/100 steps in 00:10, 01:30 left: loss 10"
    assert lines[-1] == "training: 100/100 steps in 01:40: loss 100"
    with phase("training", 10_000, first=5_000) as shown:
        for _ in range(20):
            clock.now += 30
            shown.advance()
    lines = lines_of(capsys)
    assert lines[0] == "training: 10,000 steps, 5,000 done" and len(lines) == 12
    assert lines[1] == "training: 5,002/10,000 steps in 01:00, 1 day, 17:39:00 left"
    with phase("quick", 100) as shown:
        for _ in shown.over(range(100)):
            clock.now += 0.01
    assert lines_of(capsys) == ["quick: 100 steps"]


@pytest.mark.parametrize("collects", [True, False])
def test_imports_go_on_without_garbage_collection_which_is_as_it_was_afterwards(capsys, collects):
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError("it is not installed")
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
    assert "importing PyTorch" in capsys.readouterr().err


def test_phases_of_one_run_among_several_say_of_which(capsys, clock):
    with labelled("fit 1 of 2, seed 1"), phase("training"), labelled(""), phase("fitting ranges"):
        pass
    assert lines_of(capsys) == ["fit 1 of 2, seed 1: training", "fit 1 of 2, seed 1: fitting ranges"]


def test_what_is_silenced_is_not_shown_and_counts_all_the_same(capsys):
    with silenced(), phase("training", 3) as shown:
        assert list(shown.over("abc")) == ["a", "b", "c"] and shown.done == 3
    with silenced(False), phase("loading"):
        pass
    assert "training" not in (said := capsys.readouterr().err) and "loading" in said


def test_an_error_ends_a_phase_with_those_inside_it(capsys):
    def batches():
        with phase("computing the curvature", 2) as shown:
            yield from shown.over(range(2))

    left_open = batches()
    with pytest.raises(ValueError), phase("fitting"):
        next(left_open)
        raise ValueError
    assert progress._State.open == []
    left_open.close()
    assert progress._State.open == [] and progress._State.labels == []


def test_a_notebook_has_a_line_a_phase_with_its_last_state():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(WORK)])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    outputs = notebook.cells[0].outputs
    shown = [re.sub(r"\d\d:\d\d", "TIME", x.data["text/plain"]) for x in outputs if x.output_type == "display_data"]
    assert shown == [
        "loading: TIME",
        "training: 4/4 steps in TIME: loss 3",
        "initializing gates: 2/2 batches in TIME",
        "initializing gates: 2/2 batches in TIME",
    ]
    printed = "".join(x.text for x in outputs if x.output_type == "stream")
    assert sorted(printed.splitlines()) == ["a library warns", "a library's bar", "result"]
