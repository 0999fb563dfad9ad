"""One trial: a real training in a forked process, killed at some moment, and the same command until it is finished.

Processes are forked from one that has imported everything and computed nothing, so that a start takes no seconds and
the whole life of a run can be hit.
"""

import contextlib
import faulthandler
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pyro_blora.__main__ import main
from pyro_blora.checkpoint import NEWEST, OLDER

from .contents import contents
from .subjects import words

SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
STEPS = 12  # of the subjects' trainings
_SOON = 0.1  # seconds: a kill that is aimed at a step comes at most that much later
_PATIENCE = 300  # seconds until a process that does not end is an error
_AGAIN = 4  # runs of the same command after the kills, of which one has to finish


class Process:
    """A forked child that ends with `act`'s exit code; what it prints goes to a file."""

    def __init__(self, act: Callable[[], int | None], log: Path):
        self.number = os.fork()
        if self.number:
            return
        code = 99
        try:
            with open(log, "ab", buffering=0) as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            faulthandler.enable()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = act() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """The exit code, minus the signal that ended it; None where it goes on after that time."""
        ends = time.monotonic() + seconds
        while True:
            number, status = os.waitpid(self.number, os.WNOHANG)
            if number:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= ends:
                return None
            time.sleep(min(0.005, max(0.0, ends - time.monotonic())))

    def end(self) -> int | None:
        """The exit code; None where it goes on for too long, and is ended, its log with every thread's stack."""
        code = self.wait(_PATIENCE)
        if code is None:
            os.kill(self.number, signal.SIGABRT)
            self.wait(_PATIENCE)
        return code

    def kill(self, signum: int) -> int | None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.number, signum)
        return self.end()


def command(name: str, backbones: Path, output: Path) -> Process:
    line = words(name, backbones, output)
    return Process(lambda: main(line), output.with_suffix(".log"))


def undisturbed(name: str, backbones: Path, output: Path) -> tuple[float, dict]:
    """Seconds and contents of a run that nothing disturbs.  Errors: RuntimeError with what it printed."""
    began = time.monotonic()
    code = command(name, backbones, output).end()
    if code != 0:
        log = output.with_suffix(".log").read_text("utf-8", errors="replace")
        raise RuntimeError(f"{name}: an undisturbed run ends with {code}: {log}")
    return time.monotonic() - began, read_contents(finished_folder(output))


def finished_folder(output: Path) -> Path | None:
    found = [path for path in output.glob("*") if (path / "summary.json").is_file()]
    return found[0] if found else None


def read_contents(folder: Path) -> dict:
    """In a process of its own: readers start threads, which a process that forks should not have."""
    out = folder.parent.with_suffix(".json")
    Process(lambda: out.write_text(json.dumps(contents(folder))) and 0, folder.parent.with_suffix(".log")).end()
    return json.loads(out.read_text())


def moment(output: Path) -> tuple[str, int]:
    """Where in its life a run was killed, and how many of its logged steps have no checkpoint."""
    if (folder := finished_folder(output)) is not None:
        return ("finished" if (folder / "report.html").is_file() else "page"), 0
    partials = sorted(output.rglob(".*.partial/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not partials:
        return "before the first step", 0
    lines = partials[-1].read_text("utf-8").count("\n")
    notes = [saved_step(partials[-1].parent / "checkpoints" / file) for file in (NEWEST, OLDER)]
    step, total = max(notes)
    if not lines and not step:
        return "before the first step", 0
    return ("training" if not step or step < total else "after training"), max(0, lines - step)


def saved_step(path: Path) -> tuple[int, int]:
    """(step, steps in all) of a checkpoint, read from its header alone; zeros without one."""
    try:
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        notes = json.loads(header["__metadata__"]["notes"])
        return int(notes["step"]), int(notes["total"])
    except (OSError, ValueError, KeyError):
        return 0, 0


def last_line(output: Path) -> str:
    log = output.with_suffix(".log")
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.split("\r")[-1].strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def reaches_its_moment(process: Process, output: Path, chance: random.Random, seconds: float) -> bool:
    """Let a run go on to some moment: of its whole life, or in its training, as often; False where it ends before."""
    if chance.random() < 0.5:
        return process.wait(chance.random() * seconds) is None
    lines, ends = chance.randrange(STEPS + 1), time.monotonic() + _PATIENCE
    while time.monotonic() < ends and finished_folder(output) is None:
        if process.wait(0.005) is not None:
            return False
        if any(log.read_bytes().count(b"\n") >= lines for log in output.glob(".*.partial/metrics.jsonl")):
            break
    return process.wait(chance.random() * _SOON) is None


def trial(
    name: str, number: int, seed: int, backbones: Path, folder: Path, seconds: float, expected: dict
) -> list[dict]:
    """Kill a run once or twice, finish it, and say for each kill what came of it."""
    chance = random.Random(f"{seed} {name} {number}")
    output = folder / f"trial-{number}"
    kills = []
    for _ in range(1 + (chance.random() < 0.3)):
        sort = chance.choices(list(SIGNALS), weights=(2, 1, 1))[0]
        process = command(name, backbones, output)
        if not reaches_its_moment(process, output, chance, seconds):
            break  # it was quicker than the run that nothing disturbed
        began = time.monotonic()
        code = process.kill(SIGNALS[sort])
        if code == 0:
            break
        where, lost = moment(output)
        # by the signal itself where it comes before the command has begun, which a shell shows as the same code
        right = code in (-SIGNALS[sort], *([] if sort == "KILL" else [128 + SIGNALS[sort]]))
        kills.append({"subject": name, "signal": sort, "moment": where, "lost": lost, "code": code, "right code": right,
                      "seconds to end": time.monotonic() - began})  # fmt: skip
        if not right and code != 0:
            break
    codes = []
    for _ in range(_AGAIN if kills else 0):
        codes.append(command(name, backbones, output).end())
        if codes[-1] == 0:
            break
    result = outcome(output, codes, expected) if kills else {}
    kills = [kill | result for kill in kills]
    if all(map(is_fine, kills)):
        for path in (output, output.with_suffix(".log"), output.with_suffix(".json")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return kills


def is_fine(kill: dict) -> bool:
    """Whether a kill, and all that came after it, went as it should."""
    return all(kill[key] for key in ("resumed", "equal", "report", "right code")) and not kill["left over"]


def outcome(output: Path, codes: list[int | None], expected: dict) -> dict:
    folder = finished_folder(output)
    found = read_contents(folder) if folder else {}
    different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    finished_before = codes[:1] == [2] and folder is not None and "finished run already" in last_line(output)
    return {
        "resumed": folder is not None and (codes[:1] == [0] or finished_before),
        "equal": folder is not None and not different, "different": different[:5],
        "report": folder is not None and (folder / "report.html").is_file(),
        "left over": sorted(path.name for path in output.glob("*") if path != folder), "codes": codes,
        "said": last_line(output),
    }  # fmt: skip
