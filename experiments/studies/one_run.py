"""Train the run of one config.json, as `pyro-blora train` does, and end when the process that started it is gone.

A grid that is killed leaves no run behind that would write into the folder of the next start.
"""

import os
import sys
import threading
import time
from pathlib import Path

from pyro_blora.config import RunConfig
from pyro_blora.run import train_run


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def main(config: str, parent: str) -> None:
    threading.Thread(target=end_with, args=(int(parent),), daemon=True).start()
    try:
        train_run(RunConfig.from_json(Path(config)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
