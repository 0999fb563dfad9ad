"""The epoch of least NLL on rows held out of training: watched, kept, and taken back at the end."""

from pathlib import Path

import accelerate
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .build import Parts
from .checkpoint import trainable
from .data import batches_by_length, loader, on_device
from .posterior import draw, draw_weights, predict

_FILE = "best.safetensors"  # beside the checkpoints
_DRAWS = 4  # of gates and weights behind an epoch's NLL, where both are learned together; else one forward


class Validation:
    """NLL after every epoch on the rows of split `validation`; with `choose_epoch`, training ends with the best one.

    folder: where the best epoch is kept, so that a run that is cut off finds it again; None keeps it in memory only.
    """

    def __init__(self, parts: Parts, folder: Path | None):
        self.parts, self.path = parts, folder / "checkpoints" / _FILE if folder else None
        self.rows = parts.tokens.get("validation")
        self.best: tuple[float, int, dict] | None = None  # NLL, step, what was trained

    def restore(self, first: int) -> None:
        """Find the best epoch up to the step that a run goes on from.  Errors: ValueError for a damaged file."""
        if not (self.path and first and self.path.exists()):
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                notes = file.metadata()
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            best = float(notes["nll"]), int(notes["step"]), state
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete the folder to start this run again") from None
        self.best = best if best[1] <= first else None

    def after_epoch(self, step: int) -> dict[str, float]:
        """What to log; called by every process, each of which predicts all rows."""
        if self.rows is None:
            return {}
        program, config = self.parts.program, self.parts.config
        batches = batches_by_length(self.rows, 2 * config.batch_size)
        load = on_device(loader(self.rows, self.parts.tokenizer, batches), program.log_scale.device)
        drawn = {}
        if program.weights.in_training:
            seed = config.seed
            drawn = {"gates": draw(program, _DRAWS, seed=seed), "weights": draw_weights(program, _DRAWS, seed=seed)}
        nll = predict(program, load, **drawn).nll
        if config.choose_epoch and (self.best is None or nll < self.best[0]):
            self._keep(nll, step)
        return {"validation_nll": nll}

    def _keep(self, nll: float, step: int) -> None:
        state = {name: p.detach().cpu().clone().contiguous() for name, p in trainable(self.parts.program).items()}
        self.best = nll, step, state
        if self.path and accelerate.PartialState().is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            save_file(state, partial, metadata={"nll": repr(nll), "step": str(step)})
            partial.replace(self.path)

    @torch.no_grad()
    def finish(self) -> int | None:
        """Go back to the best epoch; returns its step."""
        if self.best is None:
            return None
        for name, parameter in trainable(self.parts.program).items():
            parameter.copy_(self.best[2][name])
        return self.best[1]
