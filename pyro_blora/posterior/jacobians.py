"""A program linearized in its random weights at their mean: for Laplace, and for predictions under it.

Shapes: B batch, D random weights; `*` the outputs of an example, (C,) of a sequence; Jacobians (B, *, D).
"""

import torch
from torch import Tensor

from ..gates import Gates
from ..program import GateProgram


def jacobians(program: GateProgram, inputs: dict, gates: Gates) -> tuple[Tensor, Tensor]:
    """(Jacobians of the logits in theta at its mean (B, *, D), logits (B, *)), at given gates.

    theta is expanded to one copy per example, so that one backward pass per output gives all of them; where a
    projection sees tensors that do not lead with the example (DeBERTa's positions), example by example.
    """
    B = len(next(iter(inputs.values())))
    if B > 1 and not program.leads_with_examples(inputs):
        rows = [jacobians(program, {k: x[i : i + 1] for k, x in inputs.items()}, gates) for i in range(B)]
        return torch.cat([J for J, _ in rows]), torch.cat([logits for _, logits in rows])
    with torch.enable_grad():
        theta = program.weights.mean.detach().expand(B, -1).clone().requires_grad_()
        logits = program.logits(inputs, gates, theta)
        columns = logits.flatten(1).unbind(-1)
        each = [torch.autograd.grad(column.sum(), theta, retain_graph=True)[0] for column in columns]
    return torch.stack(each, 1).unflatten(1, logits.shape[1:]), logits.detach()
