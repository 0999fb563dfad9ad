"""Many simulations trained at once: one forward of the network for all, every one with gates and labels of its own.

The guides of D simulations are the D components of one module, their losses are added and Adam works number by number,
so that each is trained as if it were alone, by the same quantizer, distributions and schedules (test_ladder.py holds it
against `svi`). Only the calls are fewer, and a network this small is all calls.

Shapes: D simulations, N examples; z (D, L, T, K), g (D, L, R - 1).   Units: nats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_blora.adapters import GatedModel, Observer, observed
from pyro_blora.config import RunConfig
from pyro_blora.gates import Gates, NestedBernoulli, RelaxedNestedBernoulli
from pyro_blora.guides import Mixture
from pyro_blora.quantizer import mixture_weights, quantize_mixture
from pyro_blora.training import Schedule

from .calibration import Simulations
from .problems import UNDECIDED, Network


class EachItsOwn(Observer):
    """Gives every block of N examples the gates of its own simulation.

    free (L, T): ladders whose slopes are wanted, also where they are open; default: all that are not at 32 bit.
    """

    def __init__(self, net: GatedModel, gates: Gates, free: Tensor | None = None):
        self.ranges = net.log_range.exp()
        self.weights = mixture_weights(F.pad(gates.z, (1, 0), value=1.0))  # (D, L, T, 5)
        self.open_ranks = F.pad(gates.g, (1, 0), value=1.0)  # (D, L, R)
        at_32 = (gates.z == 1).all(-1).all(0)  # (L, T), in every simulation
        self.exact = (at_32 if free is None else at_32 & ~free).tolist()

    def _quantized(self, projection: int, tensor: int, each) -> Tensor:
        """each: D tensors of one shape -> (D, ...)"""
        settings = self.ranges[projection, tensor], self.weights[:, projection, tensor]
        return torch.stack([quantize_mixture(x, settings[0], w) for x, w in zip(each, settings[1], strict=True)])

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        if self.exact[projection][tensor]:
            return x
        return self._quantized(projection, tensor, x.unflatten(0, (len(self.weights), -1))).flatten(0, 1)

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.exact[projection][tensor]:
            return F.linear(x, weight, bias)
        D = len(self.weights)
        maps = self._quantized(projection, tensor, [weight] * D)  # (D, m, n)
        y = (x.reshape(D, -1, x.shape[-1]) @ maps.mT).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    def ranks(self, projection: int, hidden: Tensor) -> Tensor:
        each = hidden.unflatten(0, (len(self.open_ranks), -1))  # (D, N, ..., R)
        shape = (len(each), *(1,) * (each.dim() - 2), -1)
        return (each * self.open_ranks[:, projection].view(shape)).flatten(0, 1)


def nll(network: Network, gates: Gates, labels: Tensor) -> Tensor:
    """Mean NLL of each simulation's labels (D, N) at its gates, nats an example.  (D,)"""
    inputs = {name: x.repeat(len(labels), *(1,) * (x.dim() - 1)) for name, x in network.inputs.items()}
    with observed(network.net, EachItsOwn(network.net, gates)):
        logits = network.net(**inputs).logits.float()
    return F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape).mean(-1)


def trained_posteriors(network: Network, simulations: Simulations, *, steps: int, seed: int = 0) -> Tensor:
    """The distribution of the states that `relaxed` on a mean field finds for each simulation.  (D, S), float64"""
    D, N = simulations.labels.shape
    prior, layout = network.prior(), network.net.layout
    guide = Mixture(layout, network.prior, UNDECIDED, D)  # its components, each on its own
    schedule = Schedule(RunConfig(kl_warmup=0.0), steps, steps)
    optimizer = torch.optim.Adam(guide.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = schedule.learning_rate("gates", step)
            temperature = schedule.temperature(step)
            distributions = [
                RelaxedNestedBernoulli(x, temperature, hard=False, validate_args=False) for x in guide.logits()
            ]
            kl_z = torch.where(layout.z_mask, kl_divergence(distributions[0], prior.z), 0.0).sum()
            kl_g = torch.where(layout.g_mask, kl_divergence(distributions[1], prior.g), 0.0).sum()
            found = nll(network, Gates(*(distribution.rsample() for distribution in distributions)), simulations.labels)
            optimizer.zero_grad()
            (found.sum() + (kl_z + kl_g) / N).backward()
            optimizer.step()
    with torch.no_grad():
        each = zip(*(distribution.log_probs.unsqueeze(1) for distribution in guide.components()), strict=True)
        return torch.stack([network.states.log_q(Gates(*map(NestedBernoulli, x))) for x in each]).exp()
