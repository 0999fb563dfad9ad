"""The section with the command that repeats a run."""

import json
import sys
from pathlib import Path

from ...config.command_line import command_line, of_scripts
from ...registries import CHOSEN, register_section
from ...tasks import get_task, register_task
from ..run_folder import RunFiles, Section

_IN_PYTHON = """{imports}from pathlib import Path

from pyro_blora import RunConfig, train_run

train_run(RunConfig.from_json(Path("config.json")))"""


@register_section("Repeat this run", place=100)
def repeat(run: RunFiles, title: str) -> Section:
    """The command that repeats the run, or what to import before, and the versions it had."""
    values = json.loads((run.folder / "config.json").read_text(encoding="utf-8")) if run.config else {}
    versions = ", ".join(f"{name} {version}" for name, version in values.get("versions", {}).items())
    threads = f", {values['threads']} threads" if "threads" in values else ""
    text = f"The same numbers again, with {versions} on {run.summary['device']}{threads}:"
    script = of_scripts(run.config)
    if not script:
        return Section(title, [text], code=command_line(run.config, run.folder / "config.json"))
    named = " and ".join(f"{kind} {name!r}" for kind, name in script)
    modules = sorted({_module(kind, name) for kind, name in script} - {""})
    why = (
        f"The {named} of this run was registered by a script, which the command line does not know: import "
        f"{'the script' if modules else 'the script that did it'} first, or put a function that returns it into a file "
        f"and name it as --{script[0][0]} file.py:function."
    )
    imports = "".join(f"import {name}  # registers {named}\n" for name in modules)
    return Section(title, [why, text], code=_IN_PYTHON.format(imports=imports))


def _module(kind: str, name: str) -> str:
    """The module that registers a part; "" where it is not registered here."""
    if name not in CHOSEN[kind].names():
        return ""
    found = CHOSEN[kind].entry(name).module
    if kind == "task" and found == register_task.__module__:  # a Task, not a function that makes one
        found = get_task(name).load.__module__
    return Path(getattr(sys.modules["__main__"], "__file__", "")).stem if found == "__main__" else found
