"""Programs with a deployed allocation of every width, to export."""

import torch
from models import random_chains, weighted_net, weighted_program

from pyro_blora.gates import Gates


def allocated(build, *, seed=0, adapter="lora", kind=None, **settings):
    """A program whose deployed allocation is random: widths from 2 to 32 bit, ranks from 1 to 4.

    kind: of its outcome; None: two classes.
    """
    net = weighted_net(adapter, build, **settings, **({} if kind is None else {"head": kind.head}))
    program = weighted_program(net, weights="point")
    program.likelihood = kind or program.likelihood
    gates = Gates(random_chains(net.layout.z_shape, seed=seed), random_chains(net.layout.g_shape, seed=seed + 1))
    program.gate_guide.deployed = lambda: gates
    with torch.no_grad():
        randomize_biases(net, seed)
        net.log_range.add_(0.1 * torch.randn(net.log_range.shape, generator=torch.Generator().manual_seed(seed)))
        if net.smoothing is not None:
            torch.nn.init.normal_(net.smoothing.log_scale, std=0.5, generator=torch.Generator().manual_seed(seed))
    return program


@torch.no_grad()
def randomize_biases(model, seed=0):
    """Return the model with random biases: those of an untrained one are zero, and what misplaces them would pass."""
    for name, bias in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(bias, std=0.1, generator=torch.Generator().manual_seed(seed))
    return model
