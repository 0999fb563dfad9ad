"""Tasks by name: the nine of GLUE, the embedded demo `acceptability`, `pairs` from CSV, and those a user registers.

`get_task("sst2").load(glue_dir=...)` gives the data, `.likelihood(logits)` the law of the labels, `.metric()` the
score.
"""

from __future__ import annotations

from ..registry import suggest
from .base import Task
from .demo.acceptability import ACCEPTABILITY
from .glue import GLUE
from .multi_label import MultiLabel
from .pairs import PAIRS
from .token_labels import TokenLabels

__all__ = ["MultiLabel", "Task", "TokenLabels", "get_task", "register_task", "task_names"]

_TASKS: dict[str, Task] = {task.name: task for task in (ACCEPTABILITY, *GLUE, PAIRS)}


def task_names() -> tuple[str, ...]:
    return tuple(_TASKS)


def get_task(name: str) -> Task:
    """The task of that name; ValueError with the nearest known name otherwise."""
    if name in _TASKS:
        return _TASKS[name]
    raise ValueError(f"unknown task {name!r}: {suggest(name, _TASKS)}")


def register_task(task: Task) -> Task:
    """Make a task known by its name, and return it; a name is given once.

    Errors: ValueError for a name that is taken, and for what would otherwise fail when a training has ended.
    """
    if not isinstance(task, Task):
        raise ValueError(f"register_task takes a Task, got {type(task).__name__}: Task(name=..., load=..., ...)")
    task.require_usable()
    if _TASKS.get(task.name, task) != task:
        raise ValueError(f"the task name {task.name!r} is taken: give the new task another name")
    _TASKS[task.name] = task
    return task
