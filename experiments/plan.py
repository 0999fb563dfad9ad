"""GPU-hours of a grid of GLUE, before anything is trained: real sizes of the tasks times measured steps.

    python experiments/plan.py experiments/grids/deberta_methods.yaml
    python experiments/plan.py experiments/grids/deberta_*.yaml --write    # into the comments at the files' heads

Measured steps are in benchmarks/gpu/steps.json; for another card give a file of its own. What is measured, scaled or
taken from the nearest measurement stands in every line; how it is scaled, in experiments/studies/costs.py.
"""

import argparse
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.costs import Cost, Steps, cost_of, kind_of
from experiments.studies.grid_file import read_grid
from experiments.studies.scripts import run_script
from pyro_blora.files import replace_text

STEPS = ROOT / "benchmarks" / "gpu" / "steps.json"
HEAD = re.compile(r"# GPU-hours on(?:[^\n]*\n#)*?     python experiments/plan\.py [^\n]*\n")


class Plan:
    """A grid's lines, (labels but the seed, task, cost) -> runs, in the order of the file."""

    def __init__(self, grid: Path, steps: Steps):
        self.grid, self.steps = grid, steps
        self.lines: Counter[tuple[tuple[str, ...], str, Cost]] = Counter()
        self.nearest: dict[str, str] = {}  # kind of step -> the kind that stands for it, and why
        for cell in read_grid(grid):
            self.axes = [axis for axis in cell.labels if axis != "seed"]
            labels = tuple(cell.labels[axis] for axis in self.axes)
            self.lines[labels, cell.config.task, cost_of(cell.config, steps)] += 1
            kind, _, near = steps.of(cell.config)
            if near:
                self.nearest[kind_of(cell.config)] = f"{kind}{' (eager)' * near.eager}, {near.why}"

    @property
    def runs(self) -> int:
        return self.lines.total()

    @property
    def hours(self) -> float:
        return sum(runs * cost.hours for (_, _, cost), runs in self.lines.items())

    def table(self) -> str:
        head = (
            *self.axes,
            "runs",
            "steps",
            "ms a step",
            "from",
            "training (h)",
            "evaluation (h)",
            "a run (h)",
            "all (h)",
        )
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for (labels, _, cost), runs in self.lines.items():
            hours = cost.training_s / 3600, cost.evaluation_s / 3600, cost.hours, runs * cost.hours
            cells = *labels, runs, f"{cost.steps:,}", f"{cost.ms:.1f}", cost.source, *(f"{x:.2f}" for x in hours)
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines)

    def page(self) -> str:
        steps, notes = self.steps, [f"- {name}: {why}" for name, why in self.nearest.items()]
        shape = f"{steps.batch} x {steps.length} tokens at rank {steps.rank}"
        text = f"""# {self.grid}: {self.hours:.1f} GPU-hours, {self.runs} runs

Of one {steps.card} ({steps.software}).
`measured`: a step of {shape} of this kind, which shorter batches are not taken to fall below; `scaled`: by the batch
and the square of its length; `nearest`: of another kind; `rank`: of another rank, not scaled. Evaluation: a third of an
eager step each forward where no forward was measured. A run has {steps.other_s:g} s on top: loading, export, its page.

{self.table()}
"""
        return text + ("\nNot measured, and what stands for it:\n" + "\n".join(notes) + "\n" if notes else "")

    def head(self) -> str:
        """The comment at the head of the file: hours in all, of a run by task, and the command."""
        by_task: dict[str, list[float]] = {}
        for _, task, cost in self.lines:
            by_task.setdefault(task, []).append(cost.hours)
        spans = [[f"{x:.2f}" for x in (min(hours), max(hours))] for hours in by_task.values()]
        told = [
            f"{task} {low if low == high else f'{low} to {high}'}"
            for task, (low, high) in zip(by_task, spans, strict=True)
        ]
        text = f"GPU-hours on one {self.steps.card}: {self.hours:.0f} in all; a run of {', '.join(told)}. By:"
        lines = textwrap.wrap(text, width=118)
        command = f"    python experiments/plan.py experiments/grids/{self.grid.name}"
        return "".join(f"# {line}\n" for line in [*lines, command])


def write_head(plan: Plan) -> None:
    """Replace the comment of the file.  Errors: ValueError for a file without one."""
    text = plan.grid.read_text(encoding="utf-8")
    if not HEAD.search(text):
        raise ValueError(f"{plan.grid} has no comment that begins with `# GPU-hours on`: add one before its axes")
    text = HEAD.sub(lambda _: plan.head(), text, count=1)
    replace_text(plan.grid, text)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path, metavar="grid", help="a YAML file of experiments/grids")
    parser.add_argument("--steps", type=Path, default=STEPS, help="measured steps (default: benchmarks/gpu/steps.json)")
    parser.add_argument("--write", action="store_true", help="write the hours into the comments of the files")
    options = parser.parse_args(arguments)
    steps = Steps.read(options.steps)
    for grid in options.grids:
        plan = Plan(grid, steps)
        if options.write:
            write_head(plan)
        print(plan.head() if options.write else plan.page())


if __name__ == "__main__":
    run_script(main)
