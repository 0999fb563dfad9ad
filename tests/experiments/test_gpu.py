"""experiments/gpu.py on a CPU: a line runs in a process of its own, a failed one costs a line, time is kept."""

import json
import time
from pathlib import Path

import pytest

from experiments import gpu
from experiments.on_gpu import fast, learns, works
from experiments.on_gpu.session import Check, Session, Worker, run_part


def session(tmp_path, seconds=60.0):
    return Session(tmp_path / "out", time.monotonic() + seconds, True, Path("minilm"), Path("glue"), tmp_path)


def test_one_line_from_the_command_to_its_page(tmp_path):
    code = gpu.main(["--tiny", "--minutes", "4", "--out", str(tmp_path), "--parts", "works", "--only", "plain LoRA"])
    assert code == 0
    content = json.loads((tmp_path / "works.json").read_text())
    (line,) = content["lines"]
    assert "failed" not in line, line
    assert line["steps"] == 4 and line["reload"]["decisions changed"] == 0
    page = (tmp_path / "works.md").read_text()
    assert "## DeBERTaV3-base: plain LoRA" in page and content["machine"]["card"] in page


def test_a_failed_line_and_one_without_time_are_lines_of_the_page(tmp_path):
    def fails(session):
        raise ValueError("as it must")

    def late(session):
        raise AssertionError("there was no time for it")

    pages = []
    checks = [Check("broken", fails), Check("whole", lambda session: {"value": 1})]
    run_part(session(tmp_path), "part", checks, at_once=2, seconds=30, write=pages.append)
    broken, whole = pages[-1]
    assert "ValueError: as it must" in broken["failed"] and whole["value"] == 1
    run_part(session(tmp_path, seconds=1), "part", [Check("late", late)], at_once=1, seconds=30, write=pages.append)
    assert "no time was left" in pages[-1][0]["failed"]


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"not finished in its 0 s"):
        session(tmp_path).child("train", {"config": {}}, seconds=0.1)
    assert time.monotonic() - began < 30


def test_what_the_session_has_no_time_for_is_not_called_too_slow(tmp_path):
    with pytest.raises(RuntimeError, match="no time was left"):
        session(tmp_path, seconds=8.2).child("train", {"config": {}}, seconds=60)


def test_a_worker_that_died_after_its_answer_is_replaced(tmp_path):
    here, worker = session(tmp_path), Worker()
    try:
        worker.ask(here, "_released", {}, seconds=60)
        first = worker.process
        first.kill()
        first.wait()
        worker.ask(here, "_released", {}, seconds=60)
        assert worker.process is not first and worker.process.poll() is None
    finally:
        worker.end()


def test_every_part_has_its_lines(tmp_path):
    for part in (works, fast, learns):
        names = [check.name for check in part.checks(session(tmp_path))]
        assert names and len(names) == len(set(names)), part.__name__
