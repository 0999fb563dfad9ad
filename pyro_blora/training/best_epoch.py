"""The epoch of least NLL on rows held out of training: watched, kept, and taken back at the end."""

import math
from collections.abc import Mapping
from pathlib import Path

import accelerate
import torch
from safetensors import SafetensorError

from ..build import Parts
from ..checkpoint import read_tensors, require_same_origin, trainable, write_tensors
from ..evaluation.evaluating import predicted
from ..gates import Gates
from ..posterior.draws import deployed, draw, draw_weights
from .schedule import Schedule

_FILE = "best.safetensors"  # beside the checkpoints
_DRAWS = 4  # of gates and weights behind an epoch's NLL, where both are learned together; else one forward


class Validation:
    """NLL after every epoch on the rows of split `validation`; with `choose_epoch`, training ends with the best one.

    Where gates can close, epochs before they start do not stand for election: everything is open there.
    folder: where the best epoch is kept, so that a run that is cut off finds it again; None keeps it in memory only.
    """

    def __init__(self, parts: Parts, schedule: Schedule, folder: Path | None):
        self.parts, self.path = parts, folder / "checkpoints" / _FILE if folder else None
        self.first = schedule.opening if parts.program.gates_close else 0
        self.best: tuple[float, int, dict] | None = None  # NLL, step, what was trained
        self.origin: Mapping[str, str] = {}

    def restore(self, first: int, origin: Mapping[str, str], kept: str | None) -> None:
        """Find the best epoch up to the step that a run goes on from.

        origin: hashes of what the training started from. kept: see `kept`, as the checkpoint has it; None: an older
        one. Errors: ValueError for a file that is damaged, missing, or of another training.
        """
        self.origin = origin
        if not (self.path and first and (self.path.exists() or kept)):
            return
        try:
            state, notes = read_tensors(self.path)
            best = float(notes["nll"]), int(notes["step"]), state
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete its folder to start this run again") from None
        require_same_origin(self.path, notes, origin)
        self.best = best if best[1] <= first else None

    @property
    def kept(self) -> str:
        """The step of the best epoch so far, for the notes of a checkpoint; empty without one."""
        return str(self.best[1]) if self.best else ""

    def after_epoch(self, step: int) -> dict[str, float]:
        """What to log; called by every process."""
        program, config = self.parts.program, self.parts.config
        if "validation" not in self.parts.tokens:
            return {}
        if program.weights.in_training:
            gates = draw(program, _DRAWS, seed=config.seed)
            theta = draw_weights(program, _DRAWS, seed=config.seed)
        else:
            gates, theta = Gates(*(x[None] for x in deployed(program))), None
        nll = predicted(self.parts, "validation", gates, theta).nll
        if config.choose_epoch and step > self.first and nll < (self.best[0] if self.best else math.inf):
            self._keep(nll, step)
        return {"validation_nll": nll}

    def _keep(self, nll: float, step: int) -> None:
        learned = trainable(self.parts.program, in_training=True)
        state = {name: p.detach().cpu().clone().contiguous() for name, p in learned.items()}
        self.best = nll, step, state
        if self.path and accelerate.PartialState().is_main_process:
            write_tensors(self.path, state, {**self.origin, "nll": repr(nll), "step": str(step)})

    @torch.no_grad()
    def finish(self) -> int | None:
        """Go back to the best epoch; returns its step."""
        if self.best is None:
            return None
        for name, parameter in trainable(self.parts.program, in_training=True).items():
            parameter.copy_(self.best[2][name])
        return self.best[1]
