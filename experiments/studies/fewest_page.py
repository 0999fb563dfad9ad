"""The page of `fewest_bops.py`: a headline a task, a table, a picture."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.studies.allocation_page import OPERATIONS, STYLES, training_of
from experiments.studies.allocations import OPEN
from experiments.studies.bisection import TOLERANCE, Found, Tried
from experiments.studies.cells import provenance
from experiments.studies.compare import spread, written


def by_task(found: list[Found]) -> dict[str, list[Found]]:
    tasks: dict[str, list[Found]] = {}
    for each in found:
        tasks.setdefault(each.task, []).append(each)
    return tasks


def _told(each: Found) -> str:
    """A share, or what is known of it."""
    if each.fewest is None:
        return f"more than {each.tried[-1].share:.2%}"
    return f"{each.fewest.share:.2%}" if each.is_finished else f"no more than {each.fewest.share:.2%}"


def _difference(tried: Tried | None) -> str:
    return written(tried.difference, 4) if tried else ""


def headlines(found: list[Found]) -> str:
    lines = []
    for task, methods in by_task(found).items():
        told = {each.method: _told(each) for each in methods}
        first = next((name for name in ("start", *told) if name in told), "")
        others = ", ".join(f"`{name}` {share}" for name, share in told.items() if name != first)
        at = _difference(next(each.fewest for each in methods if each.method == first))
        by = f"`{first}`" + (f", score minus LoRA's {at}" if at else "")
        lines.append(f"- **{task}: LoRA's score at {told[first]} of its bit operations** ({by})"
                     + (f"; {others}" if others else ""))  # fmt: skip
    return "\n".join(lines)


def table(found: list[Found]) -> str:
    lines = [
        "| task | method | fewest BOPs | score minus LoRA there [95 %] | minus the other LoRA | "
        "next fewer tried | score minus LoRA [95 %] | shown too few at | shown enough at | budgets tried |",
        "|" + "---|" * 10,
    ]
    for each in found:
        below = [x for x in each.tried if each.fewest is None or x.share < each.fewest.share]
        there, fewer = each.fewest, below[-1] if below else None
        cells = [f"| {each.task} | `{each.method}` | {_told(each)}", _difference(there)]
        cells.append(written(there.other, 4) if there else "")
        cells += [f"{fewer.share:.2%}" if fewer else "none", _difference(fewer)]
        cells += ["no budget" if share is None else f"{share:.2%}" for share in (each.too_few, each.enough)]
        lines.append(" | ".join([*cells, f"{len(each.tried)} |"]))
    return "\n".join(lines)


def table_of_loras(found: list[Found]) -> str:
    lines = ["| task | `" + "` | `".join(OPEN) + "` | compared with |", "|---|" + "---|" * (1 + len(OPEN))]
    for task, (first, *_) in by_task(found).items():
        told = " | ".join(spread(first.loras[name]) if name in first.loras else "" for name in OPEN)
        lines.append(f"| {task} | {told} | `{next(iter(first.loras))}` |")
    return "\n".join(lines)


def figure(found: list[Found], path: Path) -> None:
    """Score minus LoRA's against BOPs at every budget that was tried, a panel a task; the fewest is filled."""
    tasks = by_task(found)
    _, panels = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks), 3.6), squeeze=False, constrained_layout=True)
    for panel, (task, methods) in zip(panels[0], tasks.items(), strict=True):
        for each in methods:
            colour, marker = STYLES[each.method]
            tried = sorted(each.tried, key=lambda x: x.share)
            x, y = [100 * t.share for t in tried], np.array([t.difference for t in tried])
            error = [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]]
            panel.errorbar(x, y[:, 0], yerr=error, color=colour, marker=marker, markerfacecolor="white",
                           label=each.method, capsize=2, linewidth=1.0)  # fmt: skip
            if each.fewest is not None:
                panel.plot(100 * each.fewest.share, each.fewest.difference[0], marker=marker, color=colour, zorder=3)
        panel.axhline(-TOLERANCE, color="#999999", linestyle=":", linewidth=1)
        panel.set(xlabel=OPERATIONS, ylabel="score minus LoRA's, 95 %")
        panel.set_title(f"{task}: filled is the fewest within half a point", fontsize=10)
    panels[0][0].legend(frameon=False, fontsize=8)
    plt.savefig(path, dpi=110)
    plt.close()


def _how(options: argparse.Namespace) -> str:
    times = "once" if options.steps == 1 else f"{options.steps} times"
    halved = f", then by halving what is left {times}, on a log scale (not of `uniform`)" if options.steps else ""
    return (
        f"Found by going\ndown from the bit operations of {options.first} to those of uniform widths below, or up "
        f"where these are not\nenough{halved}."
    )


def report(options: argparse.Namespace, found: list[Found]) -> str:
    cells = [cell for each in found for cell in each.cells]
    return f"""# LoRA's score at x % of its bit operations

{headlines(found)}

```sh
python experiments/fewest_bops.py --glue_dir GLUE --tasks {" ".join(options.tasks)} \\
    --seeds {" ".join(map(str, options.seeds))} --steps {options.steps} --methods {" ".join(options.methods)} \\
    --first {options.first} --lever {options.lever} \\
    --report benchmarks/{options.report.name} --figures benchmarks/figures
```

The fewest bit operations (of the whole model's at 32 x 32 bit) at which the score of what is deployed is within \
{TOLERANCE} of LoRA's, averaged over {len(options.seeds)} seeds and paired by example and seed. {_how(options)}
*Shown too few*: the largest share tried whose whole 95 % interval is below
-{TOLERANCE}; *shown enough*: the smallest whose whole interval is above it. Shares are of what was deployed.
The methods: `experiments/studies/allocations.py`; their lever (`experiments/studies/levers.py`):
`{options.lever}`.

LoRA is the better of two, by its mean score: `lora` has dropout throughout, `no_dropout` none from where the gates of
the others start, as they have none there, either.

{table_of_loras(found)}

MiniLM, scope `encoder`, {training_of(options)}; {provenance(cells)}.

{table(found)}

![Score against BOPs](figures/{options.report.stem}.png)
"""
