"""The parser of one command."""

import argparse
import functools
from typing import Any


def add_command(
    commands: Any, name: str, help_column: int, layout: type[argparse.HelpFormatter] = argparse.HelpFormatter,
    **texts: str,
) -> argparse.ArgumentParser:  # fmt: skip
    """A command of `pyro-blora`, whose flags are to be given whole.

    commands: of a parser, as `add_subparsers` gives them. layout: how its texts (help, usage, description, epilog) are
    broken into lines.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name, formatter_class=functools.partial(layout, max_help_position=help_column), allow_abbrev=False, **texts
    )
    return parser
