"""The section with the command that repeats a run."""

import json

from ...config.command_line import command_line
from ...registries import register_section
from ..run_folder import RunFiles, Section


@register_section("Repeat this run", place=100)
def repeat(run: RunFiles, title: str) -> Section:
    """The command that repeats the run, and the versions it had."""
    values = json.loads((run.folder / "config.json").read_text(encoding="utf-8")) if run.config else {}
    versions = ", ".join(f"{name} {version}" for name, version in values.get("versions", {}).items())
    threads = f", {values['threads']} threads" if "threads" in values else ""
    text = f"The same numbers again, with {versions} on {run.summary['device']}{threads}:"
    return Section(title, [text], code=command_line(run.config))
