"""What runs in a process of its own: python -m experiments.on_gpu.child

It reads requests from its input, a line each: ["function", {its arguments}, "file of the result"].
"""

import collections
import dataclasses
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def train(config: dict) -> dict:
    """One run by `train_run`; its posterior is opened, its adapter loaded and asked again."""
    import torch

    from pyro_blora import RunConfig
    from pyro_blora.posterior.arviz_compat import group_names, read
    from pyro_blora.run import train_run

    if os.environ.get("ON_GPU_DETERMINISTIC"):
        torch.use_deterministic_algorithms(True)
    began = time.monotonic()
    folder = train_run(RunConfig(**config))
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    posterior = read(folder / "posterior.nc")
    return {
        "folder": str(folder), "metric": summary["metric"], "nll": summary["nll"],
        "deployed": summary["deployed"].get("metric"), "bops": summary["bops"],
        "training_s": summary["seconds"]["training"], "evaluation_s": summary["seconds"]["evaluation"],
        "first_step_s": round(lines[0]["seconds"], 2), "steps": lines[-1]["step"],
        "peak_MiB": round(summary["peak_memory_bytes"] / 2**20), "groups": group_names(posterior),
        "reload": _reloaded(folder, config), "page": (folder / "report.html").is_file(),
        "command_s": round(time.monotonic() - began, 1),
    }  # fmt: skip


def _reloaded(folder: Path, config: dict) -> dict:
    """Deployed predictions of the loaded run against those in its predictions.parquet."""
    import pandas as pd
    import torch

    from pyro_blora import RunConfig, load, predict
    from pyro_blora.build import build
    from pyro_blora.tasks.batching import by_length, on_device

    program = load(folder, allow_code=[config["backbone"]])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    program.to(device)
    parts = build(RunConfig(**config))
    load_, order = by_length(parts.tokens["eval"], parts.collate, 2 * config["batch_size"])
    found = predict(program, on_device(load_, torch.device(device))).restored(order)
    table = pd.read_parquet(folder / "predictions.parquet")
    gap = abs(found.log_score.numpy() - table["deployed_log_likelihood"].to_numpy()).max()
    told, decision = {"largest gap of log-likelihoods": float(gap)}, found.decision.numpy()
    if decision.shape == (len(table),):  # not the tokens of a text, nor the ends of a span
        told["decisions changed"] = int((decision != table["deployed_decision"].to_numpy()).sum())
    return told


def bench(name: str, setting: dict, seconds: float) -> dict:
    """Rows of one measurement of fast.py."""
    from experiments.bench.networks import Setting

    from . import fast

    rows: Iterable[Any] = fast.MEASURES[name](Setting(**setting), seconds)
    return {"rows": [dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row for row in rows]}


def syncs(config: dict) -> dict:
    """Host synchronizations of the training loop by place, counted by PyTorch's own warning mode."""
    import torch

    from pyro_blora import RunConfig, fit

    places = collections.Counter()

    def note(message, category, filename, lineno, file=None, line=None):
        if "synchronizing CUDA operation" in str(message):
            short = filename.split("site-packages/")[-1].split("/pyro_blora/")[-1]
            places[f"{short}:{lineno}"] += 1

    config = RunConfig(**config)
    fit(config, quiet=True, until=1)  # compiled, warm
    warnings.showwarning = note
    warnings.simplefilter("always")
    found = {}
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
    for until in (4, 8):  # the difference is that of four steps
        places.clear()
        fit(config, quiet=True, until=until)
        found[until] = dict(places)
    more = {place: (count - found[4].get(place, 0)) / 4 for place, count in found[8].items()}
    more = {place: round(x, 2) for place, x in sorted(more.items(), key=lambda pair: -pair[1]) if x > 0}
    return {"a step": round(sum(more.values()), 2), "places": more}


def _released() -> None:
    """What one request has left, before the next one takes memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    for line in sys.stdin:
        function, arguments, result = json.loads(line)
        found = json.dumps(globals()[function](**arguments))
        _released()
        Path(f"{result}.part").write_text(found)
        os.replace(f"{result}.part", result)  # whole, once it has its name
