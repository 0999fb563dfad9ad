"""Train the run of one config.json, as `pyro-blora train` does, in a process or a job of its own.

Where a parent is given it ends when that process is gone: a grid that is killed leaves no run behind that would write
into the folder of its next start. A signal ends it with a checkpoint, see `pyro_blora.signals`; a job that submitit
tells to make room, or whose time is up, is sent again when it has written one.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from pyro_blora.config import RunConfig
from pyro_blora.machine import spin_briefly

spin_briefly()  # a job of a cluster may not have the environment of the one that sent it

from pyro_blora.run import train_run
from pyro_blora.signals import Interrupted, heeded

_ROOM = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")  # what submitit has Slurm send


def end_with(ancestor: int) -> None:
    """End this process when the one that started it, or one before that, is gone."""
    parent = os.getppid()
    while os.getppid() == parent and is_there(ancestor):
        time.sleep(0.2)
    os._exit(1)


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only
    except ProcessLookupError:
        return False
    return True


def train(config: str, log: str, parent: int | None = None) -> None:
    """What the run prints goes to `log`, its error in one line at the end."""
    with open(log, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if parent is not None:
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    try:
        train_or_make_room(RunConfig.from_json(Path(config)))
    except (ValueError, OSError) as error:
        sys.stdout.flush()
        sys.exit(f"error: {' '.join(str(error).split())}")
    except Interrupted as interruption:
        print(f"interrupted; {interruption}", file=sys.stderr)
        sys.exit(interruption.exit_code)


def train_or_make_room(config: RunConfig) -> None:
    """Train. Where submitit's handler answers the signal to make room, a checkpoint is written before it does."""
    answer = signal.getsignal(_ROOM)
    more = (_ROOM,) if callable(answer) else ()
    try:
        with heeded(*more):
            train_run(config)
    except Interrupted as interruption:
        if interruption.signum not in more:
            raise
        print(f"interrupted; {interruption}", file=sys.stderr)
        answer(_ROOM, None)


class Job:
    """`train` as submitit sends it again, with the same arguments: the run goes on from its checkpoint."""

    def __call__(self, config: str, log: str, parent: int | None = None) -> None:
        train(config, log, parent)

    def checkpoint(self, *arguments):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]))
