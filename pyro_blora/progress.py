"""What a command is doing, on stderr: one live line in a terminal, lines with the time in a log, nothing if silenced.

This is the only module that decides which. Work is cut into phases, `with phase("predicting eval", total=32): ...`; one
inside another takes its place until it ends. Of several processes, the main one alone speaks.
"""

import contextlib
import gc
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

from .machine import is_main, is_terminal
from .signals import end_if_asked

T = TypeVar("T")

_LONG = 2.0  # seconds from which a finished phase leaves a line
_APART, _SHARE, _AT_MOST = 5.0, 0.1, 60.0  # a log's lines: seconds and share of the work between two; seconds, whatever
_IN_PLACE = 0.5  # seconds between two states of a notebook's line
_BAR, _TURNING = 12, "|/-\\"  # columns of a bar; a sign of life


class Phase:
    """A part of the work: `advance` counts progress towards `total`, `note` sets the text beside it."""

    def __init__(self, name: str, total: int | None, unit: str, first: int, still: bool):
        self.name, self.total, self.unit, self.first, self.done, self.still = name, total, unit, first, first, still
        self.began = self.shown_at = time.monotonic()
        self.shown_done, self.note = first, ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def advance(self, count: int = 1, *, note: str | None = None) -> None:
        """note: how it goes, until another one is given.   Errors: Interrupted, where a signal is still unheard."""
        end_if_asked()
        self.done += count
        self.note = self.note if note is None else note
        _State.form.changed(self)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each counted when the next one is requested."""
        for item in items:
            yield item
            self.advance()

    def state(self) -> str:
        """What is done and in which time, how long the rest will take, and the note; without the name."""
        text = _clock(self.seconds)
        if self.total is not None:
            text = f"{self.done:,}/{self.total:,} {self.unit} in {text}"
            if self.first < self.done < self.total:
                text += f", {_clock(self.seconds / (self.done - self.first) * (self.total - self.done))} left"
        return f"{text}: {self.note}" if self.note else text


@contextlib.contextmanager
def phase(
    name: str, total: int | None = None, *, unit: str = "steps", first: int = 0, still: bool = False
) -> Iterator[Phase]:
    """Show that this is being done, until the block ends.

    total: how much there is to count, in units (a plural); None where that is not known. first: done before. still:
    only name it, as libraries may draw their own bars meanwhile, of a download.
    """
    this = Phase(": ".join([*filter(None, _State.labels), name]), total, unit, first, still)
    if not _State.open:
        _State.form = _form()
    form = _State.form
    _State.open.append(this)
    try:
        form.begin(this)
        yield this
        form.end(this)
    finally:
        if this in _State.open:  # with those inside it that an error has left open
            del _State.open[_State.open.index(this) :]
        if not _State.open:
            form.close()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """The phase of a command's imports, without garbage collection, a fifth of their time: what they make stays."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with phase("importing PyTorch, Pyro and transformers"):
            yield
    finally:
        if collects:
            gc.enable()


def say(title: str, lines: Iterable[str]) -> None:
    """A block of lines under a title, for the user to read; the same one once in a process."""
    text = "\n  ".join([title, *lines])
    if text not in _State.said:
        _State.said.add(text)
        (_State.form if _State.open else _form()).say(text)


@contextlib.contextmanager
def labelled(label: str) -> Iterator[None]:
    """Within, the names of phases begin with this: of which run among several they are; "" changes nothing."""
    _State.labels.append(label)
    try:
        yield
    finally:
        _State.labels.remove(label)


@contextlib.contextmanager
def silenced(wanted: bool = True) -> Iterator[None]:
    """Within, nothing is shown of phases, if that is wanted."""
    _State.silenced += wanted
    try:
        yield
    finally:
        _State.silenced -= wanted


def prepare(*, quiet: bool) -> None:
    """Hold other libraries to the same: no bars where there is no terminal, and each warning by one process only.

    Call it before they are imported.
    """
    if quiet or not is_main() or not is_terminal():
        os.environ.setdefault("TQDM_DISABLE", "1")  # which tqdm reads when it is imported
    if not is_main():
        warnings.simplefilter("ignore")


class _Silent:
    def say(self, text: str) -> None: ...

    def begin(self, phase: Phase) -> None: ...

    def changed(self, phase: Phase) -> None: ...

    def end(self, phase: Phase) -> None: ...

    def close(self) -> None: ...


class _Log(_Silent):
    """A line when a phase begins, some on its way, one when its count is full. A repeated inner phase is named once."""

    def __init__(self):
        self.named: set[str] = set()

    def begin(self, phase: Phase) -> None:
        if phase.name not in self.named:
            self.named.add(phase.name)
            done = f", {phase.first:,} done" if phase.first else ""
            counts = phase.total is not None and phase.total > 1
            self.write(phase, f": {phase.total:,} {phase.unit}{done}" if counts else "")

    def changed(self, phase: Phase) -> None:
        waited, total = time.monotonic() - phase.shown_at, phase.total
        moved = total is not None and phase.done - phase.shown_done >= _SHARE * total
        if phase.done != total and (waited >= _AT_MOST or (waited >= _APART and moved)):
            self.write(phase, f": {phase.state()}")

    def end(self, phase: Phase) -> None:
        if phase.total is not None and phase.seconds >= _LONG:
            self.write(phase, f": {phase.state()}")

    def write(self, phase: Phase, rest: str) -> None:
        phase.shown_at, phase.shown_done = time.monotonic(), phase.done
        self.say(f"{time.strftime('%H:%M:%S')} {phase.name}{rest}")

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a reader that has gone, or a full disk, does not end the work
            sys.stderr.write(f"{text}\n")  # in one piece
            sys.stderr.flush()


class _Notebook(_Silent):
    """A line in the output of a cell, written again in its place; what is stored is its last state."""

    def __init__(self):
        self.lines: dict[int, Any] = {}  # handles of IPython, by phase

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def begin(self, phase: Phase) -> None:
        from IPython.display import display

        self.lines[id(phase)] = display(_plain(phase), raw=True, display_id=True)

    def changed(self, phase: Phase) -> None:
        if time.monotonic() - phase.shown_at >= _IN_PLACE:
            self.end(phase)

    def end(self, phase: Phase) -> None:
        phase.shown_at = time.monotonic()
        self.lines[id(phase)].update(_plain(phase), raw=True)


class _Live(_Silent):
    """One line at the foot of a terminal, drawn again by a thread; long phases leave a line when they end."""

    def __init__(self):
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True, force_terminal=True, highlight=False, markup=False)
        self.live = Live(
            console=self.console, get_renderable=self.line, transient=True,
            redirect_stdout=bool(sys.stdout and sys.stdout.isatty()),  # what others print goes above the line
        )  # fmt: skip

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def begin(self, phase: Phase) -> None:
        if phase.still:
            self.console.print(phase.name, soft_wrap=True)
        elif not self.live.is_started:
            self.live.start()
            self.console.show_cursor(True)  # a process that is killed would leave the terminal without

    def line(self):
        from rich.text import Text

        last = _State.open[-1:]  # in one piece: this is another thread
        if not last:
            return Text()
        (phase,) = last
        text = Text(f"{_TURNING[int(4 * phase.seconds) % len(_TURNING)]} ", no_wrap=True, overflow="crop")
        text.append(f"{phase.name} ", style="bold")
        if phase.total:
            full, empty = "#-" if self.console.options.ascii_only else "━─"
            filled = _BAR * phase.done // phase.total
            text.append(full * filled, style="green").append(f"{empty * (_BAR - filled)} ", style="dim")
        return text.append(phase.state())

    def end(self, phase: Phase) -> None:
        if phase.seconds >= _LONG and not phase.still:
            self.console.print(f"{phase.name}: {phase.state()}", soft_wrap=True)

    def close(self) -> None:
        self.live.stop()


def _plain(phase: Phase) -> dict[str, str]:
    return {"text/plain": f"{phase.name}: {phase.state()}"}


def _form() -> _Silent:
    if _State.silenced or not is_main():
        return _Silent()
    if _in_notebook():
        return _Notebook()
    return _Live() if is_terminal() else _Log()


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")  # 01:27, 1:02:03


class _State:
    """Of this process: it has one terminal."""

    open: ClassVar[list[Phase]] = []
    labels: ClassVar[list[str]] = []
    said: ClassVar[set[str]] = set()
    silenced = 0
    form: _Silent = _Silent()
