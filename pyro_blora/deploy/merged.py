"""The adapter in the weights: a model of transformers at 32 bit, or the deployed widths with a base that has it.

    at 32 bit       W = W0 + (alpha / R) Q(B) Q(A), the sum in float64, rounded to float32 once
    low bit         W = Q(Q(W0) + (alpha / R) Q(B) Q(A)), at the base's width and the range of least squared error

The second is no longer what was trained: the update is rounded to the base's grid, and the input of B is not rounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config.run_config import RunConfig
from ..files import new_folder, write_sums
from ..models.conv1d import to_conv1d, to_linear
from ..models.quiet_loading import quiet
from ..posterior.draws import deployed
from ..program import BayesianLoRA
from ..quantizer.packing import Scale
from . import cards
from .about import About
from .held_out import HeldOut, answer_of
from .model_card import write_card
from .peft import plain_backbone, save_tokenizer, weights_at
from .verify import verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CANDIDATES = torch.linspace(0.2, 1.0, 33)  # of the largest weight, among which the range of a merged one is found


@torch.no_grad()
def merge(
    program: BayesianLoRA, folder: str | Path, *, rows: dict[str, Tensor] | None = None, tokenizer: Any = None,
    config: RunConfig | None = None, held_out: HeldOut | None = None,
) -> Path:  # fmt: skip
    """Write the base at 32 bit with the deployed adapter in its weights, as transformers' `from_pretrained` reads it.

    Arguments and errors as in `peft.export`.
    """
    folder = Path(folder).expanduser()
    if not program.layout.adapted:
        raise ValueError("after full fine-tuning there is no adapter to merge: --format peft writes the whole model")
    with new_folder(folder, "a model") as partial:
        plain = merged_backbone(program)
        with quiet():
            plain.save_pretrained(str(partial))
            written: Any = type(plain).from_pretrained(str(partial), trust_remote_code=False, dtype=torch.float32)
        verify(program, written, rows)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial, config)
        write_sums(partial)
        measured = None if held_out is None else held_out.measure(answer_of(written.cpu(), program))
        about = About.of(program, plain_backbone(program.net), config)
        write_card(partial, about, cards.merged(about), measured)
    return folder


def merged_backbone(program: BayesianLoRA) -> PreTrainedModel:
    """The plain backbone, W0 + (alpha / R) Q(B) Q(A) in place of every adapted weight."""
    plain, layout = plain_backbone(program.net), program.layout
    _, weights = weights_at(program, deployed(program))
    to_linear(plain, weights)
    for name, (down, up) in weights.items():
        linear: Any = plain.get_submodule(name)
        base = linear.weight.detach()
        linear.weight = nn.Parameter(summed(base.cpu(), down, up, layout.alpha / layout.rank).to(base))
    to_conv1d(plain)
    return plain


def summed(base: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """base (m, n) + scale * up (m, r) down (r, n), in float64, rounded once."""
    return (base.double() + scale * (up.double() @ down.double())).to(base.dtype)


def fitted_range(x: Tensor, bits: int) -> Tensor:
    """The range of least squared error of a tensor on the grid of a width, ()."""
    largest = x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
    ranges = [largest * share for share in _CANDIDATES]
    errors = torch.stack([(Scale.of(one, bits).rounded(x) - x).double().square().sum() for one in ranges])
    return ranges[int(errors.argmin())]
