"""A comparison that is statistics: differences between the entries of a grid's axis, paired by seed and example.

    python experiments/compare.py runs/methods/results.parquet --axis method --against lora \
        --report benchmarks/methods.md --figures benchmarks/figures

Reads the table that experiments/grid.py leaves and the run folders that it names. The page has, for every task: means
and standard deviations over seeds; paired differences to one entry with 95 % intervals over seeds and examples, of what
is deployed and of what is averaged over draws; ArviZ's `compare` of the held-out log scores; a figure of the metric
against the bit operations. All seeds are shown, and cells that are missing are named.
"""

import argparse
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.compare_page import at_every_rank, compared, differences, elpd, kept, means, what_differs
from experiments.studies.loo import loo_of_run
from experiments.studies.results import groups, missing, read, wanted
from experiments.studies.scripts import run_script

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
_MARKERS = "os^vD*PX<>hp"


def leave_one_out(table: pd.DataFrame, axis: str, options: argparse.Namespace) -> str:
    """PSIS-LOO of the training examples of every run whose gates are random, labelled by what ArviZ could correct."""
    rows, corrected = [], False
    for (task, entry), runs in groups(table, axis).items():
        for seed, folder in zip(runs["seed"], runs["folder"], strict=True):
            found = loo_of_run(Path(folder), options.loo, options.loo_draws, options.allow_code)
            if found is not None:
                result, corrected = found
                total = float(result["elpd_loo"] if hasattr(result, "index") else result.elpd)
                over = int((np.asarray(result.pareto_k) > result.good_k).sum())
                rows.append(f"| {task} | `{entry}` | {seed} | {total:.1f} | {float(result.se):.1f} | {over} |")
    if not rows:
        return "\n## Leave-one-out over the training examples\n\nNo run has random gates.\n"
    label = (
        "Corrected for the guide: draws are weighted by joint density over guide."
        if corrected
        else "**Not corrected for the guide**, as the installed ArviZ cannot: its draws count as the posterior's."
    )
    head = [
        f"| task | {axis} | seed | elpd_loo | standard error | examples with a Pareto k too large |",
        "|" + "---|" * 6,
    ]
    return f"""
## Leave-one-out over the training examples

PSIS-LOO of {options.loo} training examples under {options.loo_draws} draws of the gates, at the trained weights (which
have seen the examples: this is about the gates alone). {label}

{chr(10).join(head + rows)}
"""


def figure(table: pd.DataFrame, axis: str, path: Path) -> None:
    """What is deployed: the metric against the bit operations, a panel a task; a small mark a seed."""
    tasks, entries = list(dict.fromkeys(table["task"])), list(dict.fromkeys(table[axis]))
    _, panels = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 4.4), squeeze=False, constrained_layout=True)
    found = groups(table, axis)
    for panel, task in zip(panels[0], tasks, strict=True):
        for i, entry in enumerate(entries):
            runs = found.get((task, entry))
            if runs is None:
                continue
            x, y = runs["adapted"], runs["deployed_score"]
            style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "linestyle": "none"}
            panel.plot(x, y, markersize=3, alpha=0.5, **style)
            panel.plot(x.mean(), y.mean(), markersize=8, label=entry, **style)
        panel.set(xscale="log", xlabel="10^9 bit operations of the adapted projections", title=task)
        panel.set(ylabel=table[table["task"] == task]["metric"].iloc[0])
    handles, labels = panels[0][0].get_legend_handles_labels()
    plt.gcf().legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    plt.savefig(path, dpi=110)
    plt.close()


def report(table: pd.DataFrame, options: argparse.Namespace) -> str:
    axis = options.axis
    loo = leave_one_out(table, axis, options) if options.loo else ""
    found = compared(table, axis, options.against)

    def each(name: str) -> str:
        return " or ".join(map(str, sorted({summary[name] for summary in table["summary"]})))

    picture = os.path.relpath(options.figures / f"{options.report.stem}.png", options.report.parent)
    return f"""# {options.report.stem}: `{axis}` compared

{what_differs(found, options.against)}

```sh
python experiments/compare.py {options.table} --axis {axis} --against {options.against} \\
    --report {options.report} --figures {options.figures}
```

The table is what `experiments/grid.py` left of the grid `{options.table.parent.name}`, whose file has its command.
{len(table)} runs on {each("device")}; backbone {each("backbone")}, {each("n_train")} training examples, in \
{" or ".join(sorted(set(table["precision"])))}.
Predictions average {each("draws")} draws. {missing(table, axis, wanted(options.table, table, axis))}

`deployed` is the one allocation that is exported, one forward an example; `draws` averages predictions over draws of
the gates (or of dropout masks). ± is the standard deviation over seeds. Bit operations are of what is deployed, in one
forward at the sequence length of the run, absolute, as runs differ in what 100 % is: of the adapted projections with
their adapters, and of the whole model. Seconds of training are the median, beside whatever else the machine did.

{means(table, axis)}

## Paired differences

The same seeds and the same held-out examples. Intervals hold both: Student's over the seeds, as they are few, and the
bootstrap over the examples, added in squares. A negative NLL is in favour of the entry, as is a
negative score where that is an error (RMSE). `-`: a score that resamples do not have.

{differences(found, axis, options.against)}

## What the gates keep

Expected bits of each tensor role (of 32) and expected ranks of each projection type, under the posterior.

{kept(table, axis)}

## ArviZ's compare

Log scores of held-out examples (nats in total; of the density averaged over draws, then averaged over seeds). They are
held out, so nothing is left out by importance sampling, and no correction for the guide is needed; the standard error
is over examples only.

{elpd(table, axis)}
{at_every_rank(table, axis)}{loo}
![Score against BOPs]({picture})
"""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="results.parquet (or .csv) of experiments/grid.py")
    parser.add_argument("--axis", required=True, help="what is compared: an axis of the grid, such as method or prior")
    parser.add_argument("--against", required=True, help="the entry that the others are compared with")
    parser.add_argument("--report", type=Path, help="page to write (default: compare.md beside the table)")
    parser.add_argument("--figures", type=Path, help="folder of the figure (default: that of the page)")
    parser.add_argument("--loo", type=int, metavar="EXAMPLES", help="add PSIS-LOO of that many training examples a run")
    parser.add_argument("--loo_draws", type=int, default=100, help="draws of the gates for it (default: 100)")
    code = "function that runs may name and --loo may call, once each: late.py:late"
    parser.add_argument("--allow_code", action="append", default=[], metavar="FILE.py:NAME", help=code)
    options = parser.parse_args(arguments)
    options.report = options.report or options.table.with_name("compare.md")
    options.figures = options.figures or options.report.parent
    table = read(options.table, options.axis)
    if options.against not in set(table[options.axis]):
        raise ValueError(
            f"no run has {options.axis} {options.against!r}: {', '.join(dict.fromkeys(table[options.axis]))}"
        )
    page = report(table, options)
    for folder in (options.report.parent, options.figures):
        folder.mkdir(parents=True, exist_ok=True)
    figure(table, options.axis, options.figures / f"{options.report.stem}.png")
    options.report.write_text(page, encoding="utf-8")
    print(options.report)


if __name__ == "__main__":
    run_script(main)
