"""The command `pyro-blora export` and its flags."""

import argparse
from typing import Any

from .command_parser import add_command

FORMATS = {
    "packed": "the deployed low-bit model in as many bits as were learned, for pyro_blora.load",
    "onnx": "the same for onnxruntime, on int8 kernels where both factors have 8 bit or fewer",
    "peft": "an adapter of PEFT, over a base of 32 bit",
    "merged": "a model of transformers at 32 bit, with the adapter in its weights",
}
_OF_FORMATS = {  # what only some formats take: (its value where it is not given, the formats, in words)
    "base": ("packed", ("packed",), "--base reference"), "merge": (False, ("packed",), "--merge"),
    "embeddings": (32, ("packed",), "--embeddings"), "fast": (False, ("onnx",), "--fast"),
    "small": (False, ("onnx",), "--small"), "draws": (None, ("peft",), "--draws"),
}  # fmt: skip


def add_export_command(commands: Any, help_column: int) -> None:
    """The command with its flags, to the commands of a parser."""
    parser = add_command(
        commands,
        "export",
        help_column,
        argparse.RawDescriptionHelpFormatter,
        help="write what a run has learned as a model or an adapter",
        usage="pyro-blora export RUN --to FOLDER [--format NAME] [--FLAG VALUE ...]",
        description="Write what a run has learned to a new folder, read it back, compare it, and score it on the run's "
        "held-out rows.",
        epilog="formats:\n" + "\n".join(f"  {name:8s} {what}" for name, what in FORMATS.items()),
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the run's folder, or an exported adapter")
    add("--to", metavar="FOLDER", required=True, help="a new folder")
    add("--format", choices=tuple(FORMATS), default="packed", help="see below (default: packed)")
    add("--base", choices=("packed", "reference"), default="packed", help="of packed: the base's weights in the "
        "folder, or only their name, revision and hash (default: packed)")  # fmt: skip
    add("--merge", action="store_true", help="of packed: the adapter added to the base, which is rounded again")
    add("--embeddings", metavar="BITS", type=int, default=32, help="of packed: bits of the embeddings, 2 to 16 with a "
        "range for each row, or 32 as they are (default: 32)")  # fmt: skip
    add("--fast", action="store_true", help="of onnx: float32 between the integer products, in less time; a few "
        "decisions may be others")  # fmt: skip
    add("--small", action="store_true", help="of onnx: weights of up to 8 bit in as many bits where their input has "
        "more than 8, for disk and memory; such products take up to several times the time")  # fmt: skip
    add("--draws", metavar="DRAWS", type=int, help="of peft: an adapter for each of so many draws of the posterior")
    add("--seed", metavar="SEED", type=int, help="of the draws (default: the run's)")
    add("--backbone", metavar="PATH", help="where the backbone is now, if not where it was")
    add("--allow_code", metavar="FILE.PY:NAME", action="append", default=[], help="a function in a file that the run "
        "names and that may run; repeatable")  # fmt: skip
    add("--quiet", action="store_true", help="print nothing but the folder, and errors")


def require_together(format: str, **given: Any) -> None:
    """Errors: ValueError for an option that the format does not take."""
    for name, (default, formats, shown) in _OF_FORMATS.items():
        if given.get(name, default) != default and format not in formats:
            raise ValueError(f"{shown} is of --format {' and '.join(formats)}, not of {format}: drop one of them")
    if given.get("seed") is not None and given.get("draws") is None:
        raise ValueError("--seed is of --draws: give both, or none")
    if given.get("merge") and given.get("base") == "reference":
        raise ValueError("--merge changes the base, so that there is none to refer to: drop --base reference")


def export_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `deploy.exporting.export_run` takes of them."""
    left_out = ("command", "quiet", "to")
    values = {name: value for name, value in vars(arguments).items() if name not in left_out}
    return {**values, "folder": arguments.to}
