"""What raises the score at given bit operations? Levers, each alone and all together, against the same run without.

    python experiments/levers.py --glue_dir GLUE --report benchmarks/levers.md --figures benchmarks/figures
    python experiments/levers.py --glue_dir GLUE --plan     # what is missing, and how long it takes

For each task, seed and budget (the BOPs of uniform W4A4, or of `--budgets`), with uniform widths and with those
that prior `budget` starts from, the levers of studies/levers.py: distillation from the open network, smoothing of
outliers between activations and weights, ranges of every output channel of a weight, rungs of 3 and 6 bit; adapters on
every linear map in place of query, key and value alone, and of three times the rank there, which has as many
parameters. Everything else is as in `allocation.py`, whose cells are those without a lever. `all` is all but the last
two, which are other networks at 32 bit, too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.allocation_page import line
from experiments.studies.allocations import Wanted, add_options, plan
from experiments.studies.levers import LEVERS, NONE, LeverCells
from experiments.studies.levers_page import figure, report
from experiments.studies.pages import study_parser, write_page
from experiments.studies.scripts import run_script

METHODS = ("uniform", "start")


def wanted(options, cells: LeverCells, without: LeverCells) -> Wanted:
    """(task, seed, method, budget) of every cell of a lever; without: the cells of none."""
    for task in options.tasks:
        for seed in options.seeds:
            if cells.has_own_lora:
                yield task, seed, "lora", None
            if cells is without:
                yield task, seed, "no_dropout", None
            for name in options.budgets:
                budget = cells.at(task, name, without.uniform(task, name).share)
                for method in options.methods:
                    yield task, seed, method, budget


def study(options, by_lever: dict[str, LeverCells]) -> list[dict]:
    """One row a cell; runs what is missing."""
    rows = []
    for lever, cells in by_lever.items():
        for task, seed, method, budget in wanted(options, cells, by_lever[NONE]):
            cell = cells.cell(task, seed, method, budget)
            if cell is not None:
                names = {"task": task, "seed": seed, "budget": budget and budget.name, "method": method}
                rows.append({"cell": cell, **cell["summary"], **names, "lever": lever})
                print(f"{lever:12s} {line(rows[-1])}", flush=True)
    return rows


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "levers", max_train=4000, output_dir="runs/allocation")
    add_options(parser)
    parser.set_defaults(keep=Path("benchmarks/cells/levers"))
    parser.add_argument("--without", type=Path, default=Path("benchmarks/cells/allocation"), help="cells of no lever")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb"])
    parser.add_argument("--budgets", nargs="+", default=["W4A4"], help="as W3A4: BOPs of uniform widths")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=(*METHODS, "budget"))
    parser.add_argument("--levers", nargs="+", default=[*LEVERS], choices=[*LEVERS])
    options = parser.parse_args(arguments)
    by_lever = {lever: LeverCells(options, lever) for lever in dict.fromkeys([NONE, *options.levers])}
    if options.plan:
        for lever, cells in by_lever.items():
            print(f"{lever}\n{plan(cells, wanted(options, cells, by_lever[NONE]))}")
        return
    write_page(options, "levers", study(options, by_lever), report, figure)


if __name__ == "__main__":
    run_script(main)
