"""How a script ends."""

import os
import sys
from collections.abc import Callable
from pathlib import Path


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Run a script on the command line's words; what is wrong with them is one sentence and exit code 2.

    PYRO_BLORA_TRACEBACK=1 shows the traceback, as it does of `pyro-blora`.
    """
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        if os.environ.get("PYRO_BLORA_TRACEBACK") == "1":
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
