"""The command `pyro-blora push` and its flags."""

import argparse
from typing import Any

from .command_parser import add_command


def add_push_command(commands: Any, help_column: int) -> None:
    """The command with its flags, to the commands of a parser."""
    parser = add_command(
        commands,
        "push",
        help_column,
        help="send a run's adapter, or an exported folder, to the hub",
        usage="pyro-blora push RUN USER/NAME [--private] [--revision BRANCH]",
        description="Send a run's adapter with its posterior, or a folder of `pyro-blora export` as it is, to the hub.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a finished run, or an exported folder")
    add("name", metavar="USER/NAME", help="of the model on the hub, which is made if it is new")
    add("--private", action="store_true", help="make a new model private")
    add("--revision", metavar="BRANCH", help="to push to, made if it is new (default: main)")
    add("--backbone", metavar="PATH", help="where a run's backbone is now, if not where it was")
    add("--allow_code", metavar="FILE.PY:NAME", action="append", default=[], help="a function in a file that the run "
        "names and that may run; repeatable")  # fmt: skip
    add("--quiet", action="store_true", help="print nothing but the address, and errors")


def push_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `deploy.push` takes of them."""
    return {name: value for name, value in vars(arguments).items() if name not in ("command", "quiet")}
