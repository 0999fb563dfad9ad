"""LoRA's score at x % of its bit operations: the fewest BOPs at which a method is within half a point of LoRA.

    python experiments/fewest_bops.py --glue_dir GLUE --report benchmarks/fewest_bops.md --figures benchmarks/figures

For each task and method, one budget after the other downwards from the bit operations of W4A8, or upwards where these
are not enough: those of uniform allocations whose activations have at least as many bits as weights, as they are the
more sensitive. Between the last of them that is enough and the next one, methods other than `uniform` then bisect, on a
log scale, `--steps` times. A budget is enough where the score of what is deployed, on the dev set, is on average over
seeds not more than 0.005 below LoRA's, the better of LoRA with dropout throughout and without where the others have
none.
`--lever` gives a lever of `levers.py` to all methods but LoRA, which has those that are another network at 32 bit
(`adapters`, `rank`), too. Cells are those of `allocation.py` and `levers.py`, kept
in the same folders and shared with them, so the study may be spread out; `--methods` runs some methods only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.allocations import add_options
from experiments.studies.bisection import Found, families, search
from experiments.studies.fewest_page import figure, report
from experiments.studies.levers import LEVERS, NONE, LeverCells
from experiments.studies.pages import study_parser, write_page
from experiments.studies.scripts import run_script

METHODS = ("start", "hessian", "greedy", "uniform")
UNIFORM = ("W2A2", "W2A4", "W4A4", "W2A8", "W3A8", "W4A8", "W8A8", "W8A16", "W16A16")


def study(options, cells: LeverCells) -> list[Found]:
    """One search a task and method, of those for which a cell is finished."""
    found = []
    for task in options.tasks:
        for method in options.methods:
            points, top = families(cells, task, UNIFORM, options.first)
            if method == "uniform":
                result = search(cells, task, method, points, top)
            else:
                result = search(cells, task, method, [budgets[:1] for budgets in points], top, options.steps)
            found += [result] if result.tried else []
    return found


def planned(options, cells: LeverCells) -> str:
    """A guess of the number of cells and their minutes; kept ones are not looked up, as the search decides which."""
    lines, total = [], 0.0
    for task in options.tasks:
        number = {method: 3 + (method != "uniform") * options.steps for method in options.methods}
        minutes = sum(count * cells.minutes(task, method) for method, count in number.items())
        minutes = len(options.seeds) * (minutes + cells.shared_minutes(task, tuple(options.methods)))
        count, total = len(options.seeds) * sum(number.values()), total + minutes
        lines.append(f"{task}: about {count} cells, {minutes:.0f} minutes")
    return "\n".join([*lines, f"about {total / 60:.1f} hours on one core, less what is kept"])


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "fewest_bops", max_train=4000, output_dir="runs/allocation")
    add_options(parser)
    parser.add_argument("--lever", default=NONE, choices=[*LEVERS], help="of all methods; of LoRA those that change it")
    parser.add_argument(
        "--of_levers", type=Path, default=Path("benchmarks/cells/levers"), help="finished cells of levers"
    )
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb", "mrpc", "cola"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=(*METHODS, "budget", "exact_hessian"))
    parser.add_argument("--first", default="W4A8", choices=UNIFORM, help="the budget that is tried first")
    parser.add_argument("--steps", type=int, default=0, help="halvings of the last distance")
    options = parser.parse_args(arguments)
    options.without, options.keep = options.keep, options.of_levers
    cells = LeverCells(options, options.lever)
    if options.plan:
        print(planned(options, cells))
        return
    write_page(options, options.report.stem, study(options, cells), report, figure)


if __name__ == "__main__":
    run_script(main)
