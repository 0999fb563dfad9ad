"""Processes that begin as copies of this one: what they run is imported already, which takes a new one seconds."""

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

_PATIENCE = 300.0  # seconds


def started(run: Callable[[], int | None], output: Path, **variables: str) -> int:
    """The number of a process that runs a function, printing into a file, with these variables of the environment."""
    process = os.fork()
    if process:
        return process
    code: int | None = 1
    try:
        sys.stdout = sys.stderr = output.open("w", buffering=1, encoding="utf-8")
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        faulthandler.enable()  # SIGABRT: where it is, into its file
        os.environ.update(variables)
        torch.set_num_threads(1)  # a fork has none of the threads that this one may have
        AcceleratorState._reset_state(reset_partial_state=True)  # it may say that this is the only process
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code or 0)


def ended(process: int) -> int | None:
    """Its exit code, below 0 for a signal; None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def in_two(run: Callable[[], int | None], folder: Path, **variables: str) -> str:
    """What two processes print, in environments as torchrun makes them.  Fails with it where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    outputs, codes, left = [folder / f"process-{rank}.txt" for rank in (0, 1)], [], []
    for rank, output in enumerate(outputs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        left.append(started(run, output, **place, **meeting, **variables))
    ends = time.monotonic() + _PATIENCE
    while left:
        time.sleep(0.02)
        if any(codes) or time.monotonic() > ends:  # the other one waits for it
            for process in left:
                os.kill(process, signal.SIGABRT)
        found = {process: ended(process) for process in left}
        codes += [code for code in found.values() if code is not None]
        left = [process for process, code in found.items() if code is None]
    printed = "".join(output.read_text("utf-8") for output in outputs)
    assert codes == [0, 0], printed[-8000:]
    return printed
