"""How well bit operations, bytes and a table of measured times predict the time and the size of an allocation.

One trained LoRA is exported to ONNX at twenty allocations of the prior `random`, at budgets from 5 to 80 % of the
model's bit operations, and at uniform ones; they are timed in turn, one thread. Neither time nor size depend on what
the weights are, so nothing is trained for it.
"""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from pyro_blora.bops import expected_bops
from pyro_blora.cost_table import Times, of_file
from pyro_blora.costs import latency, packed_bytes
from pyro_blora.deploy import load
from pyro_blora.deploy.measuring import measure_costs
from pyro_blora.deploy.onnx_attention import set_fast_attention
from pyro_blora.deploy.onnx_file import MODEL, write_graph
from pyro_blora.deploy.onnx_modules import in_onnx_operators
from pyro_blora.deploy.packed import WEIGHTS, load_packed
from pyro_blora.deploy.packing import pack
from pyro_blora.gates import Gates
from pyro_blora.layout import ACTIVATIONS, AdapterLayout
from pyro_blora.models.architectures import example_rows
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA

from .systems import System, opened, some_inputs
from .timing import in_turn

SHARES = (0.08, 0.12, 0.2, 0.4, 0.8)  # of the model's bit operations
SEEDS = 4
UNIFORM = ("W8A8", "W4A4", "W2A8", "W8A16", "W32A32")
SIZES = ((1, 32), (8, 128))
PREDICTORS = ("bops", "bytes", "latency")


@dataclasses.dataclass(frozen=True)
class Allocated:
    """One allocation.  predicted: by PREDICTORS; times: medians in seconds, by size; disk: bytes of the packed file."""

    name: str
    predicted: dict[str, float]
    times: dict[str, float]
    disk: int


def allocations(layout: AdapterLayout, few: bool) -> Iterator[tuple[str, Gates]]:
    """(name, gates) of all; few: five of them and one uniform one."""
    for share in SHARES:
        for seed in range(1 if few else SEEDS):
            prior = build_prior("random", layout, {"bops": share, "denominator": "model", "seed": seed})
            yield f"random {share:g} {seed}", Gates(*(q.mean for q in prior()))
    for name in UNIFORM[:1] if few else UNIFORM:
        weights, activations = map(int, name.removeprefix("W").split("A"))
        z = torch.zeros(layout.z_shape)
        for t, tensor in enumerate(layout.tensors):
            width = activations if tensor in ACTIVATIONS else weights
            z[:, t, : layout.ladder.index(width)] = 1.0
        yield name, Gates(z, torch.ones(layout.g_shape))


@torch.no_grad()
def study(run: Path, folder: Path, seconds: float, few: bool) -> list[Allocated]:
    """All allocations, exported and timed."""
    program = load(run)
    layout = program.layout
    tables = {}
    for batch, length in SIZES:
        path = folder / f"costs-{batch}x{length}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            measure_costs(path, batch=batch, length=length)
        tables[batch, length] = latency(layout, Times(of_file(str(path))["times"]))
    size, found, calls = packed_bytes(layout), {}, {}
    for name, gates in allocations(layout, few):
        program.gate_guide.deployed = lambda gates=gates: gates
        made = folder / name.replace(" ", "-")
        if not made.exists():
            pack(program, made)
        if not (made / MODEL).exists():
            model = load_packed(made)
            set_fast_attention(model)
            in_onnx_operators(model, fast=True)
            write_graph(model, batch_of(program), program, made / MODEL, fast=True)
        z, g = gates
        predicted = {"bops": expected_bops(layout, z, g).model_ratio.item(), "bytes": float(size(z, g).sum())}
        predicted |= {f"latency {batch} x {length}": float(table(z, g).sum())
                      for (batch, length), table in tables.items()}  # fmt: skip
        calls[name] = opened(System(name, "onnx", str(made / MODEL)), 1)
        found[name] = predicted, (made / WEIGHTS).stat().st_size
    times: dict[str, dict[str, float]] = {name: {} for name in calls}
    for batch, length in SIZES:
        inputs = some_inputs(batch, length)
        taken = in_turn({name: partial(call, inputs) for name, call in calls.items()}, seconds=seconds)
        for name, each in taken.items():
            times[name][f"{batch} x {length}"] = float(np.median(each))
    return [Allocated(name, predicted, times[name], disk) for name, (predicted, disk) in found.items()]


def batch_of(program: BayesianLoRA) -> dict[str, torch.Tensor]:
    """Inputs to trace with."""
    rows = program.net.head.example(example_rows(program.net.backbone, 2, 16, varied=True))
    return dict(sorted(rows.items()))


def finished(path: Path, run: Path, folder: Path, seconds: float, few: bool) -> list[Allocated]:
    """The study in the file, or a new one."""
    if not path.exists():
        path.write_text(json.dumps([dataclasses.asdict(x) for x in study(run, folder, seconds, few)], indent=1) + "\n")
    return [Allocated(**each) for each in json.loads(path.read_text())]


def correlations(found: list[Allocated]) -> list[tuple[str, str, float, float]]:
    """(predictor, of what, Spearman, Pearson) over the random allocations."""
    random = [each for each in found if each.name.startswith("random")]
    lines = []
    for batch, length in SIZES:
        at = f"{batch} x {length}"
        measured = [each.times[at] for each in random]
        for predictor in ("bops", "bytes", f"latency {at}"):
            predicted = [each.predicted[predictor] for each in random]
            lines.append((predictor, f"time at {at}", stats.spearmanr(predicted, measured).statistic,
                          stats.pearsonr(predicted, measured).statistic))  # fmt: skip
    disk = [each.disk for each in random]
    for predictor in ("bops", "bytes"):
        predicted = [each.predicted[predictor] for each in random]
        lines.append((predictor, "bytes of the packed file", stats.spearmanr(predicted, disk).statistic,
                      stats.pearsonr(predicted, disk).statistic))  # fmt: skip
    return lines
