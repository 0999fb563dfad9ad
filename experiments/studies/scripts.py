"""How a script ends."""

import os
import sys
from collections.abc import Callable
from pathlib import Path


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Run a script on the command line's words; what is wrong with them is one sentence and exit code 2.

    So is a signal that ends a training, or Ctrl-C, with what is kept, and exit code 128 + its number.
    PYRO_BLORA_TRACEBACK=1 shows the traceback of a mistake, as it does of `pyro-blora`.
    """
    name = Path(sys.argv[0]).name
    try:
        code = main(sys.argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("PYRO_BLORA_TRACEBACK") == "1":
            raise
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as interruption:  # a training's, `Interrupted`, says what is kept
        kept = f"; {interruption}" if str(interruption) else ""
        print(f"{name}: interrupted{kept}", file=sys.stderr)
        code = getattr(interruption, "exit_code", 130)
    sys.exit(code)
