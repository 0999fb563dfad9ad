"""Tasks by name: those of this folder, those a user registers, and functions in files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

from ..registries import TASKS
from ..registry import REQUIRED, Maker
from .base import Task


class _Given:
    """A function that returns a task which a user has given."""

    def __init__(self, task: Task):
        self.task, self.__doc__ = task, task.__doc__

    def __call__(self) -> Task:
        return self.task


_MADE: dict[tuple[Callable[..., Task], str], tuple[str, Task]] = {}  # once, of the same files: (their state, the task)


def make_anew() -> None:
    """Users' functions are called again for their tasks, as they may read files: every run reads what is there."""
    for key in [key for key in _MADE if not key[0].__module__.startswith(f"{__package__}.")]:
        del _MADE[key]


def task_names() -> tuple[str, ...]:
    return tuple(TASKS.names())


def get_task(name: str | Callable[..., Task], settings: Mapping[str, Any] | None = None) -> Task:
    """The task of that name, or of a function in a file, with its settings.

    Errors: ValueError with the nearest known name, for a wrong setting, and for a user's that is no usable task.
    """
    make = TASKS.resolve(name)
    given = TASKS.settings(make, settings or {})
    key, state = (make, json.dumps(given, sort_keys=True, default=repr)), _state_of(given)
    if key not in _MADE or _MADE[key][0] != state:
        task = make(**given)
        if not isinstance(task, Task):
            found = type(task).__name__
            raise ValueError(
                f"task {TASKS.called(name)!r} must return a Task, got {found}: return Task(name=..., load=..., ...)"
            )
        if not make.__module__.startswith(f"{__package__}."):
            task.require_usable()
        _MADE[key] = state, task
    return _MADE[key][1]


def _state_of(settings: Mapping[str, Any]) -> str:
    """Sizes and times of the files that settings name, and of those in folders: of changed ones a task is made anew."""
    found = []
    for value in settings.values():
        with contextlib.suppress(OSError, ValueError):  # a text that can be no path
            path = Path(value).expanduser() if isinstance(value, str) and value else None
            for file in [] if path is None else [path, *path.glob("*"), *path.glob("*/*")]:
                state = file.stat()
                found.append((str(file), state.st_size, state.st_mtime_ns))
    return repr(sorted(found))


@overload
def register_task(task: Task) -> Task: ...


@overload
def register_task(task: str | None = None, **declared: Any) -> Callable[[Maker], Maker]: ...


@overload
def register_task(task: Maker) -> Maker: ...


def register_task(task: Any = None, **declared: Any) -> Any:
    """Make a task known by its name: a `Task`, or as a decorator the function that returns it.

    A `Task` takes the place of one that was given before, as where a notebook's cell runs again.
    declared: what else `registry_entries.Entry` has.

    Errors: ValueError for a name that a task of the package or of a function has, and for what would otherwise fail
    when a training has ended.
    """
    if task is None or isinstance(task, str) or (callable(task) and not isinstance(task, type)):
        return TASKS.register(task, **declared)
    if not isinstance(task, Task):
        raise ValueError(f"register_task takes a Task, got {type(task).__name__}: Task(name=..., load=..., ...)")
    task.require_usable()
    if task.name in TASKS.names() and not isinstance(TASKS.resolve(task.name), _Given):
        if REQUIRED in TASKS.entry(task.name).settings.values() or get_task(task.name) != task:
            raise ValueError(f"the task name {task.name!r} is taken: give the new task another name")
        return task
    TASKS.forget(task.name)
    TASKS.register(task.name)(_Given(task))
    return task
