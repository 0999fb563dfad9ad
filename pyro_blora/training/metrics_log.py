"""metrics.jsonl: one line per logging step, also shown in the terminal and by trackers."""

import json
import os
from pathlib import Path

import accelerate
import torch

from ..bops import expected_bits, expected_rank
from ..files import replace_text, sync, writing
from ..posterior.draws import bops
from ..program import BayesianLoRA
from .gate_pictures import track_gate_maps
from .schedule import Schedule


class Logbook:
    """The logged lines of a run, on every process; the main one writes them to `folder`, if there is one."""

    def __init__(
        self, accelerator: accelerate.Accelerator, program: BayesianLoRA, schedule: Schedule, folder: Path | None
    ):
        self.accelerator, self.program, self.schedule = accelerator, program, schedule
        self.path = folder / "metrics.jsonl" if folder else None
        self.lines: list[dict] = []

    def log(self, step: int, seconds: float, last: torch.Tensor, grad_norm: torch.Tensor, optimizer, more: dict) -> str:
        """Write a line; returns what is shown of it. last: loss and its parts, of this process's step."""
        line = {"step": step, **self._measure(last), **self._gradients(step, grad_norm, optimizer), **more}
        line["seconds"] = round(seconds, 3)
        if not self.accelerator.is_main_process:
            return ""
        self.lines.append(line)
        if self.schedule.config.tracker:
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
            track_gate_maps(self.accelerator, self.program, step)
        if self.path:
            with writing(self.path), open(self.path, "r+", encoding="utf-8") as file:  # which `restore` made
                file.seek(0, os.SEEK_END)
                file.write(json.dumps(line) + "\n")
        return (
            f"loss {line['loss']:.3f} BOPs {line['bops_adapted']:.1%} bits {line['expected_bits']:.1f} "
            f"rank {line['expected_rank']:.1f} nll {line['nll']:.3f} kl {line['kl_z'] + line['kl_g']:.0f}"
        )

    @torch.no_grad()
    def _measure(self, last: torch.Tensor) -> dict:
        program, layout = self.program, self.program.net.layout
        last = self.accelerator.reduce(last, "mean")
        z, g = (q.mean for q in program.gate_guide.posterior())
        expected = bops(program)
        numbers = {
            **dict(zip(("loss", "nll", "kl_z", "kl_g", "kl_theta", "teacher_kl"), last, strict=True)),
            "expected_bits": expected_bits(layout, z)[program.z_mask].mean(),
            "expected_rank": expected_rank(g)[program.g_mask].sum() / max(1, len(layout.adapted)),
            "bops_adapted": expected.adapted_ratio,
            "bops_model": expected.model_ratio,
        }
        if not program.weights.in_training:
            numbers.pop("kl_theta")
        if program.teacher is None:
            numbers.pop("teacher_kl")
        return {key: float(value) for key, value in (numbers | program.prior.report()).items()}

    def _gradients(self, step: int, grad_norm: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict:
        """Norm of adapter's and head's gradient before clipping; temperature where draws are relaxed; gates' noise.

        From Adam's running means of the gradient and of its square: gate_gradient is the root of the mean square of a
        gate's gradient (nats over N), gate_noise the share of that square that is variance; 1 where nothing but noise
        is left, as the mean then stays at about 1/19 of it.
        """
        moments = [
            (state["exp_avg"] / (1 - b1 ** state["step"]), state["exp_avg_sq"] / (1 - b2 ** state["step"]))
            for group in optimizer.param_groups if group["name"] == "gates"
            for b1, b2 in [group["betas"]]
            for state in map(optimizer.state.get, group["params"]) if state
        ]  # fmt: skip
        found = {"grad_norm": float(grad_norm)}
        if self.program.elbo.draws != "discrete":
            found["temperature"] = self.schedule.temperature(step - 1)
        if step > self.schedule.opening and moments:
            means, squares = (torch.cat([x.flatten() for x in each]) for each in zip(*moments, strict=True))
            alive = squares > 0  # pinned gates have no gradient
            if bool(alive.any()):
                found["gate_gradient"] = squares[alive].mean().sqrt().item()
                found["gate_noise"] = 1 - (means[alive].square().sum() / squares[alive].sum()).clamp(max=1.0).item()
        return found

    def restore(self, first: int, lines: str | None = None) -> None:
        """Keep the logged lines up to the checkpoint; those after it are written again.

        lines: how many there were at the checkpoint. Errors: ValueError where some of them are missing.
        """
        if self.path is None or not self.accelerator.is_main_process:
            return
        if self.path.exists():
            found = map(_line, self.path.read_text("utf-8", errors="replace").splitlines())
            self.lines = [line for line in found if line.get("step", first + 1) <= first]
        if lines is not None and len(self.lines) != int(lines):
            raise ValueError(
                f"{self.path} has {len(self.lines)} lines up to step {first}, at the checkpoint of that step it had "
                f"{lines}: restore it from a copy, or delete its folder to start this run again"
            )
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def sync(self) -> None:
        """Force the lines to the disk, before a checkpoint that counts on them."""
        if self.path:
            sync(self.path)


def _line(text: str) -> dict:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:  # cut off while it was written
        return {}
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else {}
