"""Cells of a study: runs of `pyro-blora train` that share the part of training in which nothing is random yet.

Until the gates start, a run does not depend on its prior or guide: it is plain LoRA. So the LoRA of a task and seed is
trained once, and each cell resumes from its checkpoint, through the same bits as if it had been trained alone. Finished
cells are kept, an interrupted one resumes.
"""

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from pyro_blora.build import build
from pyro_blora.checkpoint import trainable
from pyro_blora.config import RunConfig
from pyro_blora.run import train_run
from pyro_blora.training import Schedule, fit

CHECKPOINT = Path("checkpoints/state.safetensors")


def folder_of(config: RunConfig) -> Path:
    return Path(config.output_dir) / config.folder_name


def finished(config: RunConfig, lora: RunConfig, n_train: int) -> dict:
    """The summary of a cell, trained from the shared LoRA if it is not there."""
    folder = folder_of(config)
    partial = folder.with_name(f".{folder.name}.partial")
    if not folder.exists():
        if not partial.exists():
            warm(config, trunk(lora, Schedule.of(config, n_train)), partial)
        train_run(config)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def trunk(lora: RunConfig, schedule: Schedule) -> Path:
    """The checkpoint of `lora` at the step where the gates of `schedule` start, going on from an earlier one."""
    steps = min(schedule.opening, schedule.steps - 1)
    root = Path(lora.output_dir) / f".trunk-{lora.folder_name}"
    folder = root / str(steps)
    if not (folder / CHECKPOINT).exists():
        earlier = [int(path.name) for path in root.glob("[0-9]*") if int(path.name) < steps]
        if earlier and not folder.exists():
            shutil.copytree(root / str(max(earlier)), folder)
        fit(lora, folder=folder, until=steps)
    return folder / CHECKPOINT


def warm(config: RunConfig, source: Path, partial: Path) -> None:
    """Put a state of LoRA where the run of `config` resumes: until then both are the same."""
    program = build(config).program
    shared = {name for name in trainable(program) if name.startswith("net.") or name == "log_scale"}
    with safe_open(source, framework="pt") as file:
        notes = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys() if key.partition("/")[2] in shared}  # noqa: SIM118 (not a dict)
    own = {f"parameter/{name}": x.detach().clone() for name, x in trainable(program).items() if name not in shared}
    (partial / CHECKPOINT).parent.mkdir(parents=True)
    waiting = partial / CHECKPOINT.with_suffix(".tmp")
    save_file(tensors | own, waiting, metadata=notes)
    waiting.rename(partial / CHECKPOINT)
