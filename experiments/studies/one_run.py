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
from pyro_blora.run import train_run


def end_with(parent: int) -> None:
    while True:
        try:
            os.kill(parent, 0)  # asks whether it is there, and does nothing to it
        except ProcessLookupError:
            os._exit(1)
        time.sleep(0.2)


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
