"""The trained program of a run folder, with its hashes checked."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..build import build_program, check_names
from ..checkpoint import read_tensors, trainable
from ..config.run_config import RunConfig
from ..layout import AdapterLayout
from ..program import BayesianLoRA
from ..provenance import require_backbone, require_belonging, warn_unchecked
from ..user_code import only_code
from .peft import GATES_FILE


def load(run: str | Path, *, n_train: int | None = None, allow_code: Iterable[str] = ()) -> BayesianLoRA:
    """The trained program of a run folder, ready to draw, predict or go on.

    allow_code: functions in files (`mine.py:late`) that config.json names and that may run: parts, backbone.
    Errors: ValueError for a folder that is no finished run, whose files are damaged or belong to another model, or
    that names code which is not allowed.
    """
    run = Path(run)
    path = run / "adapter" / GATES_FILE
    if not (run / "config.json").is_file() or not path.is_file():
        raise ValueError(f"{run} is not a finished run: it has no config.json with adapter/{GATES_FILE}")
    config = RunConfig.from_json(run / "config.json")
    try:
        tensors, notes = read_tensors(path)
        layout, rows = AdapterLayout.from_dict(json.loads(notes["layout"])), int(notes["n_train"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore the run folder from a copy") from None
    warn_unchecked(path, notes)
    with torch.random.fork_rng(devices=[]), only_code(allow_code, run / "config.json"):
        task = check_names(config)
        require_belonging(path, notes, config)
        torch.manual_seed(config.seed)  # what the checkpoint of the backbone lacked was drawn, and may be frozen
        read_from = dataclasses.replace(config, backbone_revision=_commit(run) or config.backbone_revision)
        program = build_program(read_from, task, n_train or rows, layout)
    parameters = trainable(program)
    if program.net.layout != layout or set(parameters) != set(tensors):
        raise ValueError(
            f"{path} does not fit the model that config.json describes: restore the run folder from a copy"
        )
    require_backbone(program, notes, config)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return program.eval()


def _commit(run: Path) -> str | None:
    """The commit of the hub's that the run's backbone was read from."""
    found = json.loads((run / "config.json").read_text(encoding="utf-8")).get("versions")
    return found.get("backbone") if isinstance(found, dict) else None
