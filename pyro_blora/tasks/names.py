"""Tasks by name: those of this folder, those a user registers, and functions in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from ..registries import TASKS
from .base import Task

Make = TypeVar("Make", bound=Callable[..., Task])
_MADE: dict[tuple[Callable, str], Task] = {}  # once: a task is itself whoever asks


def task_names() -> tuple[str, ...]:
    return tuple(TASKS.names())


def get_task(name: str | Callable[..., Task], settings: Mapping[str, Any] | None = None) -> Task:
    """The task of that name, or of a function in a file, with its settings.

    Errors: ValueError with the nearest known name, for a wrong setting, and for a user's that is no usable task.
    """
    make = TASKS.resolve(name)
    given = TASKS.settings(make, settings or {})
    key = make, json.dumps(given, sort_keys=True, default=repr)
    if key not in _MADE:
        task = make(**given)
        if not isinstance(task, Task):
            found = type(task).__name__
            raise ValueError(
                f"task {TASKS.called(name)!r} must return a Task, got {found}: return Task(name=..., load=..., ...)"
            )
        if not make.__module__.startswith(f"{__package__}."):
            task.require_usable()
        _MADE[key] = task
    return _MADE[key]


@overload
def register_task(task: Task) -> Task: ...


@overload
def register_task(task: Make) -> Make: ...


@overload
def register_task(task: str | None = None) -> Callable[[Make], Make]: ...


def register_task(task: Task | str | Callable | None = None) -> Any:
    """Make a task known by its name, which is given once: a `Task`, or as a decorator the function that returns it.

    Errors: ValueError for a name that is taken, and for what would otherwise fail when a training has ended.
    """
    if task is None or isinstance(task, str) or (callable(task) and not isinstance(task, type)):
        return TASKS.register(task)
    if not isinstance(task, Task):
        raise ValueError(f"register_task takes a Task, got {type(task).__name__}: Task(name=..., load=..., ...)")
    task.require_usable()
    if task.name in TASKS.names():
        if get_task(task.name) != task:
            raise ValueError(f"the task name {task.name!r} is taken: give the new task another name")
        return task

    def given() -> Task:
        return task

    TASKS.register(task.name)(given)
    return task
