"""The command `pyro-blora measure-costs` and its flags."""

import argparse
from typing import Any

from ..bit_widths import LADDER, written
from .command_parser import add_command


def add_measure_command(commands: Any, help_column: int) -> None:
    """The command with its flags, to the commands of a parser."""
    parser = add_command(
        commands,
        "measure-costs",
        help_column,
        help="measure this machine's times for --prior.cost latency",
        usage="pyro-blora measure-costs --to FILE [--FLAG VALUE ...]",
        description="Measure in onnxruntime how long this machine takes for the products of a backbone at every width, "
        "and write the table that --prior budget --prior.cost latency --prior.costs FILE reads. About a minute.",
    )
    add = parser.add_argument
    add("--to", metavar="FILE", required=True, help="a new JSON file")
    add("--backbone", default="demo", help="whose linear maps: demo, a folder, or a name on the hub (default: demo)")
    add("--rank", type=int, default=8, help="of the adapters (default: 8)")
    add("--bit_widths", default=written(LADDER), help=f"of the ladder (default: {written(LADDER)})")
    add("--batch", metavar="TEXTS", type=int, default=8, help="in a forward (default: 8)")
    add("--length", metavar="TOKENS", type=int, default=128, help="of a text (default: 128)")
    add("--threads", type=int, default=1, help="of onnxruntime (default: 1)")
    add("--quiet", action="store_true", help="print nothing but the file, and errors")


def measure_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `deploy.measuring.measure_costs` takes of them."""
    return {name: value for name, value in vars(arguments).items() if name not in ("command", "quiet")}
