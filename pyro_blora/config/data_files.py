"""The files and folders that a run reads, as of `--data`: hashes of what it read, and whether that is there still.

A run's folder is found again by its configuration, which has the names of such files. So a finished run keeps their
hashes, and is not taken for one of other rows.
"""

import functools
import hashlib
from pathlib import Path

from ..registries import TASKS
from ..user_files import read_json
from .naming import is_local
from .run_config import RunConfig

KEY, GLUE, BACKBONE = "data_files", "glue_dir", "backbone"  # of summary.json; fields
_NO_DATA = (".", "cache-")  # how such files' names begin


def data_hashes(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each file and folder that a setting of the task names, by the setting's name; hub names have none.

    Of folders those that a flag for data names have one, of all files in them, and --glue_dir of the files that stand
    directly in it, as those of task `pairs` do, or in its folder of the task (SST-2 of sst2); not of hidden ones, and
    what `datasets` caches beside its own. A backbone in a folder has one of the files in it.
    """
    places = {name for name, text in TASKS.entry(config.task).flags.items() if text.startswith(("FILE ", "FOLDER "))}
    found = {}
    for name, value in (config.task_settings | {GLUE: config.glue_dir}).items():
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        if path is not None and path.is_file():
            found[name] = _of_file(path)
        elif path is not None and path.is_dir() and name in places | {GLUE}:
            inside = sorted(_of_glue(path, {config.task, config.ood_task}) if name == GLUE else path.glob("**/*"))
            found |= _of_files(name, path, inside)
    if is_local(config.backbone) and (folder := Path(config.backbone).expanduser()).is_dir():
        found |= _of_files(BACKBONE, folder, sorted(folder.iterdir()))
    return found


def _of_files(name: str, folder: Path, inside: list[Path]) -> dict[str, str]:
    files = [file for file in inside if file.is_file() and not file.name.startswith(_NO_DATA)]
    lines = "".join(f"{_of_file(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    return {name: hashlib.sha256(lines.encode()).hexdigest()} if files else {}


def _of_glue(folder: Path, tasks: set[str | None]) -> list[Path]:
    of_tasks = [x for x in folder.iterdir() if x.is_dir() and x.name.lower().replace("-", "") in tasks]
    return [*folder.iterdir(), *(file for one in of_tasks for file in one.iterdir())]


def _of_file(path: Path) -> str:
    state = path.stat()
    return _hash(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _hash(path: Path, size: int, changed: int) -> str:
    """Of a file of that size and time of its last change; a grid asks it for each of its runs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_same_data(folder: Path, config: RunConfig) -> None:
    """Errors: ValueError where a file that the finished run in the folder has read is another one now."""
    summary, now = read_json(folder / "summary.json"), data_hashes(config)
    before = summary.get(KEY, {}) if isinstance(summary, dict) else {}
    named = config.task_settings | {GLUE: config.glue_dir, BACKBONE: config.backbone}
    changed = [named[name] for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        raise ValueError(
            f"{folder} is a finished run of {' and '.join(changed)} as it was before it changed: give another "
            "--output_dir to train on what is in it now, or move that run away"
        )
