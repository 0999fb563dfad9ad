"""SIGTERM, SIGINT and SIGHUP: a training ends with the step that it is in, after a checkpoint; anything else at once.

A signal becomes `Interrupted`, a KeyboardInterrupt that knows its exit code, 128 + the signal's number (143, 130, 129).
Within `deferred` the first one is only noted, for the loop to ask after each step. One that comes more than a second
later ends the process where it is: launchers repeat signals (timeout sends one to the process and one to its group,
torchrun passes on what a terminal has sent already), a user who presses the keys again means it.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from .machine import is_main, is_terminal

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
_TOGETHER = 1.0  # seconds within which signals are one


class Interrupted(KeyboardInterrupt):
    """A signal has ended the work. The text lists what is kept."""

    def __init__(self, signum: int, text: str = ""):
        super().__init__(text)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


class _State:
    """Of this process: signals are its own."""

    heeding = False
    deferring = 0
    asked: int | None = None
    since = 0.0


@contextlib.contextmanager
def heeded(*more: int) -> Iterator[None]:
    """Turn the ending signals, and `more`, into `Interrupted`. Not those that are ignored (nohup) or handled otherwise.

    Within another `heeded`, and in other threads than the main one, it changes nothing.
    """
    if _State.heeding or threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {s: signal.getsignal(s) for s in (*ENDING, *more) if s in more or signal.getsignal(s) in usual}
    for each in before:
        signal.signal(each, _hear)
    _State.heeding, _State.asked = True, None
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        _State.heeding, _State.asked = False, None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within this context a signal is only recorded, for `asked`. At the end, a recorded signal ends the work."""
    with heeded():
        _State.deferring += 1
        try:
            yield
        finally:
            _State.deferring -= 1
        if _State.asked is not None and not _State.deferring:
            raise Interrupted(_State.asked)


def asked() -> int | None:
    """The signal that asks this process to end, if there was one."""
    return _State.asked


def end_if_asked() -> None:
    """What `_hear` raises is lost in a finalizer or a callback of the garbage collector: raise it again.

    Errors: Interrupted, unless signals are deferred.
    """
    if _State.asked is not None and not _State.deferring:
        raise Interrupted(_State.asked)


def _hear(signum: int, frame: FrameType | None) -> None:
    if _State.asked is None:
        _State.asked, _State.since = signum, time.monotonic()
        if not _State.deferring:
            raise Interrupted(signum)
        if signum == signal.SIGINT and is_main() and is_terminal():  # an interactive user
            os.write(2, b"\npyro-blora: ending after this step, with a checkpoint; once more to end at once\n")
    elif time.monotonic() - _State.since > _TOGETHER:
        os.write(2, b"\npyro-blora: stopped at once, by a second signal\n")
        os._exit(128 + signum)
