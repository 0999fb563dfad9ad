"""Train the run of one config.json, as `pyro-blora train` does, in a process or a job of its own.

Where a parent is given it ends when that process is gone: a grid that is killed leaves no run behind that would write
into the folder of its next start.
"""

import os
import sys
import threading
import time
from pathlib import Path

from pyro_blora.config import RunConfig
from pyro_blora.host import spin_briefly

spin_briefly()  # a job of a cluster may not have the environment of the one that sent it

from pyro_blora.run import train_run


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
        train_run(RunConfig.from_json(Path(config)))
    except (ValueError, OSError) as error:
        sys.stdout.flush()
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]))
