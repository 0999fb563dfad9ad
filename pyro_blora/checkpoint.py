"""Checkpoints of what is trained, as safetensors: parameters, buffers of laws, Adam's moments, the step.

No frozen weights of the backbone, no pickle. Nothing else has state: learning rates, temperature and KL weight are
functions of the step, the data order of (seed, epoch), and the draws of (seed, step, rank). So a run that is resumed
goes through the same bits.
"""

import os
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

_NAME = "state.safetensors"


def trainable(module: nn.Module, *, in_training: bool = False) -> dict[str, torch.Tensor]:
    """What is trained, frozen parts of adapters, and the state of prior, guide, weights' law and allocator, by name.

    in_training: without what is fitted when training has ended, a Laplace law's curvature.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]  # PEFT's
    of_adapters = {id(p) for x in layers for part in x.adapter_layer_names for p in getattr(x, part).parameters()}
    found = {name: p for name, p in module.named_parameters() if p.requires_grad or id(p) in of_adapters}
    parts = dict(module.named_modules())
    if in_training and getattr(parts.get("weights"), "curvature", None):
        del parts["weights"]
    for name in ("prior", "gate_guide", "weights", "net.allocation"):
        state = parts[name].state_dict(keep_vars=True) if name in parts else {}
        known = set(map(id, found.values()))  # a guide holds its prior too
        found |= {f"{name}.{key}": x for key, x in state.items() if id(x) not in known}
    return found


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and notes of a safetensors file.  Errors: SafetensorError or ValueError for one that is damaged."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        notes = file.metadata()
    if notes is None:
        raise ValueError("it has no notes")
    return tensors, notes


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], notes: dict[str, str]) -> None:
    """Replace a file in one rename: a kill leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=notes)
    os.replace(partial, path)


def save_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
    """Replace the checkpoint in `folder`."""
    tensors = {}
    for name, parameter in trainable(module, in_training=True).items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    write_tensors(folder / _NAME, tensors, {"step": str(step), "total": str(total)})


def load_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, total: int) -> int:
    """Restore what `save_checkpoint` wrote and return its step; 0 where there is none.

    Errors: ValueError for a file that is damaged or belongs to another configuration.
    """
    path = folder / _NAME
    if not path.exists():
        return 0
    try:
        tensors, notes = read_tensors(path)
        step, expected = int(notes["step"]), int(notes["total"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error}): delete its folder to start this run again") from None
    if expected != total:  # the configuration is the same, or the folder would be another one
        raise ValueError(
            f"checkpoint {path} is of a run of {expected} steps, this one has {total}: resume on as many processes as "
            "it was started on, or delete its folder to start again"
        )
    parameters = trainable(module, in_training=True)
    if {f"parameter/{name}" for name in parameters} != {key for key in tensors if key.startswith("parameter/")}:
        raise ValueError(f"checkpoint {path} is of another model: delete its folder to start this run again")
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            parameter = parameters[name]
            if kind == "parameter":
                parameter.copy_(value)
            else:  # the fused step of AdamW takes all of its state, the step count too, from the parameter's device
                optimizer.state[parameter][kind] = value.to(parameter.device)
    return step
