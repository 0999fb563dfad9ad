"""When the checkpoints of a training are written, what their notes hold, and where a run goes on from.

Only the main process writes. Notes: hashes of what the training started from, the number of logged lines, the best
epoch so far, counts of the steps that were left out, and the number of processes.
"""

import time
from pathlib import Path

import accelerate

from ..checkpoint import load_checkpoint, save_checkpoint, saved_in
from ..run_lock import same_folder

DIVERGED = "the training diverged at step {}: {}. Lower --lr; a new setting is a new run folder. {}"


class Checkpoints:
    """Of one training. book, validation, finite: the parts of the loop that have state beside the program.
    `require_folder` refuses a folder that has been removed.

    folder: of the run, None to keep nothing. origin: see `identity.identity`.
    """

    def __init__(self, folder: Path | None, program, optimizer, total: int, origin: dict, book, validation, finite):
        self.folder, self.program, self.optimizer, self.total, self.origin = folder, program, optimizer, total, origin
        self.book, self.validation, self.finite = book, validation, finite
        self.saved = time.monotonic()
        self.processes = accelerate.PartialState().num_processes
        self.writes = folder is not None and accelerate.PartialState().is_main_process
        self.require_folder = same_folder(folder) if folder is not None and self.writes else lambda: None

    def resume(self) -> int:
        """Take up the checkpoint, if there is one; returns the step that is next."""
        if self.folder is None:
            return 0
        found = load_checkpoint(
            self.folder / "checkpoints", self.program, self.optimizer, self.total, self.origin, self.processes
        )
        self.book.restore(found.step, found.notes.get("lines"))
        self.validation.restore(found.step, self.origin, found.notes.get("best"))
        self.finite.restore(found.notes.get("skipped"))
        return found.step

    def due(self, steps: int, every: int, minutes: float) -> bool:
        """Whether one is due after that many steps: every so many steps, and so many minutes after the last one."""
        return self.folder is not None and (steps % every == 0 or time.monotonic() - self.saved >= 60 * minutes)

    def save(self, steps: int) -> None:
        """By the main process.  Errors: ValueError for numbers that are not finite, or a lost folder; NotWritten."""
        self.saved = time.monotonic()
        if self.folder is None or not self.writes:
            return
        self.require_folder()
        self.book.sync()
        notes = {**self.origin, "lines": str(len(self.book.lines)), "best": self.validation.kept,
                 "skipped": self.finite.state, "processes": str(self.processes)}  # fmt: skip
        try:
            save_checkpoint(self.folder / "checkpoints", self.program, self.optimizer, steps, self.total, notes)
        except ValueError as error:
            raise ValueError(DIVERGED.format(steps - 1, error, self.kept())) from None

    def kept(self) -> str:
        """A sentence about the last checkpoint."""
        found = saved_in(self.folder) if self.folder else None
        return f"{found.partition(',')[0].capitalize()}." if found else "There is no checkpoint."
