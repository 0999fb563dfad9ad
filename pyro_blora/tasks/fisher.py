"""Directions whose mean outer product is the Fisher information of an example's label about its logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence


def in_eigenbasis(distribution_of: Callable[[Tensor], Any], logits: Tensor) -> Tensor:
    """Random signs in the eigenbasis: for two classes v v' is the Fisher information itself, without any noise.

    distribution_of: the labels' distribution at given logits, whose outputs are independent groups along the last
    dimension.  (..., C) -> (..., C)
    """
    with torch.enable_grad():
        here = logits.clone().requires_grad_()
        divergence = kl_divergence(distribution_of(logits), distribution_of(here))
        (slope,) = torch.autograd.grad(divergence.sum(), here, create_graph=True)
        columns = [torch.autograd.grad(column.sum(), here, retain_graph=True)[0] for column in slope.unbind(-1)]
    values, vectors = torch.linalg.eigh(torch.stack(columns, -1))
    signs = torch.randint(0, 2, values.shape, device=values.device) * 2 - 1
    directions: Tensor = vectors @ (values.clamp(min=0.0).sqrt() * signs)[..., None]
    return directions.squeeze(-1)
