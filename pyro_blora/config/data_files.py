"""The files that a task's settings name, as `--data` does: hashes of what a run read, and whether that is there still.

A run's folder is found again by its configuration, which has the names of such files. So a finished run keeps their
hashes, and is not taken for one of other rows.
"""

import functools
import hashlib
from pathlib import Path

from ..user_files import read_json
from .run_config import RunConfig

KEY = "data_files"  # of summary.json


def data_hashes(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each file that is a setting of the task, by the setting's name; folders and hub names have none."""
    found = {}
    for name, value in config.task_settings.items():
        if isinstance(value, str) and (path := Path(value).expanduser()).is_file():
            state = path.stat()
            found[name] = _hash(path, state.st_size, state.st_mtime_ns)
    return found


@functools.lru_cache
def _hash(path: Path, size: int, changed: int) -> str:
    """Of a file of that size and time of its last change; a grid asks it for each of its runs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_same_data(folder: Path, config: RunConfig) -> None:
    """Errors: ValueError where a file that the finished run in the folder has read is another one now."""
    summary, now = read_json(folder / "summary.json"), data_hashes(config)
    before = summary.get(KEY, {}) if isinstance(summary, dict) else {}
    changed = [config.task_settings[name] for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        raise ValueError(
            f"{folder} is a finished run of {' and '.join(changed)} as it was before it changed: give another "
            "--output_dir to train on what is in it now, or move that run away"
        )
