"""The cells of the studies of allocations: a method at a budget of bit operations, of a task and a seed.

All methods of a task and seed go on from one LoRA, in the same data order, for the same number of steps:

    lora        no quantization
    no_dropout  the same, without dropout from where the others are quantized on, as these have none there
    uniform     quantization-aware LoRA: every weight at one width, every activation at one width
    post        the same widths, but set after training: ranges are fitted in the last step only
    random      rungs closed at random down to the same BOPs, then as `uniform`
    hessian     widths by Hessian traces and an integer program, as HAWQ-V2, then as `uniform` (studies/peers.py)
    greedy      widths and ranks by measured divergence, a start of AutoQRA, then as `uniform` (studies/peers.py)
    start       prior `budget` at the BOPs of the uniform allocation, a cold posterior; what is deployed where its gates
                start, from the Fisher information, then as `uniform`
    rested      the same for half of these steps; then gates learn, to the end
    budget      gates that learn in the first half of these steps; then as `uniform` at what is deployed
    rewound     what `budget` deploys, from the LoRA on as `uniform`: weights that did not train beside moving gates

Scope is `encoder`. CoLA has all of its rows (`--all_rows`) and twice the epochs (`--twice`), as MiniLM learns nothing
of it in two from one seed of three; MRPC and CoLA train in bfloat16 (`--bf16`).
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies import peers
from experiments.studies.cells import finished, folder_of, kept, settings_of, trained
from pyro_blora.bit_widths import LADDER, written
from pyro_blora.bops import expected_bops
from pyro_blora.build import build
from pyro_blora.config import RunConfig
from pyro_blora.files import replace_text
from pyro_blora.layout import ACTIVATIONS, AdapterLayout
from pyro_blora.priors import build_prior
from pyro_blora.priors.allocation import RANK, Widths, of_run

OPEN = ("lora", "no_dropout")  # nothing is quantized: they have no budget
METHODS = (*OPEN, "uniform", "start", "rested", "budget", "rewound", "random", "post", "hessian", "greedy")
EVERY = (*METHODS, "exact_hessian")  # the last only where it is asked for: studies/hessian.py has the reason
COLD = 0.1  # weight of the KL: what is deployed is one allocation, so the posterior is kept near its mode
SECONDS = {  # of a step, of a peer's measurements, of a run's other phases, on one core, for --plan
    "open": 0.5, "gated": 1.2, "hessian": 60.0, "exact_hessian": 150.0, "greedy": 250.0, "other": 45.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Budget:
    """A share of the model's bit operations, and the prior of the uniform allocation that has it, where one does."""

    name: str
    share: float
    prior: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def uniform_budget(name: str, layout: AdapterLayout) -> Budget:
    """`W4A8`: 4 bit for weights, 8 for activations. A width between two rungs is a mix of both, layer by layer."""
    weights, activations = map(int, name.removeprefix("W").split("A"))
    prior, settings = "fixed", {"bits": weights, "activation_bits": activations}
    if weights not in layout.ladder:
        prior, settings = "allocation", {"widths": mixed_widths(layout, weights, activations)}
    means = (q.mean for q in build_prior(prior, layout, settings)())
    return Budget(name, expected_bops(layout, *means).model_ratio.item(), prior, settings)


def mixed_widths(layout: AdapterLayout, weights: int, activations: int) -> Widths:
    """Every second layer's weights on the rung above `weights`, the first one's among them; the others' below."""
    above = min(width for width in layout.ladder if width > weights)
    below = max(width for width in layout.ladder if width < weights)
    return {
        name: {RANK: layout.rank}
        | {t: activations if t in ACTIVATIONS else (below if p.layer % 2 else above) for t in layout.tensors}
        for name, p in zip(layout.names, layout.projections, strict=True)
    }


def epochs(options: argparse.Namespace, task: str) -> int:
    return int(2 * options.epochs if task in options.twice else options.epochs)


def methods_of(options: argparse.Namespace) -> list[str]:
    """What the page of the allocation study has rows of: of these methods, those asked for are trained."""
    return [method for method in EVERY if method in METHODS or method in options.cells]


class Cells:
    """Finds the cells of a study in the folder `--keep`, and trains those that are missing."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.keep
        self.layout_and_rows = functools.cache(self._layout_and_rows)

    def _layout_and_rows(self, task: str) -> tuple[AdapterLayout, int]:
        """Of every seed; kept beside the cells, so that pages are written without data and models."""
        path, config = self.folder / f"{task}.layout.json", self.opened(task, self.options.seeds[0])
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if settings_of(dataclasses.replace(RunConfig.from_dict(known["config"]), seed=config.seed)) == settings_of(
                config
            ):
                return AdapterLayout.from_dict(known["layout"]), known["rows"]
        program = build(config).program
        if not (path.exists() or self.options.only_finished):
            path.parent.mkdir(parents=True, exist_ok=True)
            found = {"config": settings_of(config), "rows": program.n_train, "layout": program.layout.to_dict()}
            replace_text(path, json.dumps(found) + "\n")
        return program.layout, program.n_train

    def uniform(self, task: str, name: str) -> Budget:
        return uniform_budget(name, self.layout_and_rows(task)[0])

    def lora(self, task: str, seed: int) -> RunConfig:
        return self._config(task, seed, {"prior": "fixed", "prior_settings": {"bits": 32}})

    def opened(self, task: str, seed: int) -> RunConfig:
        """The quantized runs with every gate open: it has their layout, and at it peers measure."""
        return self.lora(task, seed)

    def _config(self, task: str, seed: int, changes: dict[str, Any]) -> RunConfig:
        options = self.options
        return RunConfig(**{
            "task": task, "glue_dir": options.glue_dir, "backbone": options.backbone, "scope": "encoder", "seed": seed,
            "max_train": None if task in options.all_rows else options.max_train, "epochs": epochs(options, task),
            "kl_warmup": options.kl_warmup, "max_length": 64, "draws": options.draws, "output_dir": options.output_dir,
            "precision": "bf16" if task in options.bf16 else "float32",
            "granularity": options.granularity, "bit_widths": options.bit_widths, **changes,
        })  # fmt: skip

    def config(self, task: str, seed: int, method: str, budget: Budget | None = None) -> RunConfig | None:
        """The run of one cell; None for a peer's that nothing is measured for yet."""
        if method == "no_dropout":
            return dataclasses.replace(self.lora(task, seed), gated_dropout=False)
        if method == "lora" or budget is None:
            return self.lora(task, seed)
        if method == "rewound" or method in peers.PEERS:
            widths = (
                self._learned(task, seed, budget) if method == "rewound" else
                peers.allocation(method, self.folder, f"{task}-{seed}", budget.name, self.opened(task, seed),
                                 self.layout_and_rows(task)[0], budget.share, keep=not self.options.only_finished)
            )  # fmt: skip
            own = {"prior": "allocation", "prior_settings": {"widths": widths}}
            return None if widths is None else self._quantized(task, seed, own)
        target = {"bops": budget.share, "denominator": "model"}
        uniform = {"prior": budget.prior, "prior_settings": budget.settings}
        learned = {"prior": "budget", "prior_settings": target, "kl_weight": COLD}
        quantized = 1 - self.options.kl_warmup  # share of the steps
        changes: dict[str, dict[str, Any]] = {
            "uniform": uniform,
            "post": {**uniform, "kl_warmup": 0.9999},
            "random": {"prior": "random", "prior_settings": {**target, "seed": seed}},
            "budget": {**learned, "settle": round(quantized / 2, 6)},
            "start": {**learned, "settle": round(quantized, 6)},
            "rested": {**learned, "rest": round(quantized / 2, 6), "settle": 0.0},
        }
        return self._quantized(task, seed, changes[method])

    def _learned(self, task: str, seed: int, budget: Budget) -> Widths | None:
        """What the run of `budget` deploys, kept beside its cell; None where neither is there."""
        path = self.path(task, seed, "rewound", budget).with_suffix(".widths.json")
        if not path.exists():
            config = self.config(task, seed, "budget", budget)
            if config is None or not folder_of(config).exists():
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(of_run(str(folder_of(config)))["widths"], indent=1) + "\n")
        found: Widths = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _quantized(self, task: str, seed: int, changes: dict[str, Any]) -> RunConfig:
        """Dropout is off once gates have started, for every method as for learned gates."""
        return self._config(task, seed, {"gated_dropout": False, **changes})

    def path(self, task: str, seed: int, method: str, budget: Budget | None = None) -> Path:
        return self.folder / f"{task}-{seed}-{budget.name if budget else 'full'}-{method}.json"

    def cell(
        self, task: str, seed: int, method: str, budget: Budget | None = None, *, train: bool = True
    ) -> dict | None:
        """The finished cell; where it is missing, trained, or None."""
        train = train and not self.options.only_finished
        lora, path = self.lora(task, seed), self.path(task, seed, method, budget)
        if train and method in peers.PEERS and not path.exists():
            peers.measure(method, self.opened(task, seed), lora, self.folder, f"{task}-{seed}")
        if train and method == "rewound" and self.config(task, seed, method, budget) is None:
            learned = self.config(task, seed, "budget", budget)
            assert learned is not None
            trained(learned, lora, self.layout_and_rows(task)[1])
        config = self.config(task, seed, method, budget)
        return None if config is None else finished(path, config, lora, self.layout_and_rows(task)[1], train=train)

    def is_finished(self, task: str, seed: int, method: str, budget: Budget | None = None) -> bool:
        config = self.config(task, seed, method, budget)
        return config is not None and kept(self.path(task, seed, method, budget), config) is not None

    def minutes(self, task: str, method: str) -> float:
        """A guess of a cell's time on one core without what it shares with others."""
        steps = self.layout_and_rows(task)[1] // 16 * epochs(self.options, task)
        share = 1e-4 if method == "post" else 1 - self.options.kl_warmup
        kind = "open" if method in (*OPEN, "post") else "gated"
        at_open = steps * (1 - self.options.kl_warmup - share) if method == "post" else 0.0
        return (steps * share * SECONDS[kind] + at_open * SECONDS["open"] + SECONDS["other"]) / 60

    def shared_minutes(self, task: str, methods: tuple[str, ...]) -> float:
        """Of a seed: its LoRA up to where gates start, and what peers measure there."""
        steps = self.layout_and_rows(task)[1] // 16 * epochs(self.options, task)
        measured = sum(SECONDS[method] for method in methods if method in peers.PEERS)
        return (steps * self.options.kl_warmup * SECONDS["open"] + measured) / 60


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of `Cells` that `study_parser` does not have."""
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--all_rows", nargs="*", default=["cola"], help="tasks that --max_train does not cut")
    parser.add_argument("--twice", nargs="*", default=["cola"], help="tasks that train for twice the --epochs")
    bf16 = "tasks whose backbone runs in bfloat16: faster on a CPU that can multiply it"
    parser.add_argument("--bf16", nargs="*", default=["mrpc", "cola"], help=bf16)
    parser.add_argument("--kl_warmup", type=float, default=0.4, help="share of the steps before the gates start")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--granularity", default="tensor", help="of all methods' ranges: tensor or channel")
    parser.add_argument("--bit_widths", default=written(LADDER), help="rungs of all methods' ladders")
    parser.add_argument("--plan", action="store_true", help="count what is missing, with minutes, and train nothing")
    parser.set_defaults(keep=Path("benchmarks/cells/allocation"))


Wanted = Iterator[tuple[str, int, str, Budget | None]]


def plan(cells: Cells, wanted: Wanted) -> str:
    """How many of the wanted cells are missing, and a guess of the minutes they take, by task."""
    lines, missing, total = [], 0, 0.0
    by_task: dict[str, list[tuple[int, str]]] = {}
    count: dict[str, int] = {}
    for task, seed, method, budget in wanted:
        count[task] = count.get(task, 0) + 1
        if not cells.is_finished(task, seed, method, budget):
            by_task.setdefault(task, []).append((seed, method))
    for task, number in count.items():
        left = by_task.get(task, [])
        each = [cells.minutes(task, method) for _, method in left]
        shared = [
            cells.shared_minutes(task, tuple({m for s, m in left if s == seed}))
            for seed in sorted({s for s, _ in left})
        ]
        missing, total = missing + len(left), total + sum(each) + sum(shared)
        each_told = f"{np.median(each):.1f} minutes a cell, " if each else ""
        lines.append(f"{task}: {len(left)} of {number} cells missing, {each_told}{sum(each) + sum(shared):.0f} in all")
    return "\n".join([*lines, f"{missing} cells missing, about {total / 60:.1f} hours on one core"])
