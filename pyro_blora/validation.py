"""The epoch of least NLL on rows held out of training: watched, kept, and taken back at the end."""

from pathlib import Path

import accelerate
import torch
from safetensors import SafetensorError

from .build import Parts
from .checkpoint import read_tensors, trainable, write_tensors
from .evaluation import predicted
from .gates import Gates
from .posterior import deployed, draw, draw_weights
from .schedule import Schedule

_FILE = "best.safetensors"  # beside the checkpoints
_DRAWS = 4  # of gates and weights behind an epoch's NLL, where both are learned together; else one forward


class Validation:
    """NLL after every epoch on the rows of split `validation`; with `choose_epoch`, training ends with the best one.

    Where gates can close, epochs before they start do not stand for election: everything is open there.
    folder: where the best epoch is kept, so that a run that is cut off finds it again; None keeps it in memory only.
    """

    def __init__(self, parts: Parts, schedule: Schedule, folder: Path | None, quiet: bool):
        self.parts, self.path, self.quiet = parts, folder / "checkpoints" / _FILE if folder else None, quiet
        self.first = schedule.opening if parts.program.gates_close else 0
        self.best: tuple[float, int, dict] | None = None  # NLL, step, what was trained

    def restore(self, first: int) -> None:
        """Find the best epoch up to the step that a run goes on from.  Errors: ValueError for a damaged file."""
        if not (self.path and first and self.path.exists()):
            return
        try:
            state, notes = read_tensors(self.path)
            best = float(notes["nll"]), int(notes["step"]), state
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete its folder to start this run again") from None
        self.best = best if best[1] <= first else None

    def after_epoch(self, step: int) -> dict[str, float]:
        """What to log; called by every process."""
        program, config = self.parts.program, self.parts.config
        if "validation" not in self.parts.tokens:
            return {}
        if program.weights.in_training:
            drawn = [make(program, _DRAWS, seed=config.seed) for make in (draw, draw_weights)]
        else:
            drawn = [Gates(*(x[None] for x in deployed(program)))]
        nll = predicted(self.parts, "validation", *drawn, quiet=self.quiet).nll
        if config.choose_epoch and step > self.first and (self.best is None or nll < self.best[0]):
            self._keep(nll, step)
        return {"validation_nll": nll}

    def _keep(self, nll: float, step: int) -> None:
        learned = trainable(self.parts.program, in_training=True)
        state = {name: p.detach().cpu().clone().contiguous() for name, p in learned.items()}
        self.best = nll, step, state
        if self.path and accelerate.PartialState().is_main_process:
            write_tensors(self.path, state, {"nll": repr(nll), "step": str(step)})

    @torch.no_grad()
    def finish(self) -> int | None:
        """Go back to the best epoch; returns its step."""
        if self.best is None:
            return None
        for name, parameter in trainable(self.parts.program, in_training=True).items():
            parameter.copy_(self.best[2][name])
        return self.best[1]
