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
    """ends: time.monotonic() at which everything has ended. work: scratch folder. minilm, glue: folders of weights and
    data."""

    out: Path
    ends: float
    tiny: bool
    minilm: Path
    glue: Path | None
    work: Path = dataclasses.field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="on_gpu_")))

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
        handle, name = tempfile.mkstemp(suffix=".json", dir=self.work)
        os.close(handle)
        result, log = Path(name), Path(name).with_suffix(".log")
        variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
                     "PYRO_BLORA_MINILM": str(self.minilm), **(environment or {})}  # fmt: skip
        variables.setdefault("GOMP_SPINCOUNT", "1000")  # threads that spin beside other processes slow all of them down
        variables.setdefault("OMP_NUM_THREADS", "4")
        if self.tiny:  # the compiler takes longer than everything else
            variables["PYRO_BLORA_COMPILE"] = "0"
        command = [sys.executable, "-m", "experiments.on_gpu.child", function, json.dumps(arguments), str(result)]
        limit = time.monotonic() + min(seconds, self.left)
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=output, stderr=output, start_new_session=True
            )
            while process.poll() is None:
                if kill_when is not None and kill_when():
                    self._kill(process)
                    return None
                if time.monotonic() > limit:
                    self._kill(process)
                    raise RuntimeError(f"not finished in its {seconds:.0f} s; its output ends: {_end(log)}")
                time.sleep(0.05)
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {_end(log)}")
        return json.loads(result.read_text())

    def _kill(self, process: subprocess.Popen) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        list(pool.map(measured, checks))
