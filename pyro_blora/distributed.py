"""Several processes, one a device, as torchrun or `accelerate launch` starts them: what they share and split.

Data parallel: every process has its own part of each step's examples and its own draw of the gates, and gradients are
averaged. A backbone that does not fit on one device is sharded by FSDP2; what learns is small and stays whole
everywhere. Evaluation is split, too: the same draws on every process, each on its own batches.
"""

import functools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable

import accelerate
import torch
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list, fsdp2_prepare_model, gather_object
from torch import Tensor, nn

_EVERY = 1.0  # seconds after which processes on GPUs ask one another again


def average_gradients(parameters: list[nn.Parameter], accelerator: accelerate.Accelerator) -> None:
    """The mean of the processes' gradients, in one transfer: what learns is small, whatever the size of the backbone.

    So nothing has to be wrapped, and a sharded backbone is no special case. A parameter may have no gradient on some
    processes, as the ranges where a draw has every tensor at 32 bit: it counts as zero there, and stays None where no
    process has one.
    """
    if accelerator.num_processes == 1:
        return
    has = _as_tensor(tuple(p.grad is not None for p in parameters), accelerator.device)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mean = accelerator.reduce(torch.cat([*(x.flatten() for x in parts), has]), "mean")
    *means, anywhere = mean.split([*(p.numel() for p in parameters), len(parameters)])
    for i, (parameter, part) in enumerate(zip(parameters, means, strict=True)):
        if parameter.grad is not None:
            parameter.grad.copy_(part.view_as(parameter))
        elif anywhere[i] > 0:
            parameter.grad = part.view_as(parameter).clone()


@functools.lru_cache(maxsize=32)  # few patterns, and what comes from the host is waited for
def _as_tensor(has: tuple[bool, ...], device: torch.device) -> Tensor:
    return torch.tensor(has, dtype=torch.float32, device=device)


def as_on_main(estimated: Iterable[Tensor], accelerator: accelerate.Accelerator) -> None:
    """Make what each process has estimated the main one's, whatever the order of its sums."""
    if accelerator.num_processes > 1:
        for tensor in estimated:
            accelerate.utils.broadcast(tensor.data)


class AnyOf:
    """The largest of the processes' numbers, on all of them; 0 on steps at which they do not communicate.

    every: seconds between two communications, counted in steps of the slowest process. None: one second on GPUs, which
    this has to wait for, and every step elsewhere.
    """

    def __init__(self, accelerator: accelerate.Accelerator, *, every: float | None = None):
        self.accelerator, self.every = accelerator, every
        if every is None:
            self.every = _EVERY if accelerator.device.type == "cuda" else 0.0
        self.last: int | None = None  # step at which they did
        self.next, self.since = 0, 0.0

    def __call__(self, number: int, step: int) -> int:
        if self.accelerator.num_processes == 1:
            return number
        if step < self.next:
            return 0
        now = time.monotonic()
        seconds = math.inf if self.last is None else (now - self.since) / (step - self.last)
        mine = torch.tensor([[number, seconds]], dtype=torch.float64, device=self.accelerator.device)
        largest, slowest = self.accelerator.gather(mine).amax(0).tolist()
        self.last, self.since, self.next = step, now, step + max(1, int(self.every / slowest))
        return int(largest)


def sharding_wanted() -> bool:
    """Whether the launcher of several processes requests a sharded backbone, by --use_fsdp or its variable."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and accelerate.PartialState().num_processes > 1


def shard(model: nn.Module, accelerator: accelerate.Accelerator) -> None:
    """Split the frozen weights of a Hugging Face model over the processes, layer by layer, with Accelerate's FSDP2.

    Each layer's weights are gathered for as long as it runs. What learns is left whole. Settings are the launcher's.
    Errors: ValueError for FSDP version 1, and for an encoder that learns as a whole.
    """
    plugin = FullyShardedDataParallelPlugin()  # reads what the launcher set
    if plugin.fsdp_version != 2:
        raise ValueError("a backbone is sharded by FSDP2: launch with --fsdp_version 2 (FSDP_VERSION=2)")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if not frozen:
        raise ValueError("nothing is frozen that could be sharded: drop --use_fsdp, or train an adapter")
    plugin.ignored_modules = [  # the frozen factors of an XS adapter are small, and multiplied with what learns
        module for name, module in model.named_modules()
        if ".lora_" in name or any(p.requires_grad for p in module.parameters(recurse=False))
    ]  # fmt: skip
    plugin.cpu_ram_efficient_loading = False  # it would replace the parameters that our modules hold
    accelerator.state.fsdp_plugin = plugin
    fsdp2_prepare_model(accelerator, model)


def whole(x: Tensor) -> Tensor:
    """A tensor that was computed from a sharded weight, on every process; others as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def own_share(batches: list) -> list:
    """This process's batches: as many as every other has, the last ones twice where they do not go up evenly."""
    state = accelerate.PartialState()
    each = -(-len(batches) // state.num_processes)
    padded = batches + batches[-1:] * (each * state.num_processes - len(batches))
    return padded[state.process_index :: state.num_processes]


def gathered(part: object) -> list:
    """Every process's part, in their order."""
    return gather_object([part]) if accelerate.PartialState().num_processes > 1 else [part]


def on_main(check: Callable[[], None]) -> None:
    """Run a check on the main process; all processes wait for it, and raise its ValueError if it has one."""
    state, refusal = accelerate.PartialState(), None
    if state.is_main_process:
        try:
            check()
        except ValueError as error:
            if state.num_processes == 1:
                raise
            refusal = str(error)
    if state.num_processes > 1 and (refusal := broadcast_object_list([refusal])[0]):
        raise ValueError(refusal)


def leave(code: int = 0) -> None:
    """End this process of several, the last thing that a script under torchrun does; one process alone goes on.

    Gloo's threads may meet an interpreter that is gone, and abort: a finished run would look like a failed one. At code
    0 all processes wait for one another; else they do not, as another one may have ended already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    if code == 0:
        accelerate.PartialState().wait_for_everyone()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
