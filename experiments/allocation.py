"""Is the allocation worth anything? The learned bit widths and ranks against others with the same bit operations.

    python experiments/allocation.py --glue_dir GLUE --report benchmarks/settling.md --figures benchmarks/figures
    python experiments/allocation.py --glue_dir GLUE --plan     # what is missing, and how long it takes

For each task, seed and budget (the BOPs of uniform W8A8, W4A8, W4A4 and W3A4, scope `encoder`), in the same loop, data
order and number of steps, each from the same LoRA that the first part of training gives: the methods of
studies/allocations.py, uniform allocations, a random one, those of peers, and that of prior `budget`.

Methods are compared by the one allocation that each deploys: one forward an example. Averages over draws of the gates,
an ensemble of several forwards, stand beside it. Each cell is a run of `pyro-blora train`; what comes before its gates
start is shared between the cells of a task and seed. Finished cells are kept, so the study may be
spread out; `--cells` runs some of them only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.allocation_page import figure, line, report
from experiments.studies.allocations import EVERY, METHODS, OPEN, Cells, Wanted, add_options, methods_of, plan
from experiments.studies.pages import study_parser, write_page
from experiments.studies.scripts import run_script

BUDGETS = ("W8A8", "W4A8", "W4A4", "W3A4")


def wanted(options, cells: Cells) -> Wanted:
    """(task, seed, method, budget) of every cell, in the order of the table."""
    methods = methods_of(options)
    for seed in options.seeds:
        for task in options.tasks:
            for method in methods:
                if method in OPEN:
                    yield task, seed, method, None
            for name in options.budgets:
                budget = cells.uniform(task, name)
                for method in methods:
                    if method not in OPEN:
                        yield task, seed, method, budget


def study(options, cells: Cells) -> list[dict]:
    """One row a cell; runs what is missing among `options.cells`."""
    rows = []
    for task, seed, method, budget in wanted(options, cells):
        cell = cells.cell(task, seed, method, budget, train=method in options.cells)
        if cell is None:
            continue
        names = {"task": task, "seed": seed, "budget": budget and budget.name, "method": method,
                 "share": budget.share if budget else 1.0}  # fmt: skip
        rows.append({**names, "cell": cell, **cell["summary"], **names})
        print(line(rows[-1]), flush=True)
    return rows


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "allocation", max_train=4000, output_dir="runs/allocation")
    add_options(parser)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb", "mrpc", "cola"])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), help="as W4A8: BOPs of uniform widths")
    parser.add_argument("--cells", nargs="+", default=METHODS, choices=EVERY, help="methods to run where missing")
    options = parser.parse_args(arguments)
    cells = Cells(options)
    if options.plan:
        chosen = (each for each in wanted(options, cells) if each[2] in options.cells)
        print(plan(cells, chosen))
        return
    write_page(options, options.report.stem, study(options, cells), report, figure)


if __name__ == "__main__":
    run_script(main)
