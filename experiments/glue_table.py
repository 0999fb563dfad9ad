"""Fill the table of GLUE on DeBERTaV3-base, beside published numbers, from the results of its grid.

    python experiments/glue_table.py runs/deberta_glue/results.parquet --table benchmarks/deberta_glue.md

Of every method and task the mean over seeds and its standard error, GLUE's average, and expected bit operations. A cell
without a run says so; without results all of them do. Only what stands between the page's two marks is written.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import pandas as pd

from experiments.studies.grid_file import Cell, read_grid
from experiments.studies.scripts import run_script
from pyro_blora.files import replace_text

GRID = ROOT / "experiments" / "grids" / "deberta_glue.yaml"
BEGIN, END = "<!-- results, by experiments/glue_table.py -->", "<!-- end of the results -->"
TASKS = {
    "mnli": "MNLI m / mm", "sst2": "SST-2", "cola": "CoLA", "qqp": "QQP acc / F1", "qnli": "QNLI", "rte": "RTE",
    "mrpc": "MRPC", "stsb": "STS-B",
}  # fmt: skip
PAIRS = ("mnli", "qqp")  # of which two numbers are tabulated, and their mean is in GLUE's average
NOT_RUN, UNKNOWN = "not run", "-"
PUBLISHED = {  # of DeBERTaV3-base on GLUE's dev sets; per task where the source is at hand
    "LoRA, rank 8 (Zhang et al. 2023)": (88.34, {}),
    "AdaLoRA (Zhang et al. 2023)": (
        89.31,
        {"mnli": (90.76, 90.79), "sst2": (96.10,), "cola": (71.45,), "qqp": (92.23, 89.74), "qnli": (94.55,),
         "rte": (88.09,), "mrpc": (90.69,), "stsb": (91.84,)},
    ),
    "LoRA, tuned": (89.6, {}),
    "EVA (Paischer et al. 2024)": (89.9, {}),
}  # fmt: skip
_COLUMNS = ("task", "method", "seed", "score", "second_score", "bops_adapted", "bops_model", "seconds")


def read(path: Path) -> pd.DataFrame:
    """The grid's results.  Errors: ValueError for a table that lacks what is needed."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: it is what experiments/grid.py writes")
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    if absent := [column for column in _COLUMNS if column not in table]:
        raise ValueError(
            f"{path} has no column {absent[0]!r}: give the command of its grid again, which writes it anew"
        )
    return table.astype({"task": str, "method": str, "seed": str})


def glue_average(scores: dict[str, tuple[float, ...]]) -> float | None:
    """GLUE's average as AdaLoRA's paper forms it, a pair of numbers as its mean; None where a task is missing."""
    if not set(TASKS) <= set(scores):
        return None
    return sum(sum(scores[task]) / len(scores[task]) for task in TASKS) / len(TASKS)


def mean_and_error(values: pd.Series) -> tuple[float, float | None]:
    """Mean and standard error over seeds; no error of a single one."""
    return float(values.mean()), float(values.sem()) if len(values) > 1 else None


def shown(mean: float, error: float | None) -> str:
    return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"


def measured_line(method: str, cells: list[Cell], runs: pd.DataFrame) -> str:
    """A line of the table: the runs of a method, of which the grid has `cells`."""
    means, errors, told = {}, [], []
    for task in TASKS:
        mine = runs[runs["task"] == task]
        if mine.empty:
            told.append(NOT_RUN)
            continue
        columns = [100 * mine["score"], *([100 * mine["second_score"]] if task in PAIRS else [])]
        found = [mean_and_error(column) for column in columns]
        means[task] = tuple(mean for mean, _ in found)
        errors.append(mean_and_error(sum(columns) / len(columns))[1])
        wanted = sum(cell.labels["task"] == task for cell in cells)
        told.append(" / ".join(shown(*x) for x in found) + f" ({len(mine)} of {wanted})" * (len(mine) < wanted))
    average = glue_average(means)
    if average is not None:
        error = None if None in errors else sum(x**2 for x in errors) ** 0.5 / len(TASKS)
    told.append(NOT_RUN if average is None else f"**{shown(average, error)}**")
    told += [NOT_RUN if runs.empty else f"{runs[column].mean():.1%}" for column in ("bops_adapted", "bops_model")]
    return f"| `{method}` | {' | '.join(told)} |"


def published_line(name: str, average: float, scores: dict[str, tuple[float, ...]]) -> str:
    told = [" / ".join(f"{x:.2f}" for x in scores[task]) if task in scores else UNKNOWN for task in TASKS]
    return f"| {name} | {' | '.join(told)} | **{average:g}** | {UNKNOWN} | {UNKNOWN} |"


def results_section(cells: list[Cell], table: pd.DataFrame) -> str:
    """What stands between the marks.  Errors: ValueError for runs that are not the grid's."""
    methods = dict.fromkeys(cell.labels["method"] for cell in cells)
    known = {tuple(cell.labels[axis] for axis in ("task", "method", "seed")) for cell in cells}
    given = [*table[["task", "method", "seed"]].itertuples(index=False, name=None)]
    for i, run in enumerate(given):
        if run not in known or run in given[:i]:
            why = "is not in the grid" if run not in known else "is there twice"
            raise ValueError(f"run {' '.join(run)} {why}: give --grid the file whose results these are")
    head = ("", *TASKS.values(), "average", "E[BOPs], adapted", "E[BOPs], model")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [published_line(name, *numbers) for name, numbers in PUBLISHED.items()]
    for method in methods:
        mine = [cell for cell in cells if cell.labels["method"] == method]
        lines.append(measured_line(method, mine, table[table["method"] == method]))
    hours = f", {table['seconds'].sum() / 3600:.1f} hours of training" if given else ""
    return "\n".join([*lines, "", f"{len(given)} of {len(cells)} runs are finished{hours}."])


def fill(page: Path, section: str) -> None:
    """Errors: ValueError for a page without the marks."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    between = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not between.search(text):
        raise ValueError(f"{page} has no lines `{BEGIN}` and `{END}`: put them where the table belongs")
    replace_text(page, between.sub(lambda _: f"{BEGIN}\n{section}\n{END}", text, count=1))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="?", help="results.parquet (or .csv) of the grid; none: nothing ran"
    )
    parser.add_argument(
        "--grid", type=Path, default=GRID, help="its file (default: experiments/grids/deberta_glue.yaml)"
    )
    parser.add_argument("--table", type=Path, help="page whose table is filled (default: print it)")
    options = parser.parse_args(arguments)
    table = read(options.results) if options.results else pd.DataFrame(columns=list(_COLUMNS))
    section = results_section(read_grid(options.grid), table)
    if options.table:
        fill(options.table, section)
    print(options.table or section)


if __name__ == "__main__":
    run_script(main)
