"""Distillation: while gates are in play, the network also learns the answers that it gave before any of them closed.

In place of the NLL of a batch, with W the weight:

    (1 - W) * NLL  +  W * KL(teacher || network at the drawn gates)      nats per example, a surrogate of the NLL

The divergence is that of the two predictive distributions, whatever the kind of outcome (`Likelihood.divergence`), at
temperature 1. The teacher is the network with all gates open and without dropout, as it was when the gates started: a
copy of adapter, head and scale, as the frozen weights are shared. It costs a forward at 32 bit and no backward pass. It
is not the open network of the current step, which nothing keeps right: the adapter then fits the rounded network
alone, and what that makes of the open one would become its own target.
Source: Mishra and Marr, Apprentice (2018), a frozen teacher in full precision; Liu et al., LLM-QAT (2023).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from . import adapters
from .elbos import Terms
from .gates import Gates
from .tasks.likelihoods import Likelihood

_SCALE = "scale"


class Teacher(nn.Module):
    """A copy of what a program learns beside its gates; buffers, so that a checkpoint has them.

    weight: W, from 0 to 1.   Errors: ValueError for a program whose gates cannot close.
    """

    def __init__(self, net: adapters.GatedModel, log_scale: Tensor, weight: float, *, gates_close: bool):
        super().__init__()
        if not (gates_close and net.layers()):
            raise ValueError(
                "nothing is to be distilled, as every gate stays open: drop --distillation, or choose another prior"
            )
        self.weight, self.names = weight, [name for name, _ in _learned(net)]
        for name, p in (*_learned(net), (_SCALE, log_scale)):
            self.register_buffer(name.replace(".", "/"), p.detach().clone())

    def require(self, steps: int, opening: int, *, sharded: bool = False) -> None:
        """Refuse a training of `steps` steps whose gates start at `opening`.  Errors: ValueError."""
        if not 0 < opening < steps:
            raise ValueError(
                "distillation needs steps before the gates start, in which its teacher learns, and steps after: give "
                "a --kl_warmup between 0 and 1, or drop --distillation"
            )
        if sharded:
            raise ValueError("the teacher of --distillation is not sharded: drop it, or launch without --use_fsdp")

    @torch.no_grad()
    def follow(self, net: adapters.GatedModel, log_scale: Tensor) -> None:
        """Become the network as it is."""
        for name, p in (*_learned(net), (_SCALE, log_scale)):
            self.get_buffer(name.replace(".", "/")).copy_(p)

    @torch.no_grad()
    def answers(
        self, net: adapters.GatedModel, likelihood: Likelihood, opened: Gates[Tensor], inputs: dict[str, Tensor]
    ) -> Any:
        """The distribution of the labels, without a gradient. The network is left as it was."""
        copies = {name: self.get_buffer(name.replace(".", "/")) for name in self.names}
        modes = {module: module.training for module in net.modules()}
        net.eval()
        try:
            with adapters.use_gates(net, *opened, opened=True):
                network = functools.partial(torch.func.functional_call, net, copies, ())
                found = net.head.logits(network, inputs, in_step=True)
        finally:
            for module, training in modes.items():
                module.training = training
        return likelihood(found.float(), scale=self.get_buffer(_SCALE).exp())


def _learned(net: adapters.GatedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Adapter and head, by name."""
    chosen = {id(p) for p in (*net.adapter_parameters(), *net.head_parameters())}
    return ((name, p) for name, p in net.named_parameters() if id(p) in chosen)


class Distilled(Messenger):
    """The likelihood of a model that runs within is mixed with the divergence from a teacher's answers.

    nlls, divergences: of each run of the model, nats per example, without gradients.
    """

    def __init__(self, likelihood: Likelihood, teacher: Any, weight: float):
        super().__init__()
        self.likelihood, self.teacher, self.weight = likelihood, teacher, weight
        self.nlls: list[Tensor] = []
        self.divergences: list[Tensor] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "label":
            msg["fn"] = _Mixed(msg["fn"], self)

    def mixed(self, student: Any, labels: Tensor) -> Tensor:
        """Its mean over the batch is minus what is minimized.  (B,)"""
        nll = -student.log_prob(labels)
        try:
            divergence = self.likelihood.divergence(self.teacher, student, labels)
        except NotImplementedError:
            raise ValueError(
                f"a label of kind {self.likelihood.title} has no divergence: define `divergence` of the Likelihood, or "
                "drop --distillation"
            ) from None
        self.nlls.append(nll.detach().mean())
        self.divergences.append(divergence.detach().mean())
        return -(1 - self.weight) * nll - self.weight * divergence

    def told(self, terms: Terms) -> Terms:
        """The terms for a log, with the NLL apart from the divergence; both are means over the runs of the model."""
        nll, divergence = (torch.stack(x).mean() for x in (self.nlls, self.divergences))
        return dataclasses.replace(terms, nll=nll, teacher_kl=divergence)


class _Mixed(dist.TorchDistribution):
    """Has the log-density that `Distilled` makes of a student's."""

    arg_constraints = {}  # noqa: RUF012 (torch's own spelling of a class attribute)

    def __init__(self, student: Any, of: Distilled):
        self.student, self.of = student, of
        super().__init__(student.batch_shape, student.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.of.mixed(self.student, value)
