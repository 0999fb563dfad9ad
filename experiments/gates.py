"""Do the gates learn? SVI of the gates against leaving them where they start, the adapter trained on all the same.

    python experiments/gates.py --glue_dir GLUE --report benchmarks/gates.md --figures benchmarks/figures

For each task and seed, from the same LoRA and the same estimate of every gate's log Bayes factor:

    frozen      gates stay at their start; adapter, head and ranges are trained on under discrete draws of them
    natural     natural gradients: estimator `gauss_newton`
    adam        Adam on one relaxed draw: estimator `relaxed`
    alone       as `natural`, with adapter, head and ranges left as they are when the gates start
    alone_4     the same, with four times the steps: is there more to gain?

The ELBO is that of discrete draws, by 64 of them on 400 training rows. Beside it stands by how much it is above that
of the adapter of `natural` with the gates that it started from, which separates what the gates gain from what the
adapter does, with draws from the same random numbers. Finished
cells are kept; `--cells` trains some methods only. With `--noise`, tables of optimizers and of estimates of the natural
gradient, on problems that can be enumerated: twelve gates, and a tiny network. Rows of estimates are kept, too.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.ladder.estimates import network_table, twelve_table
from experiments.ladder.noisy import table as noise_table
from experiments.studies.compare import half_width, spread
from experiments.studies.gate_learning import DRAWS, ROWS, cell
from experiments.studies.pages import study_parser, write_page
from experiments.studies.scripts import run_script
from pyro_blora.config import RunConfig

STILL = {"lr": 1e-20, "lr_ranges": 0.0}  # too small a step to change a float32
METHODS = {
    "frozen": {"estimator": "gauss_newton", "lr_gates": 0.0},
    "natural": {"estimator": "gauss_newton"},
    "adam": {"estimator": "relaxed"},
    "alone": {"estimator": "gauss_newton", **STILL},
    "alone_4": {"estimator": "gauss_newton", **STILL},
}
TRAINED, ALONE = ("frozen", "natural", "adam"), ("alone", "alone_4")  # beside a trained adapter, or an adapter at rest
LONGER = {"alone_4": 4}  # times the steps of the others
_OLDER = ", of older cells over draws alone"
OWN = {"acceptability": {"epochs": 5, "kl_warmup": 0.5}}  # of the demo's preset: nothing is learned before


def configuration(options, task: str, seed: int, **changes) -> RunConfig:
    return RunConfig(**{
        "task": task, "glue_dir": options.glue_dir, "backbone": options.backbone, "seed": seed, "kl_warmup": 1 / 3,
        "max_train": options.max_train, "epochs": options.epochs, "max_length": 64, "output_dir": options.output_dir,
        **OWN.get(task, {}), **changes,
    })  # fmt: skip


def of_method(options, task: str, seed: int, method: str) -> RunConfig:
    """Gates start at the same step, however long they learn."""
    config, times = configuration(options, task, seed, **METHODS[method]), LONGER.get(method, 1)
    return dataclasses.replace(config, epochs=times * config.epochs, kl_warmup=config.kl_warmup / times)


def study(options) -> list[dict]:
    """One row a cell; trains what is missing among `options.cells`."""
    rows = []
    for seed, task in itertools.product(options.seeds, options.tasks):
        lora = configuration(options, task, seed, prior="fixed", prior_settings={"bits": 32})
        for method in METHODS:
            path = options.keep / "gates" / f"{task}-{seed}-{method}.json"
            train = method in options.cells and not options.only_finished
            found = cell(path, of_method(options, task, seed, method), lora, train=train)
            if found is not None:
                rows.append({"task": task, "seed": seed, "method": method, **found})
                print(task, seed, method, f"{found['learned']['elbo']:.4f}", flush=True)
    return rows


def by(rows: list[dict], task: str, method: str) -> dict[int, dict]:
    return {row["seed"]: row for row in rows if (row["task"], row["method"]) == (task, method)}


def disagreement(cells: list[dict]) -> str:
    """Ladders that two seeds deploy at different depths, on average over pairs, of all."""
    depths = [np.array(cell["learned"]["depths"]) for cell in cells]
    pairs = [(a != b).sum() for a, b in itertools.combinations(depths, 2)]
    return f"{np.mean(pairs):.0f} of {len(depths[0])}" if pairs else "-"


def table(rows: list[dict]) -> str:
    lines = ["| task | gates | seeds | ELBO per example | KL | E[BOPs] | E[bits] | NLL, draws | NLL, deployed | score, "
             "deployed | seeds disagree |", "|" + "---|" * 11]  # fmt: skip
    for task, method in itertools.product(dict.fromkeys(row["task"] for row in rows), TRAINED):
        cells = list(by(rows, task, method).values())
        if not cells:
            continue
        elbo, kl, bops, bits = ([c["learned"][key] for c in cells] for key in ("elbo", "kl", "bops", "bits"))
        scores = [spread([c[what][key] for c in cells])
                  for what, key in (("draws", "nll"), ("deployed", "nll"), ("deployed", "score"))]  # fmt: skip
        lines.append(
            f"| {task} | `{method}` | {len(cells)} | {spread(elbo, 4)} | {np.mean(kl):.1f} | {np.mean(bops):.2%} | "
            f"{np.mean(bits):.2f} | {' | '.join(scores)} | {disagreement(cells)} |"
        )
    return "\n".join(lines)


def differences(rows: list[dict]) -> str:
    """Of `natural`, by seed: to `frozen`, and to the gates that it started from under its own adapter; nats of ELBO."""
    lines = ["| task | seed | `natural` minus `frozen`, nats | minus its own start, nats | error of the latter | "
             "over | moved, nats (root mean square) |", "|" + "---|" * 7]  # fmt: skip
    for task in dict.fromkeys(row["task"] for row in rows):
        frozen = by(rows, task, "frozen")
        for seed, cell_ in by(rows, task, "natural").items():
            n = cell_.get("n_train", cell_["config"]["max_train"])  # older cells have as many rows as they may
            own, error = gained(cell_)
            rival = frozen.get(seed)
            gain = f"{n * (cell_['learned']['elbo'] - rival['learned']['elbo']):+.1f}" if rival else "-"
            both = "draws, rows" if "gain" in cell_ else "draws"
            lines.append(f"| {task} | {seed} | {gain} | {own:+.1f} | {error:.1f} | {both} | {cell_['moved']:.2f} |")
    return "\n".join(lines)


def alone(rows: list[dict]) -> str:
    """What gates gain under an adapter at rest, nats above their start, after as many steps and four times as many."""
    lines = ["| task | seed | gain, nats | gain of four times the steps, nats | their moves, nats (root mean square) |",
             "|" + "---|" * 5]  # fmt: skip
    for task, seed in itertools.product(*(dict.fromkeys(row[key] for row in rows) for key in ("task", "seed"))):
        cells = [by(rows, task, method).get(seed) for method in ALONE]
        if any(cells):
            gains = (f"{gain[0]:+.1f} ± {gain[1]:.1f}" if (gain := gained(cell)) else "-" for cell in cells)
            moves = " / ".join(f"{cell['moved']:.2f}" if cell else "-" for cell in cells)
            lines.append(f"| {task} | {seed} | {' | '.join(gains)} | {moves} |")
    return "\n".join(lines) if len(lines) > 2 else "No run is finished."


def gained(cell: dict | None) -> tuple[float, float] | None:
    """ELBO of all training examples above that of the gates' start under the same adapter; nats.

    And its standard error over draws of the gates and rows, in one training; of older cells over draws alone.
    """
    if cell is None or "gain" in cell:
        return cell and (cell["gain"]["nats"], cell["gain"]["error"])
    n, learned, start = cell["config"]["max_train"], cell["learned"], cell["start"]
    return n * (learned["elbo"] - start["elbo"]), n * float(np.hypot(learned["error"], start["error"]))


def headline(rows: list[dict]) -> str:
    """A line a task: what `natural` gains over where its gates start, on average over seeds.

    With the error in these trainings, of draws and rows, and the 95 % interval (Student) of the mean of all seeds.
    """
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        found = [gain for cell in by(rows, task, "natural").values() if (gain := gained(cell)) is not None]
        if found:
            gains, errors = np.array(found).T
            mean, error = gains.mean(), float(np.hypot.reduce(errors)) / len(gains)
            verdict = "more than" if mean > 2 * error else "not more than"
            seeds = ", ".join(f"{gain:+.1f}" for gain in gains)
            half = float(half_width(gains)) if len(gains) > 1 else np.inf
            over_seeds = f"the mean of all seeds is in [{mean - half:.1f}, {mean + half:.1f}]"
            lines.append(
                f"- **{task}: learning gains {mean:+.1f} ± {error:.1f} nats of ELBO** in these trainings, {verdict} "
                f"twice this error (by seed {seeds}); "
                f"{over_seeds if len(gains) > 1 else 'one seed has no interval'}"
            )
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    """ELBO against E[BOPs], a panel a task, a point a seed."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    _, panels = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.2), squeeze=False, constrained_layout=True)
    for panel, task in zip(panels[0], tasks, strict=True):
        for method, colour, marker in zip(TRAINED, ("#000000", "#0072B2", "#D55E00"), "o^s", strict=True):
            points = [c["learned"] for c in by(rows, task, method).values()]
            panel.plot(
                [100 * p["bops"] for p in points], [p["elbo"] for p in points], marker, color=colour, label=method
            )
        panel.set(xlabel="E[BOPs] (% of the model)", ylabel="ELBO (nats per example)")
        panel.set_title(task, fontsize=10)
    panels[0][0].legend(frameon=False, fontsize=8)
    plt.savefig(path, dpi=110)
    plt.close()


def noise_section(keep: Path) -> str:
    """keep: the folder of finished rows of estimates."""
    return f"""
## Twelve gates, enumerated

Gap of the ELBO to the exact mean field, nats, at a noise of 5 nats a step in the slope of every gate: least, median and
largest of three problems, two seeds each (`--noise`).

{noise_table()}
{estimates_section(keep)}"""


def estimates_section(keep: Path) -> str:
    return f"""
### Estimates of the natural gradient

The target of a gate is t = -N dE_q[NLL]/dm, m the marginals of its ladder; here it is exact, by enumeration. An
estimate is what one step of natural gradients averages, in nats. Bias is of its mean without noise, root mean square
over free gates, ± the Monte Carlo error of 300 draws, which it contains; noise is its standard deviation as a step sees
it times the square root of its forwards, root mean square; gaps of the ELBO to the exact mean field are least, median
and largest. Relaxed draws are at temperature .1 for bias and noise. Division by the Fisher matrix has its damping of
.05, which draws an estimate towards the present log Bayes factor: a bias while that is not the target, and less noise
where a gate is far from undecided. The path estimate (`experiments/ladder/rivals.py`) has 3 of 12 and 1 of 4 ladders
between two depths, the others at a draw; a gate that it does not see keeps its present log Bayes factor.

Twelve gates, noise of 5 nats a step: bias and noise on one problem, gaps of three, one seed each. The noise is linear
in the gates, so that the control variate removes all of it, and the NLL quadratic, so that the curvature of the start
is exact, where that of row 3 is estimated from 40 examples.

{twelve_table(keep)}

A network of two projections, two ladders of four bit gates and two of three ranks, 400 states; batches of 16 of 128
examples are the noise; gaps of two seeds. The start's curvature is the package's, with all gates open.

{network_table(keep)}

`gauss_newton` with curvature has half to an eighth the noise of `relaxed`, `straight_through`, DisARM and the path,
and the smallest gap of them after 100 steps on both problems; after 500 it leads on twelve gates and is level with
`relaxed` on the network: so it is the default, for runs with few gated steps. It is not exact on the network: with the
curvature of the start it is 1.2 nats off at the converged guide and stays 0.3 nats below the best ELBO, where `relaxed`
comes within 0.1 after 2,000 steps and is the better choice. Curvature at the present draw halves the bias but not the
gap, and the control variate gains nothing there that its second forward would not buy (two seeds each).
"""


def report(options, rows: list[dict]) -> str:
    noise = noise_section(options.keep / "gates" / "estimates") if options.noise else ""
    older = _OLDER if any("start" in row for row in rows) else ""
    return f"""# Do the gates learn?

{headline(rows)}

```sh
python experiments/gates.py --glue_dir GLUE --seeds {" ".join(map(str, options.seeds))}{" --noise" * options.noise} \\
    --tasks {" ".join(options.tasks)} --report benchmarks/gates.md --figures benchmarks/figures
```

MiniLM, scope `adapted`, prior `bops`, {options.max_train} training examples, {options.epochs} epochs, gates start after
a third of the steps; {len(rows)} of {len(options.tasks) * len(options.seeds) * len(METHODS)} cells are finished. The
ELBO is of discrete draws, {DRAWS} of them on {ROWS} training rows; mean ± standard deviation over seeds. With one seed,
a difference to `frozen` is one of two trainings that went apart; that to the own start, under one adapter, with draws
from the same random numbers, is what the gates have learned. Its error, ±, is the standard error over draws and
rows{older}.

{table(rows)}

{differences(rows)}

Under an adapter at rest, natural gradients for as many steps, and for four times as many:

{alone(rows)}

![ELBO against bit operations](figures/gates.png)
{noise}"""


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "gates", max_train=2000, output_dir="runs/gates")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb", "mrpc", "acceptability"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--noise", action="store_true", help="also the table of twelve gates: minutes")
    parser.set_defaults(epochs=3)
    options = parser.parse_args(arguments)
    write_page(options, "gates", study(options), report, figure)


if __name__ == "__main__":
    run_script(main)
