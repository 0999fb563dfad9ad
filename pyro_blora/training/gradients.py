"""The gradient of a micro-batch: forward and backward of the program, on CUDA as one graph of kernels for each shape.

A gated step launches thousands of small kernels, and launching them one by one takes longer than running them. A CUDA
graph is recorded once for every shape of batch and launched as a whole. It computes the same numbers: its inputs and
the temperature are copied to where it reads them, and its random numbers come from the seed that is set before.
"""

import functools
import logging
import os
import random
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..program import BayesianLoRA, Held
from .non_finite import unvalidated

_MOVES = 3  # times that a tensor of prior or guide may be replaced before a step is no longer recorded
log = logging.getLogger(__name__)


class Gradients:
    """Adds the gradient of a micro-batch's share of the loss to the parameters of a program.

    With one micro-batch a step it is set, so gradients must be None before. parameters: what learns. graphs: record the
    step where it is on CUDA; False, or PYRO_BLORA_GRAPHS=0, launches kernel by kernel, as does whatever cannot be
    recorded (a step that reads values on the host, or draws random numbers there). sharded: some processes' weights are
    elsewhere, so each does the same forwards: nothing is recorded, and distributions are not checked.
    """

    def __init__(
        self, program: BayesianLoRA, parameters: Iterable[nn.Parameter], *, graphs: bool = True, sharded: bool = False
    ):
        self.program, self.parameters, self.sharded = program, [*parameters], sharded
        device = program.log_scale.device
        wanted = graphs and not sharded and os.environ.get("PYRO_BLORA_GRAPHS", "1") != "0"
        self.recording = wanted and device.type == "cuda"
        self.temperature = torch.ones((), device=device) if device.type == "cuda" else None
        self.validated: set[Held | None] = set()  # phases
        self.graphs: dict[tuple, _Graph] = {}
        self.pool: Any = None  # torch's handle
        self.moved = 0
        self.slopes: dict[nn.Parameter, Tensor] = {}  # where every recording leaves its gradients

    def __call__(
        self, inputs: dict[str, Tensor], labels: Tensor, temperature: float, kl_weight: float = 1.0,
        held: Held | None = None, micro_batches: int = 1,
    ) -> Tensor:  # fmt: skip
        """(loss, nll, kl_z, kl_g, kl_theta, teacher_kl), (6,), of the micro-batch; the gradient is of its share.

        held: the allocation at which gates are held.

        Errors: ValueError, at the first call of each phase, where a distribution refuses finite numbers.
        """
        here: float | Tensor = temperature
        if self.temperature is not None:  # where a graph reads it
            here = self.temperature.fill_(temperature)
        arguments = here, kl_weight, held, micro_batches
        if held not in self.validated and not self.sharded:
            self.validated.add(held)
            self._validate(inputs, labels, arguments)
        if self.recording and (graph := self._graph(inputs, labels, arguments)):
            found = graph.replay(inputs, labels)
        else:
            found = self._eager(inputs, labels, *arguments)
        self.program.temperature = temperature
        return found

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Of all recordings, as memory is used again on the stream only that it was taken on."""
        return torch.cuda.Stream(self.program.log_scale.device)

    def forget(self) -> None:
        """Drop what was recorded: the program is another one from now on."""
        self.graphs.clear()
        self.pool = None  # without a graph it is gone

    def _eager(self, inputs, labels, temperature, kl_weight, held, micro_batches) -> Tensor:
        with unvalidated():  # a loss that is not finite is for the step to leave out
            loss, terms = self.program(inputs, labels, temperature, kl_weight, held)
        (loss / micro_batches).backward()
        parts = loss, terms.nll, terms.kl_z, terms.kl_g, terms.kl_theta, terms.teacher_kl
        return torch.stack([(x + loss.new_zeros(())).detach().float() for x in parts])

    def _validate(self, inputs: dict, labels: Tensor, arguments: tuple) -> None:
        """One forward in which the distributions check what they get: a label that is none, a prior of the user's."""
        cuda, host = [labels.device] if labels.is_cuda else [], (random.getstate(), np.random.get_state())
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            try:
                self.program(inputs, labels, *arguments[:3])
            except ValueError:
                with unvalidated():
                    loss, _ = self.program(inputs, labels, *arguments[:3])
                if bool(loss.isfinite()):
                    raise
        random.setstate(host[0])
        np.random.set_state(host[1])

    def _graph(self, inputs: dict, labels: Tensor, arguments: tuple) -> "_Graph | None":
        """The graph for a shape of batch, recorded at its first one."""
        batch = {**inputs, "labels": labels}
        key = (*arguments[1:], *((name, x.shape, x.dtype) for name, x in batch.items()))
        places = tuple(x.data_ptr() for x in self._state())
        if key not in self.graphs or self.graphs[key].places != places:
            before = _random_states(labels.device)
            self.moved += key in self.graphs
            try:
                if self.moved > _MOVES:
                    raise ValueError("prior or guide put their tensors somewhere else in every step")
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                self.graphs[key] = _Graph(self, inputs, labels, arguments, places)
            except Exception as error:  # what a step does that cannot be recorded shows itself in many types
                self._give_up(error)
            _restore(before, labels.device)
        return self.graphs.get(key)

    def _state(self) -> list[Tensor]:
        """The program's inputs beside the network, which are updated in place."""
        own = [self.program.prior, self.program.gate_guide, self.program.weights]
        return [x for module in own for x in (*module.parameters(), *module.buffers())]

    def _give_up(self, error: Exception) -> None:
        self.recording = False
        self.forget()
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        log.warning("a step is not recorded as a CUDA graph (%s): its kernels are launched one by one", reason)
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # one that ends well frees the generator of the broken one
            torch.zeros((), device=self.program.log_scale.device)


class _Graph:
    """One recorded forward and backward; `places`: where the state was that it reads."""

    def __init__(self, gradients: Gradients, inputs: dict, labels: Tensor, arguments: tuple, places: tuple):
        self.places, self.parameters = places, gradients.parameters
        self.inputs, self.labels = {name: x.clone() for name, x in inputs.items()}, labels.clone()
        self.graph, device, self.alone = torch.cuda.CUDAGraph(), labels.device, arguments[-1] == 1
        before, host = [p.grad for p in self.parameters], _random_states(device)[1:]
        stream = gradients.stream
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):  # once without recording: handles, compiled kernels, tables
                self._forget_gradients()
                gradients._eager(self.inputs, self.labels, *arguments)
            if not _equal(host, _random_states(device)[1:]):
                raise ValueError("it draws random numbers on the host")
            with torch.cuda.stream(stream):
                learning = [p for p in self.parameters if p.grad is not None]
                for parameter in learning:
                    gradients.slopes.setdefault(parameter, torch.empty_like(cast(Tensor, parameter.grad)))
            self._forget_gradients()  # those of the recording are its own, until they are copied
            self.gradients = [(p, gradients.slopes[p]) for p in learning]
            with torch.cuda.graph(self.graph, pool=gradients.pool, stream=stream, capture_error_mode="thread_local"):
                self.parts = gradients._eager(self.inputs, self.labels, *arguments)
                found = [p.grad for p in learning if p.grad is not None]
                torch._foreach_copy_([slope for _, slope in self.gradients], found)
                self._forget_gradients()
        finally:
            torch.cuda.current_stream(device).wait_stream(stream)
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def replay(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        for name, given in inputs.items():
            self.inputs[name].copy_(given)
        self.labels.copy_(labels)
        self.graph.replay()
        learning, slopes = zip(*self.gradients, strict=True)
        if not self.alone:  # the next replay overwrites them
            so_far = [p.grad for p in learning]
            slopes = torch._foreach_mul(slopes, 1.0) if None in so_far else torch._foreach_add(so_far, slopes)
        for parameter, slope in zip(learning, slopes, strict=True):
            parameter.grad = slope
        return self.parts.clone()


def _random_states(device: torch.device) -> tuple:
    """Of the device's generator, and of the three of the host."""
    return torch.cuda.get_rng_state(device), torch.get_rng_state(), random.getstate(), np.random.get_state()


def _restore(states: tuple, device: torch.device) -> None:
    torch.cuda.set_rng_state(states[0], device)
    torch.set_rng_state(states[1])
    random.setstate(states[2])
    np.random.set_state(states[3])


def _equal(one: tuple, other: tuple) -> bool:
    return bool(torch.equal(one[0], other[0])) and one[1] == other[1] and str(one[2]) == str(other[2])
