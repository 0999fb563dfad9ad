"""By what a run's folder is found again: a digest of all that decides its results, and safe names of files."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bit_widths import LADDER, written
from ..registries import CHOSEN, TASKS, WEIGHTS
from ..user_code import content_of, file_of, is_of_file

# Left out of the digest: they set where and how a run is logged and saved, not what it computes.
NOT_IN_DIGEST = ("output_dir", "tracker", "checkpoint_steps", "checkpoint_minutes")
OUR_BACKBONES = ("demo", "demo-deberta", "demo-decoder")  # carried by packages, whatever folders there are
_OF_DATA = ("task_settings", "glue_dir", "ood_task")
# Newer fields: default values are left out of the digest, for compatibility.
_ADDED: tuple[tuple[str, Any], ...] = (
    ("data_seed", None), ("restarts", 1), ("share_inputs", False), ("adapter_settings", {}), ("weights", "point"),
    ("weights_settings", {}), ("validation", 0.0), ("choose_epoch", False), ("ood_task", None),
    ("group_by_length", False), ("backbone_revision", None), ("max_skipped_steps", 10), ("estimator_settings", {}),
    ("task_settings", {}), ("gate_optimizer", "auto"), ("gated_dropout", None), ("bit_widths", written(LADDER)),
    ("granularity", "tensor"), ("distillation", 0.0), ("smoothing", False),
    ("embedding_bits", 32), ("rest", 0.0), ("settle", 0.0),
)  # fmt: skip


def digest(config: Mapping[str, Any], contents: Sequence[str] = ()) -> str:
    """Eight hexadecimal digits that two configurations, as tables, share only if they compute the same.

    contents: of the files behind `functions_of`, as `content_of` gives them, in place of those that are there now.
    """
    values = {key: value for key, value in config.items() if key not in NOT_IN_DIGEST}
    values = {key: value for key, value in values.items() if (key, value) not in _ADDED}
    for owner in (f"{owner}_settings" for owner in CHOSEN):  # 3 and 3.0 are the same setting
        if owner in values:
            values[owner] = {k: float(v) if _is_exact(v) else v for k, v in values[owner].items()}
    known = dict(zip(functions_of(config), contents, strict=True)) if contents else {}
    for table, key in _naming(values, config["weights"]):
        name = table[key]
        content = known.get(name, content_of(name))
        table[key] = f"{name} {content}" if content else name
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def _is_exact(value: Any) -> bool:
    """Whether it is a whole number that a float holds."""
    return type(value) is int and abs(value) <= 2**53


def functions_of(config: Mapping[str, Any]) -> list[str]:
    """The names of functions in users' files that a configuration has, in the order of its fields."""
    names = (table[key] for table, key in _naming(config, config["weights"]))
    return [name for name in names if is_of_file(name)]


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a trained program is loaded by, with no path of this machine: nothing of data, names without folders."""
    values = {key: value for key, value in config.items() if key not in (*NOT_IN_DIGEST, *_OF_DATA)}
    for table, key in _naming(values, config["weights"]):
        table[key] = without_path(table[key])
    return values


def without_path(name: str) -> str:
    """The name of a file's function, or of what is in a folder, without where that is."""
    if is_of_file(name):
        file, attribute = file_of(name)
        return f"{file.name}:{attribute}"
    return Path(name).expanduser().resolve().name if is_local(name) else name


def is_local(name: str) -> bool:
    """Whether a name, of a backbone, is that of a folder."""
    path = Path(name).expanduser()
    if name in OUR_BACKBONES:
        return False
    return path.is_absolute() or name.startswith((".", "~")) or path.is_dir()


def _naming(config: Any, weights: str) -> Iterator[tuple[Any, str]]:
    """(table, key) of every name of a part; weights: the name of the run's."""
    yield from ((config, key) for key in (*CHOSEN, "backbone", "ood_task") if config.get(key))
    for owner, inside in (("prior", ("z", "g")), ("weights", (WEIGHTS.entry(weights).each,))):
        own = config.get(f"{owner}_settings", {})  # that name parts in turn
        yield from ((own, key) for key in inside if isinstance(own.get(key), str))


def named_after(task: str, settings: Mapping[str, Any]) -> str:
    """The name of the file that a task reads, where a setting names it (of `train.csv` its folder's), or the task's."""
    path = Path(str(settings.get(TASKS.entry(task).named_after) or ""))
    return basename((path.parent.name if path.stem == "train" and path.parent.name else path.stem) or task)


def task_called(task: str, settings: Mapping[str, Any]) -> str:
    """What summary and page call a task: by the file that it reads, as the run's folder is, or by its name."""
    return named_after(task, settings) if TASKS.entry(task).named_after else task


def basename(name: str) -> str:
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._]", "_", last).strip(".") or "local"
