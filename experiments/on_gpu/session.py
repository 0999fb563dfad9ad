"""One session on a GPU: processes with time limits inside one deadline, and pages that are whole at any moment."""

import concurrent.futures
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NO_TIME = "no time was left"
_MARGIN = 8.0  # seconds kept at the end, to write pages


@dataclasses.dataclass
class Session:
    """ends: time.monotonic() at which everything has ended. work: scratch folder. minilm, glue, texts: folders of
    weights and data."""

    out: Path
    ends: float
    tiny: bool
    minilm: Path
    glue: Path | None
    texts: Path | None = None
    work: Path = dataclasses.field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="on_gpu_")))
    workers: list["Worker"] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> float:
        return self.ends - _MARGIN - time.monotonic()

    def child(
        self, function: str, arguments: dict, *, seconds: float, kill_when: Callable[[], bool] | None = None,
        environment: dict | None = None,
    ) -> dict | None:  # fmt: skip
        """What `function` of child.py returns, in a process of its own; None where it was killed on purpose.

        Errors: RuntimeError with the end of its output, also where its time or the session's was over.
        """
        worker = Worker(environment)
        try:
            return worker.ask(self, function, arguments, seconds=seconds, kill_when=kill_when)
        finally:
            worker.end()


class Worker:
    """A process that answers one request of child.py's functions after another, so that it imports once.

    One that fails, or takes too long, is ended; the next request starts another.
    """

    def __init__(self, environment: dict | None = None):
        self.environment = environment or {}
        self.process: subprocess.Popen[str] | None = None
        self.log = Path()

    def ask(
        self, session: Session, function: str, arguments: dict, *, seconds: float,
        kill_when: Callable[[], bool] | None = None,
    ) -> dict | None:  # fmt: skip
        """As `Session.child`."""
        handle, name = tempfile.mkstemp(suffix=".json", dir=session.work)
        os.close(handle)
        result = Path(name)
        result.unlink()
        seconds, is_cut = min(seconds, session.left), seconds > session.left
        limit = time.monotonic() + seconds
        if self.process is not None and self.process.poll() is not None:  # it died after its last answer
            self.process = None
        process = self.process or self._start(session, result.with_suffix(".log"))
        print(json.dumps([function, arguments, str(result)]), file=process.stdin, flush=True)
        while not result.exists():
            if process.poll() is not None:
                self.process = None
                raise RuntimeError(f"exit code {process.returncode}: {_end(self.log)}")
            if kill_when is not None and kill_when():
                self.end()
                return None
            if time.monotonic() > limit:
                self.end()
                why = NO_TIME if is_cut else f"not finished in its {seconds:.0f} s"
                raise RuntimeError(f"{why}; its output ends: {_end(self.log)}")
            time.sleep(0.05)
        return json.loads(result.read_text())

    def end(self) -> None:
        """Kill the process, if there is one."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _start(self, session: Session, log: Path) -> subprocess.Popen[str]:
        variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
                     "PYRO_BLORA_MINILM": str(session.minilm), **self.environment}  # fmt: skip
        if session.texts is not None:
            variables["PYRO_BLORA_SMOLLM2"] = str(session.texts / "tokenizer")
        variables.setdefault("GOMP_SPINCOUNT", "1000")  # threads that spin beside other processes slow all of them down
        variables.setdefault("OMP_NUM_THREADS", "4")
        if session.tiny:  # the compiler takes longer than everything else
            variables["PYRO_BLORA_COMPILE"] = "0"
        command, self.log = [sys.executable, "-m", "experiments.on_gpu.child"], log
        session.workers.append(self)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=output, stderr=output,
                start_new_session=True, text=True,
            )  # fmt: skip
        return self.process


def _end(log: Path) -> str:
    """The last lines, of a progress bar what it showed last."""
    lines = [line.split("\r")[-1] for line in log.read_text(errors="replace").split("\n") if line.strip()]
    return "\n".join(lines[-25:])


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of a page: `measure` gives what the line says, a dictionary."""

    name: str
    measure: Callable[[Session], dict]


def run_part(
    session: Session, part: str, checks: list[Check], *, at_once: int, seconds: float, write: Callable[[list], None]
) -> None:
    """Run the checks, `at_once` of them in parallel, for at most `seconds`; `write` gets all lines after each."""
    ends, lines, lock = min(time.monotonic() + seconds, session.ends), [], threading.Lock()
    inside = dataclasses.replace(session, ends=ends, work=session.work)

    def measured(check: Check) -> None:
        began = time.monotonic()
        line = {"name": check.name}
        try:
            if inside.left <= 0:
                raise RuntimeError(NO_TIME)
            line |= check.measure(inside)
        except Exception as error:  # a line that fails must not take the others with it
            line["failed"] = f"{type(error).__name__}: {error}"
            if not isinstance(error, RuntimeError):
                line["failed"] += f"\n{traceback.format_exc()}"
        line["seconds"] = round(time.monotonic() - began, 1)
        with lock:
            lines.append(line)
            print(
                f"{part}: {check.name}: {'FAILED' if 'failed' in line else 'done'} in {line['seconds']} s", flush=True
            )
            if "failed" in line:
                print(line["failed"][-3000:], flush=True)
            order = {each.name: i for i, each in enumerate(checks)}
            write(sorted(lines, key=lambda each: order[each["name"]]))

    try:
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            list(pool.map(measured, checks))
    finally:
        for worker in session.workers:
            worker.end()
