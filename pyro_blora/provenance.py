"""Which files of a run belong together: hashes of gates, adapter, configuration and frozen weights.

`export` puts them into the notes of gates.safetensors; `load` compares them, and names the file of another run.
"""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .checkpoint import trainable
from .config.naming import digest, functions_of, is_local, portable, without_path
from .config.run_config import RunConfig
from .user_code import content_in_use, content_of, may_run

_CONFIGS = ("adapter_config.json", "config.json")
_FREE = ("base_model_name_or_path", "revision", "_name_or_path")  # where a user keeps the backbone: theirs to change
_RESTORE = "restore the run folder from a copy"


def notes_of(program: torch.nn.Module, folder: Path, config: RunConfig | None) -> dict[str, str]:
    """Hashes of an export's other files and of what is frozen.

    Of a configuration also what a program is loaded by, its hash, and those of the users' files that it names. No path.
    """
    notes = {"files": _of_files(folder), "backbone": frozen_hash(program)}
    if config is None:
        return notes
    values = dataclasses.asdict(config)
    code = [content_in_use(name) or content_of(name) for name in functions_of(values)]  # as it ran, if edited since
    return notes | {
        "config": digest(values, code), "run": json.dumps(portable(values), sort_keys=True),
        "code": json.dumps(code),
        "local_backbone": without_path(config.backbone) if is_local(config.backbone) else "",
    }  # fmt: skip


def warn_unchecked(path: Path, notes: Mapping[str, str]) -> None:
    """Warn of a file that was written before there were hashes."""
    if "files" not in notes:
        warnings.warn(
            f"{path} is older than the hashes by which a run's files are checked: they may be of different runs; "
            "export(load(RUN), FOLDER) writes a checked one",
            stacklevel=3,
        )


def require_belonging(path: Path, notes: Mapping[str, str], config: RunConfig, *, from_notes: bool = False) -> None:
    """Errors: ValueError where the configuration or the adapter is not that of the gates at `path`.

    Of users' files only those have to be as they were that may run here. from_notes: the configuration was in them.
    """
    values, code = dataclasses.asdict(config), json.loads(notes.get("code", "[]"))
    names = functions_of(values)
    if len(code) != len(names):  # older files have none
        code = []
    found = notes.get("config") if from_notes else digest(values, code)
    ran = [(name, was) for name, was in zip(names, code, strict=False) if may_run(name)]
    if notes.get("config", found) != found or any(content_of(name) != was for name, was in ran):
        raise ValueError(
            f"config.json is not that of {path}: it is of another run, was edited, or names code that was edited or "
            f"moved: {_RESTORE}"
        )
    if "files" in notes and notes["files"] != _of_files(path.parent):
        raise ValueError(
            f"the adapter in {path.parent} is not that of {path.name}: it is damaged or of another run: {_RESTORE}"
        )


def require_backbone(program: torch.nn.Module, notes: Mapping[str, str], config: RunConfig) -> None:
    """Errors: ValueError where the frozen weights are not those of the training."""
    if "backbone" in notes and notes["backbone"] != frozen_hash(program):
        raise ValueError(
            f"backbone {config.backbone!r} is not the one that the run was trained on, its weights differ: restore it"
        )


def _of_files(folder: Path) -> str:
    """A hash of weights and vocabulary, and of their configuration."""
    lines = []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]):
        if path.name != "gates.safetensors":
            with path.open("rb") as file:
                lines.append(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    for path in (folder / name for name in _CONFIGS):
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                lines.append(json.dumps({k: x for k, x in values.items() if k not in _FREE}, sort_keys=True))
            except (ValueError, AttributeError):
                lines.append("damaged")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@torch.no_grad()
def frozen_hash(program: torch.nn.Module) -> str:
    """Of the network's parameters that are in no file of the run, by name, dtype and shape.

    Not of PEFT's copy of the head as it was: nothing reads it, and it was drawn, which not every processor does alike.
    """
    learned = {id(p) for p in trainable(program).values()}
    frozen = {
        name: p for name, p in sorted(program.get_submodule("net").named_parameters())
        if id(p) not in learned and ".original_module." not in name
    }  # fmt: skip
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:  # hashing lets other threads run
        each = pool.map(_of_tensor, frozen.values())
        lines = [f"{name} {tuple(p.shape)} {p.dtype} {x}" for (name, p), x in zip(frozen.items(), each, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _of_tensor(x: torch.Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
