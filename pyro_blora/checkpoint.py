"""Checkpoints of a training, as safetensors: parameters, buffers of prior and guide, Adam's moments, the step.

No frozen weights of the backbone, no pickle. Nothing else has state: learning rates, temperature and KL weight are
functions of the step, the data order of (seed, epoch), and the draws of (seed, step, rank). So a run that is resumed
goes through the same bits. The newest and the one before it are kept, each with a hash of its content, so that a
damaged one is skipped, and with hashes of what the training started from (identity.py).
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import replace
from .weights.base import Weights

NEWEST, OLDER = "state.safetensors", "state.previous.safetensors"
WHAT = {  # a training starts from, by the name of its hash in the notes
    "config": "another configuration",
    "data": "other training data: texts, labels or tokenizer have changed since",
    "backbone": "another backbone: its frozen weights have changed since",
    "code": "other code: a part that is registered has been edited since",
}
_AGAIN = "delete its folder to start this run again"


class Resumed(NamedTuple):
    """Where a training goes on: its step, 0 without a checkpoint, and the notes of the checkpoint."""

    step: int
    notes: dict[str, str]


def trainable(module: nn.Module, *, in_training: bool = False) -> dict[str, torch.Tensor]:
    """Trained parameters, frozen parts of adapters, and the state of prior, guide, weights and allocator, by name.

    in_training: without what is fitted when training has ended (Laplace's curvature), and with a teacher.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]  # PEFT's
    of_adapters = {id(p) for x in layers for part in x.adapter_layer_names for p in getattr(x, part).parameters()}
    found: dict[str, Tensor] = {
        name: p for name, p in module.named_parameters() if p.requires_grad or id(p) in of_adapters
    }
    parts = dict(module.named_modules())
    weights = parts.get("weights")
    if in_training and isinstance(weights, Weights) and weights.curvature:
        del parts["weights"]
    for name in ("prior", "gate_guide", "weights", "net.allocation", *(("teacher",) if in_training else ())):
        state = parts[name].state_dict(keep_vars=True) if name in parts else {}
        known = set(map(id, found.values()))  # a guide holds its prior too
        found |= {f"{name}.{key}": x for key, x in state.items() if id(x) not in known}
    return found


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and notes of a safetensors file, which its hash is compared with, where it has one.

    Errors: SafetensorError, OSError or ValueError for one that is damaged.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        notes = file.metadata()
    if notes is None:
        raise ValueError("it has no notes")
    if "notes" in notes:
        notes = json.loads(notes["notes"])
        if notes.pop("sha256", None) != _hash(tensors, notes):
            raise ValueError("its content is not what was written")
    return tensors, notes


def write_tensors(
    path: Path, tensors: dict[str, Tensor], notes: Mapping[str, str], rename: Callable[[], None] | None = None
) -> None:
    """Replace a file in one rename: a kill leaves the old one or the new one, never half of one.

    Equal content gives equal bytes: notes are one text, as safetensors writes several in any order.
    rename: called when the new file is whole on the disk, and the old one still has its name.
    """
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({**notes, "sha256": _hash(tensors, notes)}, sort_keys=True)
    replace(path, lambda partial: save_file(tensors, partial, metadata={"notes": text}), rename)


def _hash(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(notes), sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int,
    notes: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a checkpoint into `folder`; the one before it stays, under another name.

    Errors: ValueError where a number is not finite, and NotWritten; then nothing is changed.
    """
    tensors = {}
    for name, parameter in trainable(module, in_training=True).items():
        for key, value in {"parameter": parameter, **optimizer.state.get(parameter, {})}.items():
            x = tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
            fine = x.isfinite() if parameter.requires_grad else ~x.isnan()  # a prior's buffers pin gates at -infinity
            if not bool(fine.all()):
                raise ValueError(f"{key} of {name} is not finite")

    def rotate() -> None:
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder / NEWEST, folder / OLDER)

    write_tensors(folder / NEWEST, tensors, {**(notes or {}), "step": str(step), "total": str(total)}, rotate)


def load_checkpoint(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, total: int,
    identity: Mapping[str, str] | None = None, processes: int = 1,
) -> Resumed:  # fmt: skip
    """Restore what `save_checkpoint` wrote: the newest, or with a warning the one before it where that is damaged.

    Errors: ValueError where all are damaged, and for one of another configuration, of other data, another backbone or
    another number of processes, whose steps have other examples.
    """
    found = _newest_whole(folder)
    if found is None:
        return Resumed(0, {})
    path, tensors, notes = found
    require_same_origin(path, notes, identity)
    before = int(notes.get("processes", processes))  # older files have none
    if before != processes:
        raise ValueError(
            f"checkpoint {path} is of a run on {before} processes, this one has {processes}: resume on {before}, or "
            "delete its folder to start again"
        )
    step, expected = int(notes["step"]), int(notes["total"])
    if expected != total:  # the configuration is the same, or the folder would be another one
        raise ValueError(
            f"checkpoint {path} is of a run of {expected} steps, this one has {total}: resume on as many processes as "
            "it was started on, or delete its folder to start again"
        )
    parameters = trainable(module, in_training=True)
    if {f"parameter/{name}" for name in parameters} != {key for key in tensors if key.startswith("parameter/")}:
        raise ValueError(f"checkpoint {path} is of another model: {_AGAIN}")
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            parameter = parameters[name]
            if kind == "parameter":
                parameter.copy_(value)
            else:  # the fused step of AdamW takes all of its state, the step count too, from the parameter's device
                optimizer.state[parameter][kind] = value.to(parameter.device)
    return Resumed(step, notes)


def require_same_origin(path: Path, notes: Mapping[str, str], identity: Mapping[str, str] | None) -> None:
    """Errors: ValueError for notes of another training than `identity`; older files have no such notes."""
    for name, expected in (identity or {}).items():
        if notes.get(name, expected) != expected:
            raise ValueError(f"{path} is of {WHAT[name]}: restore that, or {_AGAIN}")


def _newest_whole(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]] | None:
    damaged = []
    for path in (folder / NEWEST, folder / OLDER):
        if not path.exists():
            continue
        try:
            tensors, notes = read_tensors(path)
            int(notes["step"]), int(notes["total"])
        except OSError as error:  # of the system, not of the file
            raise ValueError(f"checkpoint {path} cannot be read now ({error}): give the same command again") from None
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            damaged.append(f"checkpoint {path} is damaged ({' '.join(str(error).split())})")
            continue
        if damaged:
            warnings.warn(f"{damaged[0]}: going on from the one before it, at step {notes['step']}", stacklevel=3)
            (folder / NEWEST).unlink(missing_ok=True)  # or it would replace the whole one
        return path, tensors, notes
    if damaged:
        raise ValueError(f"{damaged[0]}: {_AGAIN}")
    return None


def saved_in(folder: Path) -> str | None:
    """One sentence on the newest checkpoint below a run's folder; None where there is none."""
    paths = [path for name in (NEWEST, OLDER) for path in folder.rglob(f"checkpoints/{name}")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(SafetensorError, OSError, KeyError, TypeError, ValueError):
            with safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["notes"])
            return f"step {notes['step']} of {notes['total']} is saved in {path}, from where the same command goes on"
    return None


def drop_older(folder: Path) -> None:
    """Remove the second checkpoint of a training that has ended."""
    (folder / OLDER).unlink(missing_ok=True)
