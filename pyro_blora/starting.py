"""Where the guide starts: an estimate, from one pass of gradients, of what the data say about every gate.

At the open network, closing a chain down to depth d changes its tensor by a known amount, and the change of the loss
is, to first order, D_d = -(sum over k > d of dL/dgate_k), where L is the mean NLL of a batch of B. Over N examples the
expected rise of the total NLL is estimated by its second-order term with the empirical Fisher matrix for the Hessian,

    rise_d = N B E[D_d^2] / 2      nats,      D_K = 0

and each chain's law starts at softmax(log prior(depth) - rise), its posterior if the other chains stayed open. One
formula serves bit gates and rank gates. The first-order term N E[D_d] is left out: over M batches its standard error is
N sd(D) / sqrt(M), which with N = 4,000, B = 32, M = 16 exceeds every rise below 16 nats; it would close gates on noise
alone, of either sign, where they matter most. Source: Optimal Brain Damage (1990) with the empirical Fisher.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from . import adapters
from .gates import Gates, NestedBernoulli
from .program import BayesianLoRA


def depth_logits(program: BayesianLoRA, batches: Iterable[tuple[dict, Tensor]]) -> Gates:
    """Unnormalised log posterior of each chain's depth.

    batches: (inputs, labels), all of one size.   Shapes: z (L, T, K + 1), g (L, R).   Units: nats.
    """
    drops = Gates([], [])
    sizes = set()
    training = program.training
    program.eval()
    for inputs, labels in batches:
        opened = [x.requires_grad_() for x in adapters.open_gates(program.net.layout, labels.device)]
        slopes = torch.autograd.grad(program.nll(inputs, labels, *opened), opened, allow_unused=True)
        for site, gate, slope in zip(drops, opened, slopes, strict=True):
            site.append(_closing(torch.zeros_like(gate) if slope is None else slope))
        sizes.add(len(labels))
    program.train(training)
    if len(sizes) != 1:
        raise ValueError(f"the gates start from batches of one size, got {'none' if not sizes else sorted(sizes)}")
    (size,) = sizes
    prior = program.prior()
    stacked = zip(prior, drops, strict=True)
    return Gates(*(_logits(law, torch.stack(site), program.n_train, size) for law, site in stacked))


def _closing(slope: Tensor) -> Tensor:
    """First-order change of the loss when a chain is closed down to depth 0 ... K.  (..., K) -> (..., K + 1)"""
    below = -slope.flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(below, (0, 1))


def _logits(prior: NestedBernoulli, drop: Tensor, n_train: int, batch: int) -> Tensor:
    rise = 0.5 * n_train * batch * drop.square().mean(0)
    return prior.depth_log_probs - rise
