"""The command `pyro-blora predict` and its flags."""

import argparse
from typing import Any

from .command_parser import add_command


def add_predict_command(commands: Any, help_column: int) -> None:
    """The command with its flags, to the commands of a parser."""
    parser = add_command(
        commands,
        "predict",
        help_column,
        help="predict the rows of a table with a run or an exported model",
        usage="pyro-blora predict RUN FILE [--out FILE] [--FLAG VALUE ...]",
        description="Predict the rows of a table, in its order and in constant memory. --out is written whole or not.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, an exported one, or the name of one on the hub")
    add("file", metavar="FILE", help="CSV, TSV, JSONL, Parquet, a folder of save_to_disk, a hub name, or - for stdin")
    add("--out", metavar="FILE", help="a new .csv, .jsonl or .parquet file (default: CSV on stdout)")
    add("--overwrite", action="store_true", help="replace --out where it exists")
    add(
        "--text", metavar="COLUMN", default="", help="the text column, or two with a comma between (default: the run's)"
    )
    add("--format", choices=("csv", "tsv", "jsonl"), default="csv", help="of stdin (default: csv)")
    add("--keep", metavar="COLUMNS", default="", help="columns of FILE that go along, separated by commas, or all")
    add("--on_error", choices=("refuse", "skip"), default="refuse", help="what to do with malformed rows, and those "
        "without text: end at the first one, or leave them out and report them (default: refuse)")  # fmt: skip
    add("--deployed", action="store_true", help="predict with the one allocation that is exported, not with draws")
    add("--draws", metavar="DRAWS", type=int, help="of gates and random weights (default: the run's)")
    add("--seed", metavar="SEED", type=int, help="of the draws (default: the run's)")
    add("--abstain", metavar="ACCURACY", type=float, help="answer as many texts as can be with this accuracy, by the "
        "run's held-out rows: column `answered`")  # fmt: skip
    add("--confidence", metavar="P", type=float, help="in place of --abstain: answer texts of this probability or more")
    add("--coverage", metavar="SHARE", type=float, help="add sets, or intervals, that hold the label of this share of "
        "new texts, by the run's held-out rows")  # fmt: skip
    add("--batch_size", metavar="TEXTS", type=int, help="texts in a forward (default: twice the run's)")
    add("--revision", metavar="REVISION", help="of a name on the hub: branch, tag or commit")
    add("--backbone", metavar="PATH", help="where the backbone is now, if not where it was")
    add("--allow_code", metavar="FILE.PY:NAME", action="append", default=[], help="a function in a file that the run "
        "names and that may run; repeatable")  # fmt: skip
    add("--quiet", action="store_true", help="print no progress and no remarks, only what was left out, and errors")


def predict_options(arguments: argparse.Namespace) -> dict:
    """What `deploy.predict_file` takes of them."""
    values = {name: value for name, value in vars(arguments).items() if name not in ("command", "file")}
    values["source"] = arguments.file
    values["skip"] = values.pop("on_error") == "skip"
    for name in ("text", "keep"):
        values[name] = [part.strip() for part in values[name].split(",") if part.strip()]
    return values
