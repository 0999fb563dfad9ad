"""Allocations of others at the same bit operations, found where the gates start, from training examples alone.

    hessian     widths by the average Hessian trace and an integer program, as HAWQ-V2 (studies/hessian.py), the Hessian
                by Gauss and Newton
    exact_hessian   the same with the Hessian itself
    greedy      widths and ranks by measured divergence, closed one by one, as a start of AutoQRA (studies/greedy.py)

What is measured of a task and seed serves every budget, and is kept in one JSON file; the allocation of a budget is
another, which `pyro-blora train --prior allocation --prior.file` reads.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.studies.cells import settings_of, trunk
from experiments.studies.greedy import Move, allocation_at, closing_path, divergence_of, increments_of
from experiments.studies.hessian import gauss_newton_traces, hessian_traces, mean_squared_errors, sensitivities
from experiments.studies.integer_program import cheapest
from pyro_blora.adapters import start_smoothing
from pyro_blora.build import Parts, build
from pyro_blora.checkpoint import read_tensors, trainable
from pyro_blora.config import RunConfig
from pyro_blora.files import replace_text
from pyro_blora.gates import Gates
from pyro_blora.layout import AdapterLayout
from pyro_blora.priors.allocation import Widths, table_of
from pyro_blora.progress import phase
from pyro_blora.tasks.batching import epoch_order, lengths_of, loader, on_device
from pyro_blora.training import Schedule
from pyro_blora.training.range_calibration import range_errors

PEERS = ("hessian", "greedy", "exact_hessian")
EXAMPLES = {"hessian": 256, "greedy": 64, "exact_hessian": 64}  # that traces and divergences are of
BATCH = {"hessian": 8, "greedy": 16, "exact_hessian": 8}  # of a trace, as each batch has signs of its own
_RANGE_BATCHES = 4  # that ranges are fitted to, as where gates start


def allocation(
    method: str, folder: Path, name: str, budget: str, config: RunConfig, layout: AdapterLayout, bops: float, *,
    keep: bool = True,
) -> Widths | None:  # fmt: skip
    """The table of a peer's allocation at a share of the model's BOPs; None where nothing is measured yet.

    folder: where `measure` left its file, of the same name and configuration. budget: what the budget is called.
    keep: leave the table there, too.
    Errors: ValueError for what was measured of another configuration.
    """
    measured, path = _measured(folder, name, method), folder / f"{name}-{budget}-{method}.widths.json"
    if measured.exists():
        _require_same(measured, config)
    elif not path.exists():
        return None
    if path.exists():
        table = path.read_text(encoding="utf-8")
    else:
        gates = _allocated(method, layout, json.loads(measured.read_text(encoding="utf-8")), bops)
        table = json.dumps(table_of(layout, *gates), indent=1) + "\n"
        if keep:
            replace_text(path, table)
    found: Widths = json.loads(table)
    return found


def measure(method: str, config: RunConfig, lora: RunConfig, folder: Path, name: str) -> None:
    """Measure what a peer allocates by, at the shared LoRA where its gates would start; kept in `folder`.

    config: nothing is quantized, as in `lora`, but rungs, ranges and smoothing are those of the runs at the allocation.
    """
    path = _measured(folder, name, method)
    if path.exists():
        _require_same(path, config)
        return
    parts = build(config)
    program = parts.program.eval()
    _restore(program, trunk(lora, Schedule.of(lora, len(parts.rows["train"]))))
    fitted = _batches(parts, _RANGE_BATCHES, config.batch_size, epoch=-1)
    start_smoothing(program.net, (inputs for inputs, _ in fitted))
    ranges = range_errors(program, fitted).best_by_width()
    batches = _batches(parts, EXAMPLES[method] // BATCH[method], BATCH[method], epoch=-2)
    found: dict[str, Any] = {"lora": settings_of(config), "examples": sum(len(labels) for _, labels in batches)}
    if method == "greedy":
        divergence = divergence_of(program, batches, ranges)
        increments = increments_of(program.layout, divergence)
        found["path"] = closing_path(program.layout, increments, divergence)
        found["increments"] = [[*move, rise] for move, rise in increments.items()]
    else:
        traces_of = gauss_newton_traces if method == "hessian" else hessian_traces
        with phase("measuring curvatures"):
            traces = traces_of(program, batches, probes=1, seed=config.seed)
            errors = mean_squared_errors(program, batches, ranges)
        found |= {"traces": traces.tolist(), "sensitivities": sensitivities(traces, errors).tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(found) + "\n")


def _measured(folder: Path, name: str, method: str) -> Path:
    return folder / f"{name}-{method}.measured.json"


def _require_same(path: Path, config: RunConfig) -> None:
    known = settings_of(RunConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["lora"]))
    if known != settings_of(config):
        wrong = sorted(key for key, value in settings_of(config).items() if known[key] != value)
        raise ValueError(f"{path} is of another configuration ({', '.join(wrong)} differ): give another --keep")


def _allocated(method: str, layout: AdapterLayout, found: dict[str, Any], bops: float) -> Gates[Tensor]:
    if method != "greedy":
        return cheapest(layout, torch.tensor(found["sensitivities"], dtype=torch.float64), bops)
    increments = {Move(*map(int, move)): rise for *move, rise in found["increments"]}
    return allocation_at(layout, [Move(*move) for move in found["path"]], increments, bops)


@torch.no_grad()
def _restore(program: torch.nn.Module, checkpoint: Path) -> None:
    """Put the parameters of a checkpoint into a program, but for ranges if they are of other tensors or rows."""
    found = read_tensors(checkpoint)[0]
    for name, parameter in trainable(program).items():
        known = found.get(f"parameter/{name}")
        if known is not None and known.shape == parameter.shape:
            parameter.copy_(known)


def _batches(parts: Parts, count: int, size: int, epoch: int) -> list[tuple[dict, Tensor]]:
    """Batches of training rows of similar length, in an order of their own."""
    rows, config = parts.tokens["train"], parts.config
    order = epoch_order(len(rows), size, 1, config.seed, epoch, lengths_of(rows))[:count]
    return list(on_device(loader(rows, parts.collate, order), torch.device("cpu")))
