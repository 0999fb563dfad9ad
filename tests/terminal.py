"""A terminal for commands under test: what they draw on it, and keys that are pressed."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from pathlib import Path

import torch

_PATIENCE = 300.0  # seconds
_TERMINAL = Path("/dev/tty")
_CODES = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


def on_terminal(command, *, environment=None, columns=120, press=None):
    """(exit code, all that was written to the terminal).  press: (a text to wait for, the keys that follow it).

    command: words, or a function, which a copy of this process runs: it has imported what takes seconds.
    """
    child, terminal = pty.fork()
    if child == 0:  # its size before its program: a busy machine may run the other side of the fork much later
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        kept = {**os.environ, "TERM": "xterm", **(environment or {})}
        for of_the_parent in ("COLUMNS", "LINES"):  # readline, which pytest imports, sets them for workers
            kept.pop(of_the_parent, None)
        if callable(command):
            _end_with(command, kept)
        os.execvpe(command[0], [str(word) for word in command], kept)
    written, pressed, ends = "", press is None, time.monotonic() + _PATIENCE
    with contextlib.suppress(OSError):  # the other side has gone
        while time.monotonic() < ends:
            if select.select([terminal], [], [], 0.1)[0]:
                found = os.read(terminal, 1 << 16)
                if not found:
                    break
                written += found.decode(errors="replace")
            if not pressed and press[0] in written:
                os.write(terminal, press[1].encode())
                pressed = True
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written


def _end_with(command, environment):
    os.environ.clear(), os.environ.update(environment)
    sys.stdin, sys.stdout = _TERMINAL.open(encoding="utf-8"), _TERMINAL.open("w", buffering=1, encoding="utf-8")
    sys.stderr, code = sys.stdout, 1
    torch.set_num_threads(1)  # a fork has none of the threads that this one may have
    try:
        code = command()
    finally:
        sys.stdout.flush()
        os._exit(code)


def screen(written):
    """The lines that stand on an endless terminal in the end, without trailing blanks and empty lines."""
    lines, row, column = [""], 0, 0
    for code, letter, returned, fed, text in _CODES.findall(written):
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif returned:
            column = 0
        elif fed:
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif letter == "A":
            row = max(0, row - int(code or 1))
        elif letter == "K":
            lines[row] = ""
        else:
            assert letter in "mhl", f"the terminal of these tests does not know ESC [ {code} {letter}"
    return [line.rstrip() for line in lines if line.strip()]
