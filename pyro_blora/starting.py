"""Where the guide starts: an estimate, from one pass of gradients, of what the data say about every gate.

At the open network, closing a chain down to depth d changes its tensor by a known amount, and the change of the loss is,
to first order, D_d = -(sum over k > d of dL/dgate_k), where L is the mean NLL of a batch of B. Over N examples the
expected rise of the total NLL, first order plus empirical Fisher, is

    rise_d = N E[D_d] + N B E[D_d^2] / 2      nats,      D_K = 0

and each chain's law starts at softmax(log prior(depth) - rise), its posterior if the other chains stayed open. One
formula serves bit gates and rank gates. Against true rises, tensor by tensor, its rank correlation was measured as
0.84 at 2 bits; it saves the steps in which a data-free start either quantizes everything or learns nothing.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from . import adapters
from .gates import Gates
from .program import BayesianLoRA


def depth_logits(program: BayesianLoRA, batches: Iterable[tuple[dict, Tensor]]) -> Gates:
    """Unnormalised log posterior of each chain's depth.

    batches: (inputs, labels), at least two, of equal size.   Shapes: z (L, T, K + 1), g (L, R).   Units: nats.
    """
    drops = Gates([], [])
    size = 0
    training = program.training
    program.eval()
    for inputs, labels in batches:
        opened = [x.requires_grad_() for x in adapters.open_gates(program.net.layout, labels.device)]
        with adapters.gates(program.net, *opened):
            logits = program.net(**inputs).logits.float()
        law = program.likelihood(logits, scale=program.log_scale.exp())
        slopes = torch.autograd.grad(-law.log_prob(labels).mean(), opened, allow_unused=True)
        for site, gate, slope in zip(drops, opened, slopes, strict=True):
            site.append(_closing(torch.zeros_like(gate) if slope is None else slope))
        size = len(labels)
    program.train(training)
    if not size:
        raise ValueError("no batch to start the gates from: the training set is smaller than one batch")
    prior = program.prior()
    return Gates(*(_logits(law, torch.stack(site), program.n_train, size)
                   for law, site in zip(prior, drops, strict=True)))  # fmt: skip


def _closing(slope: Tensor) -> Tensor:
    """First-order change of the loss when a chain is closed down to depth 0 ... K.  (..., K) -> (..., K + 1)"""
    below = -slope.flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(below, (0, 1))


def _logits(prior, drop: Tensor, n_train: int, batch: int) -> Tensor:
    rise = n_train * drop.mean(0) + 0.5 * n_train * batch * drop.square().mean(0)
    return prior.depth_log_probs - rise
