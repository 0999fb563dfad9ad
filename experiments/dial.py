"""Is the rate of the prior a dial? Five decades of it, with and without what keeps gates from collapsing.

    python experiments/dial.py --glue_dir GLUE --report benchmarks/dial.md --figures benchmarks/figures

Prior `bops` on SST-2 with MiniLM, scope `encoder`, each run from the same LoRA:

    evidence    the gates start from the posterior that the data's Fisher information and the prior give, and hold what
                the data say in nats (gate_init.py, guides/): the default
    blind       the same guide and loss, but every gate starts at log-odds 3 whatever prior and data say; so prior and
                data act through Adam's steps only
    closed      blind, from log-odds -3: do closed gates come back?

The rate is swept at the default learning rate of the gates, and the learning rate at one rate of the prior. That rate
falls to a hundredth, so with S gated steps a gate can move by about lr * S / 5 nats: the learning rate is how far a
blind gate can get, whatever the rate of the prior.
"""

import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.studies.cells import finished, provenance
from experiments.studies.pages import study_parser, write_page
from experiments.studies.scripts import run_script
from pyro_blora.build import build
from pyro_blora.config import RunConfig

STARTS = {"evidence": {}, "blind": {"open_logit": 3.0}, "closed": {"open_logit": -3.0}}
RATES = tuple(10.0**k for k in range(-3, 3))  # nats for one more bit of the largest tensor
BLIND_RATES = RATES[::2]
DEFAULT_RATE = RunConfig().lr_gates
LEARNING_RATES = (DEFAULT_RATE / 10, DEFAULT_RATE, DEFAULT_RATE * 10)
MIDDLE = 0.1
COLOURS = {"evidence": "#0072B2", "blind": "#D55E00", "closed": "#009E73"}  # Okabe and Ito
MARKERS = {"evidence": "o", "blind": "s", "closed": "^"}


def configuration(options, **changes) -> RunConfig:
    return RunConfig(
        task=options.task, glue_dir=options.glue_dir, backbone=options.backbone, scope="encoder", max_length=64,
        estimator="relaxed",
        max_train=options.max_train, epochs=options.epochs, kl_warmup=options.kl_warmup, draws=options.draws,
        output_dir=options.output_dir, **changes,
    )  # fmt: skip


def cells(options) -> list[tuple[str, float, float]]:
    """(start, rate of the prior, learning rate of the gates) of every run."""
    found = [("evidence", rate, DEFAULT_RATE) for rate in options.rates]
    found += [("blind", rate, DEFAULT_RATE) for rate in options.blind_rates]
    others = [lr for lr in options.learning_rates if lr != DEFAULT_RATE]
    found += [(start, MIDDLE, lr) for lr in others for start in ("evidence", "blind")]
    return found + [("closed", min(options.rates), lr) for lr in options.learning_rates if lr >= DEFAULT_RATE]


def row(start: str, config: RunConfig, cell: dict) -> dict:
    """One cell: its prior's rate, learning rate, and what the gates did."""
    result, log = cell["summary"], cell["log"]
    opening = int(config.kl_warmup * log[-1]["step"])
    gated = [x["expected_bits"] for x in log if x["step"] > opening]
    return {
        "start": start, "rate": config.prior_settings["rate"], "lr_gates": config.lr_gates,
        "bops": result["bops"]["adapted_ratio"], "interval": result["bops"]["interval"], "bits_at_start": gated[0],
        "bits": gated[-1], "score": result["metric"]["value"], "nll": result["nll"],
        "deployed_nll": result["deployed"]["nll"], "elbo": result["elbo_per_example"], "n_eval": result["n_eval"],
        "cell": cell,
    }  # fmt: skip


def study(options) -> list[dict]:
    lora = configuration(options, prior="fixed", prior_settings={"bits": 32})
    n_train, rows = build(lora).program.n_train, []
    for start, rate, lr_gates in cells(options):
        config = configuration(options, prior="bops", prior_settings={"rate": rate}, guide_settings=STARTS[start],
                               lr_gates=lr_gates, logging_steps=1)  # fmt: skip
        path = options.keep / f"dial-{options.task}-{start}-{rate:g}-{lr_gates:g}.json"
        cell = finished(path, config, lora, n_train, train=not options.only_finished)
        if cell is None:
            continue
        rows.append(row(start, config, cell))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| start | rate (nats) | gates' learning rate | E[BOPs] / adapted [94 %] | E[bits], first → last | "
             "accuracy | NLL | deployed NLL | -ELBO / N |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for x in rows:
        low, high = x["interval"]
        lines.append(
            f"| {x['start']} | {x['rate']:g} | {x['lr_gates']:g} | {x['bops']:.2%} [{low:.2%}, {high:.2%}] | "
            f"{x['bits_at_start']:.1f} → {x['bits']:.1f} | {x['score']:.3f} | {x['nll']:.3f} | "
            f"{x['deployed_nll']:.3f} | {-x['elbo']:.3f} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict]) -> str:
    """What the sweep says about the dial, in numbers."""

    def swept(start, key="rate"):
        fixed = ("lr_gates", DEFAULT_RATE) if key == "rate" else ("rate", MIDDLE)
        return sorted((x[key], math.log10(x["bops"])) for x in rows if x["start"] == start and x[fixed[0]] == fixed[1])

    lines = []
    for start in ("evidence", "blind"):
        by_rate, by_lr = swept(start), swept(start, "lr_gates")
        if len(by_rate) < 2 or len(by_lr) < 2:
            continue
        steps = [b[1] - a[1] for a, b in itertools.pairwise(by_rate)]
        span, lr_span = by_rate[0][1] - by_rate[-1][1], max(y for _, y in by_lr) - min(y for _, y in by_lr)
        largest = max(map(abs, steps), default=math.nan) / abs(span) if span else math.nan
        decades, lr_decades = (math.log10(x[-1][0] / x[0][0]) for x in (by_rate, by_lr))
        monotone = "yes" if all(step <= 0 for step in steps) else "no"
        lines.append(
            f"- `{start}`: log10 E[BOPs] falls by {span:.2f} over {decades:.0f} decades of the rate, monotone: "
            f"{monotone}; the largest of {len(steps)} steps is {largest:.0%} of the fall. "
            f"{lr_decades:.0f} decades of the gates' learning rate move it by {lr_span:.2f}."
        )
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), constrained_layout=True)
    for start in ("evidence", "blind"):
        mine = [x for x in rows if (x["start"], x["lr_gates"]) == (start, DEFAULT_RATE)]
        mine.sort(key=lambda x: x["rate"])
        style = {"color": COLOURS[start], "marker": MARKERS[start], "label": start}
        left.plot([x["rate"] for x in mine], [100 * x["bops"] for x in mine], **style)
        right.plot([100 * x["bops"] for x in mine], [x["nll"] for x in mine], **style)
        for x in mine:
            right.annotate(f"{x['rate']:g}", (100 * x["bops"], x["nll"]), fontsize=7, xytext=(3, 3),
                           textcoords="offset points")  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="rate of the prior (nats)", ylabel="E[BOPs] (% of adapted)")
    right.set(xscale="log", xlabel="E[BOPs] (% of adapted)", ylabel="NLL (nats an example)")
    left.set_title("The rate is a dial", fontsize=10)
    right.set_title("What it buys (rate beside each point)", fontsize=10)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "dial", max_train=4000, output_dir="runs/dial")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument(
        "--blind_rates", nargs="+", type=float, default=BLIND_RATES, help="of the runs without evidence"
    )
    parser.add_argument("--learning_rates", nargs="+", type=float, default=LEARNING_RATES, help="of the gates")
    parser.add_argument("--kl_warmup", type=float, default=0.7, help="share of the steps before the gates start")
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args(arguments)
    write_page(options, "dial", study(options), report, figure)


def report(options, rows: list[dict]) -> str:
    given = f"--max_train {options.max_train} --epochs {options.epochs} --kl_warmup {options.kl_warmup}"
    return f"""# Is the rate of the prior a dial?

```sh
python experiments/dial.py --glue_dir GLUE {given} --draws {options.draws} \\
    --report benchmarks/dial.md --figures benchmarks/figures
```

{options.task}, MiniLM, scope `encoder`, {options.max_train} training examples, one seed; {len(rows)} of
{len(cells(options))} cells are finished (the rest are not shown);
{provenance([row["cell"] for row in rows])}.
Standard error of the accuracy: {0.5 / rows[0]["n_eval"] ** 0.5:.3f} at most.

{table(rows)}

{summary(rows)}

![BOPs and NLL against the rate](figures/dial.png)
"""


if __name__ == "__main__":
    run_script(main)
