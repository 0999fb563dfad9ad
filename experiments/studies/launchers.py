"""Where the runs of a grid take place: processes of this machine, or jobs of a cluster through submitit.

A launcher starts a run from its config.json and answers with something that has `ended()`, `stop()` and `wait()`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import one_run

ROOT = Path(__file__).resolve().parents[2]


class Processes:
    """A process of its own for every run. They end with the one that started them."""

    def start(self, config: Path, log: Path) -> "_Process":
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "experiments.studies.one_run", config, log, str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": path}
        return _Process(subprocess.Popen(command, env=environment, start_new_session=True))  # one signal, from us


class _Process:
    def __init__(self, process: subprocess.Popen):
        self.process = process

    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """Ask it to end, which it does after a checkpoint; see `wait`."""
        self.process.terminate()

    def wait(self) -> None:
        self.process.wait()


class Cluster:
    """A job of a cluster for every run: `slurm`, or `local` to try it out on this machine.

    Jobs of Slurm go on when the command that sent them ends; their numbers are kept beside the logs, and the next
    command waits for them instead of sending them again.
    Errors: ValueError without submitit, and for a parameter that the cluster does not know.
    """

    def __init__(self, name: str, folder: Path, parameters: dict[str, Any]):
        try:
            import submitit
        except ImportError:
            raise ValueError(f"--cluster {name} needs submitit: pip install 'pyro-blora[cluster]'") from None
        self.name, self.folder, self.submitit = name, folder, submitit
        with tempfile.TemporaryDirectory() as tried:  # submitit makes its folder before it looks at the parameters
            self._executor(tried, parameters)
        self.executor = self._executor(folder, parameters)

    def _executor(self, folder: Path | str, parameters: dict[str, Any]):
        try:
            executor = self.submitit.AutoExecutor(folder=folder, cluster=self.name)
        except RuntimeError as error:
            raise ValueError(f"--cluster {self.name} does not work here: {error}") from None
        try:
            executor.update_parameters(**{"timeout_min": 240, **parameters})
        except (NameError, AssertionError, TypeError) as error:
            raise ValueError(f"--cluster {self.name} does not take these parameters: {error}") from None
        return executor

    def start(self, config: Path, log: Path) -> "_Job":
        kept, slurm = log.with_suffix(".job"), self.name == "slurm"
        if slurm and kept.is_file() and in_queue(number := kept.read_text("utf-8").strip()):
            return _Job(self.submitit.SlurmJob(self.folder, number), keep=True)
        parent = os.getpid() if self.name == "local" else None
        path = os.environ.get("PYTHONPATH")  # a job starts elsewhere: it finds the checkout by this
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), path]))
        try:
            job = self.executor.submit(one_run.Job(), str(config.resolve()), str(log.resolve()), parent)
        finally:
            os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
        if slurm:
            kept.write_text(job.job_id + "\n", encoding="utf-8")
        return _Job(job, keep=slurm)


def in_queue(number: str) -> bool:
    """Whether Slurm has the job waiting or running; it forgets those that have ended."""
    asked = subprocess.run(["squeue", "--noheader", "--jobs", number], capture_output=True, text=True)
    return asked.returncode == 0 and bool(asked.stdout.strip())


class _Job:
    def __init__(self, job: Any, keep: bool):
        self.job, self.keep = job, keep

    def ended(self) -> bool:
        return self.job.done()

    def stop(self) -> None:
        if not self.keep:
            self.job.cancel(check=False)

    def wait(self) -> None:
        """It ends without us."""
