"""Texts that a program's network writes by itself, at given gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapters import use_gates
from ..gates import Gates
from ..program import BayesianLoRA
from ..tasks.likelihoods import Rows
from ..tasks.writing import Writer
from .draws import deployed


@torch.no_grad()
def write(
    program: BayesianLoRA, tokenizer: Any, rows: Rows, gates: Gates[Tensor] | None, theta: Tensor | None,
    batch_size: int,
) -> list[str]:  # fmt: skip
    """A text for each row, of one allocation. gates: None for the deployed one. theta: (D,), None for the mean.

    Errors: TypeError for a kind of outcome that writes none.
    """
    kind, training = program.likelihood, program.training
    if not isinstance(kind, Writer):
        raise TypeError(f"{kind.title} is not written")
    random = None if theta is None else program.weights.split(theta)
    z, g = gates or deployed(program)
    program.eval()
    with use_gates(program.net, z, g, random):
        found = kind.write(program.net.peft_model, tokenizer, rows, program.text_columns, batch_size)
    program.train(training)
    return found
