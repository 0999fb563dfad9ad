"""What can be chosen by name, in words: lists of methods and registered parts, with their settings. No torch."""

import textwrap

from ..registries import CHOSEN, LISTED
from ..registry import REQUIRED
from ..user_values import spelled
from .methods import METHODS

LISTS = {  # of LISTED, what each is a list of
    "priors": "priors of the gates", "guides": "guides, variational families of the gates",
    "adapters": "adapters, what learns beside the head", "weights": "distributions of the adapter's weights",
    "elbos": "ELBOs, whose names --estimator takes", "tasks": "tasks, with texts, labels and metrics",
    "likelihoods": "likelihoods, kinds of outcome that a task may have", "sections": "sections of a report",
}  # fmt: skip
_SITES = (
    "--prior.z NAME or --prior.g NAME gives the bit gates or the rank gates a separate prior, --prior.z.SETTING "
    "VALUE its settings; the name `off` opens them for good."
)


def choices() -> str:
    """What can be chosen by name."""
    lines = ["methods:", *(f"  {name:14s} {method.line}" for name, method in METHODS.items())]
    for kind, registry in CHOSEN.items():
        command = next(name for name, listed in LISTED.items() if listed is registry)
        lines += ["", f"{command}, with their settings (--{kind}.NAME VALUE; `pyro-blora {command}` lists them):"]
        for entry in registry.entries():
            shown = ", ".join(f"{name}={default!r}" for name, default in entry.settings.items())
            lines.append(f"  {entry.name:14s} {entry.line}{f' ({shown})' if shown else ''}")
    return "\n".join([*lines, "", *textwrap.wrap(_SITES, 100)])


def print_methods() -> None:
    for name, method in METHODS.items():
        print(f"{name:14s} {method.line}")
        for verb, flags in (("sets", method.fixes), ("proposes", method.proposes)):
            if flags:
                print(f"{'':14s}   {verb} {' '.join(f'--{flag} {spelled(value)}' for flag, value in flags.items())}")


def print_list(command: str) -> None:
    """The names of a kind, with their settings."""
    if command == "tasks":
        from ..tasks import get_task  # what is learned is known to the task itself

    registry = LISTED[command]
    width = max(14, *map(len, registry.names()))
    for entry in registry.entries():
        print(f"{entry.name:{width}s} {entry.line}")
        if command == "tasks" and REQUIRED not in entry.settings.values():  # of others, the data says it
            task = get_task(entry.name)
            print(f"{'':14s}   {' and '.join(task.text_columns)}; {task.metric_name}; {task.allowed_labels}")
        for setting, default in entry.settings.items():
            shown = "required" if default is REQUIRED else f"default: {default}"
            print(f"{'':14s}   --{registry.kind}.{setting} VALUE ({shown})")
    if command == "priors":
        print(_SITES)
