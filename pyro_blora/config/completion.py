"""Completion of `pyro-blora` in a shell, by argcomplete: names, choices, settings and folders, without torch.

The shell starts `pyro-blora` itself, with variables that argcomplete reads. It knows the flags from the parser; here it
learns what their values may be, and which settings a part has that is chosen on the line.
"""

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Iterable

from ..registries import CHOSEN
from .checks import CHOICES
from .command_line import preset_names, read_preset
from .methods import METHODS
from .naming import OUR_BACKBONES
from .run_config import OWNERS, RunConfig

_FLAG = re.compile(r"--(\w+)[ =]+([^-\s]\S*)")  # of a line, with its value


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, and end the process; do nothing else."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete
    from argcomplete.completers import ChoicesCompleter, DirectoriesCompleter, FilesCompleter

    def named(values: Iterable[str]) -> Callable:
        """Names, or else files that have some."""
        files = FilesCompleter((".py", ".yaml"))
        return lambda prefix, **_: [name for name in values if name.startswith(prefix)] or files(prefix)

    (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    _add_settings(commands["train"], os.environ.get("COMP_LINE", ""))
    for action in (action for command in commands.values() for action in command._actions):
        if values := _values(action):
            action.completer = named(values)
        elif action.metavar == "FILE":
            action.completer = FilesCompleter()
        elif action.metavar == "FOLDER" or action.dest == "run":
            action.completer = DirectoriesCompleter()
    argcomplete.autocomplete(parser, always_complete_options="long", default_completer=ChoicesCompleter({}))


def _values(action: argparse.Action) -> Iterable[str]:
    """What the value of a flag may be, where that is a list."""
    if action.metavar == "{true,false}":
        return ("true", "false")
    if action.dest == "preset":
        return preset_names()
    if action.dest == "backbone":
        return OUR_BACKBONES
    if action.dest in ("prior.z", "prior.g"):
        return [*_registered("prior"), "off"]
    return CHOICES.get(action.dest) or _registered(action.dest) or ()


def _add_settings(train: argparse.ArgumentParser, line: str) -> None:
    """Flags for the settings of prior, guide, adapter and weights: as the line, its preset or the defaults choose."""
    given, chosen = dict(_FLAG.findall(line)), {}
    with contextlib.suppress(ValueError):  # there is no such preset
        chosen = read_preset(given["preset"]) if "preset" in given else {}
    for owner in OWNERS:
        name = given.get(owner, chosen.get(owner, RunConfig.__dataclass_fields__[owner].default))
        for setting in CHOSEN[owner].entry(os.path.expanduser(name)).settings if name else ():
            train.add_argument(f"--{owner}.{setting}")
    train.add_argument("--prior.z")
    train.add_argument("--prior.g")


def _registered(kind: str) -> dict[str, list[str]]:
    """The settings of every name of a kind."""
    if kind == "method":
        return {name: [] for name in METHODS}
    return {entry.name: [*entry.settings] for entry in CHOSEN[kind].entries()} if kind in CHOSEN else {}
