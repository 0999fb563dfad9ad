"""By what a run's folder is found again: a digest of all that decides its results, and safe names of files."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..registries import CHOSEN, TASKS, WEIGHTS
from ..user_code import file_of

# Left out of the digest: they set where and how a run is logged and saved, not what it computes.
NOT_IN_DIGEST = ("output_dir", "tracker", "checkpoint_steps", "checkpoint_minutes")
# Newer fields: default values are left out of the digest, for compatibility.
_ADDED: tuple[tuple[str, Any], ...] = (
    ("data_seed", None), ("restarts", 1), ("share_inputs", False), ("adapter_settings", {}), ("weights", "point"),
    ("weights_settings", {}), ("validation", 0.0), ("choose_epoch", False), ("ood_task", None),
    ("group_by_length", False), ("backbone_revision", None), ("max_skipped_steps", 10), ("estimator_settings", {}),
    ("task_settings", {}),
)  # fmt: skip


def digest(config: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that two configurations, as tables, share only if they compute the same."""
    values = {key: value for key, value in config.items() if key not in NOT_IN_DIGEST}
    values = {key: value for key, value in values.items() if (key, value) not in _ADDED}
    for owner in (f"{owner}_settings" for owner in CHOSEN):  # 3 and 3.0 are the same setting
        if owner in values:
            values[owner] = {k: float(v) if type(v) is int else v for k, v in values[owner].items()}
    values |= {x: _with_content(values[x]) for x in (*CHOSEN, "backbone", "ood_task") if values.get(x)}
    for owner, inside in (("prior", ("z", "g")), ("weights", (WEIGHTS.entry(config["weights"]).each,))):
        own = values.get(f"{owner}_settings", {})  # that name parts in turn
        own |= {key: _with_content(own[key]) for key in inside if isinstance(own.get(key), str)}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def _with_content(name: str) -> str:
    """A part in a user's file is identified by the file's content, not by its name."""
    file, _ = file_of(name)
    return f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}" if file.is_file() else name


def named_after(task: str, settings: Mapping[str, Any]) -> str:
    """The name of the file that a task reads, where a setting names it (of `train.csv` its folder's), or the task's."""
    path = Path(str(settings.get(TASKS.entry(task).named_after) or ""))
    return basename((path.parent.name if path.stem == "train" and path.parent.name else path.stem) or task)


def basename(name: str) -> str:
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._]", "_", last).strip(".") or "local"
