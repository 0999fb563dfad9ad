"""Several draws of the posterior as adapters of PEFT, one folder each, for an ensemble without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.run_config import RunConfig
from ..files import new_folder, write_sums
from ..gates import Gates
from ..posterior.draws import draw, draw_weights
from ..program import BayesianLoRA
from . import cards
from .about import About
from .held_out import HeldOut, answer_of
from .model_card import write_card
from .peft import plain_backbone, save_peft, save_tokenizer, weights_at
from .verify import read_back, verify


@torch.no_grad()
def export_draws(
    program: BayesianLoRA, folder: str | Path, draws: int, *, seed: int = 0, rows: dict[str, Tensor] | None = None,
    tokenizer: Any = None, config: RunConfig | None = None, held_out: HeldOut | None = None,
) -> Path:  # fmt: skip
    """Write `draw-0`, `draw-1`, ... to `folder`: ranks, widths and random weights of a draw each.

    seed: of the draws, the run's gives those that it averaged over. Other arguments and errors as in `peft.export`.
    """
    folder = Path(folder).expanduser()
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if not program.layout.adapted:
        raise ValueError("after full fine-tuning there is no adapter to draw: --format packed or peft")
    with new_folder(folder, "an adapter") as partial:
        plain, answers = plain_backbone(program.net), []
        gates, theta = draw(program, draws, seed=seed), draw_weights(program, draws, seed=seed)
        for number, (z, g) in enumerate(zip(*gates, strict=True)):
            one, at = None if theta is None else theta[number], Gates(z, g)
            place = partial / f"draw-{number}"
            ranks, weights = weights_at(program, at, one)
            save_peft(plain, program.net, ranks, weights, place)
            (place / "README.md").unlink(missing_ok=True)  # PEFT's own; ours is above
            reloaded = read_back(plain, ranks, place)
            verify(program, reloaded, rows, at, one)
            if held_out is not None:
                answers.append(answer_of(reloaded.cpu(), program))
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial, config)
        write_sums(partial)
        measured = None if held_out is None else held_out.measure(*answers)
        write_card(partial, about := About.of(program, plain, config), cards.draws(about, draws), measured)
    return folder
