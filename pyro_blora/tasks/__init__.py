"""Tasks by name: the nine of GLUE, the embedded demo `acceptability`, a user's `files`, and those a user registers.

`get_task("sst2").load(glue_dir=...)` gives the data, `.likelihood(logits)` the distribution of the labels, `.metric()`
the score.
"""

from ..registries import TASKS
from .base import Task
from .causal_lm import CausalLM
from .multi_label import MultiLabel
from .multiple_choice import MultipleChoice
from .names import get_task, register_task, task_names
from .spans import Spans
from .tabular.task import from_frame
from .token_labels import TokenLabels

__all__ = [
    "TASKS",
    "CausalLM",
    "MultiLabel",
    "MultipleChoice",
    "Spans",
    "Task",
    "TokenLabels",
    "from_frame",
    "get_task",
    "register_task",
    "task_names",
]
