"""One run, from a configuration to a finished folder, and the table a user sees at the end.

The folder is filled under a temporary name (`.<name>.partial`), from which an interrupted run resumes, and renamed when
everything is there. A finished run is never overwritten.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import accelerate
import pandas as pd
import torch
from tqdm.auto import tqdm

from .arviz_data import concatenate, read, save
from .bops import expected_bits, expected_bops, expected_rank
from .build import build, check_names
from .checkpoint import trainable
from .config import RunConfig
from .data import batches_by_length, by_length, loader, on_device, take
from .exporting import export
from .gates import Gates
from .inference_data import to_arviz
from .posterior import ECE_BINS, Prediction, bops, deployed, draw, marginals, mean_kl, predict
from .processes import gathered, own_share, sharding_wanted
from .program import BayesianLoRA
from .ranges import clipped
from .report import write_report
from .show import show_run
from .training import Trained, fit

_INTERVAL = (0.03, 0.97)  # ArviZ's usual 94 %
_BOPS_DRAWS = 1000  # bit operations need no forward, so their interval can afford many
_ELBO_EXAMPLES, _ELBO_DRAWS = 512, 4  # training rows and discrete draws behind elbo_per_example
_RANGE_EXAMPLES = 128  # training rows on which clipped values are counted
_AVERAGED = {"gates": "the gates", "dropout": "the gates and of dropout masks"}
_PACKAGES = ("pyro-blora", "torch", "pyro-ppl", "transformers", "peft", "accelerate", "datasets", "arviz", "numpy")


def train_run(config: RunConfig) -> Path:
    """Train, evaluate and save one run; returns its folder, which the main process writes when training has ended.

    Errors: FileExistsError for a finished run; ValueError for whatever in the configuration cannot work. Neither leaves
    anything behind.
    """
    folder = Path(config.output_dir) / config.folder_name
    if folder.exists():
        raise FileExistsError(
            f"{folder} is a finished run already: look at it with `pyro-blora show {folder}`, or change --seed or "
            "--output_dir to run again"
        )
    check_names(config)
    _complete(config, folder)
    if accelerate.PartialState().is_main_process:
        show_run(folder)
    return folder


def _complete(config: RunConfig, folder: Path) -> None:
    """Train or resume the run and its restarts under a temporary name, and rename it when everything is there."""
    partial = folder.with_name(f".{folder.name}.partial")
    restarts = [(one, partial / "restarts" / f"seed-{one.seed}") for one in each_restart(config)]
    for one, place in restarts:
        if not place.exists():
            _complete(one, place)
    trained, began = fit(config, folder=partial), time.perf_counter()
    evaluated = _evaluate(trained)  # by all processes
    if accelerate.PartialState().is_main_process:
        summary = _write(trained, evaluated, partial, [place for _, place in restarts])
        summary["seconds"]["evaluation"] = round(time.perf_counter() - began, 2)
        (partial / "config.json").write_text(config.to_json(versions=versions()), encoding="utf-8")
        (partial / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder)
        write_report(folder)  # last: a run does not wait for its page
    accelerate.PartialState().wait_for_everyone()


def each_restart(config: RunConfig) -> list[RunConfig]:
    """The further fits, each as a run of its own: from another seed, with the same training rows."""
    rows = config.seed if config.data_seed is None else config.data_seed
    seeds = range(config.seed + 1, config.seed + config.restarts)
    return [dataclasses.replace(config, seed=seed, data_seed=rows, restarts=1) for seed in seeds]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found


class _Evaluated(NamedTuple):
    """What takes forwards of the network, on every process.

    draws: of the gates; pairs: averaged over them, and deployed, by split; fitted: of training rows; beyond (L, T);
    by_rank: scores of every rank, where the guide serves them.
    """

    draws: Gates
    pairs: dict[str, tuple[Prediction, Prediction]]
    fitted: Prediction
    beyond: torch.Tensor
    by_rank: list[dict]


def _evaluate(trained: Trained) -> _Evaluated:
    parts, program, seed = trained.parts, trained.program, trained.parts.config.seed
    draws = draw(program, parts.config.draws, seed=seed)
    pairs = {split: _averaged_and_deployed(trained, split, draws) for split in parts.tokens if split != "train"}
    train = take(parts.tokens["train"], _ELBO_EXAMPLES, seed)
    fitted = _predict(trained, "train", draw(program, _ELBO_DRAWS, seed=seed), train)
    rows = take(parts.tokens["train"], _RANGE_EXAMPLES, seed)
    load, _ = by_length(rows, parts.tokenizer, 2 * parts.config.batch_size)
    beyond = clipped(program, on_device(load, program.log_scale.device))
    by_rank = _by_rank(trained) if getattr(program.gate_guide, "serves_every_rank", False) else []
    return _Evaluated(draws, pairs, fitted, beyond, by_rank)


def _write(trained: Trained, evaluated: _Evaluated, folder: Path, restarts: list[Path]) -> dict:
    """Posterior, adapter and predictions into the folder; returns the summary.

    restarts: folders of finished runs, the further chains.
    """
    parts, program, config = trained.parts, trained.program, trained.parts.config
    shutil.rmtree(folder / "adapter", ignore_errors=True)  # of a run that was cut off while it was finishing
    draws, pairs, fitted, beyond, by_rank = evaluated
    prediction, at_mode = pairs["eval"]
    data = to_arviz(program, draws, prediction, labels=parts.task.labels, clipped=beyond, seed=config.seed)
    if restarts:
        data = concatenate([data, *map(read, restarts)], [config.seed, *(one.seed for one in each_restart(config))])
    save(data, folder / "posterior.nc")
    export(_unsharded(trained), folder / "adapter")
    for split, pair in pairs.items():
        name = "predictions.parquet" if split == "eval" else f"predictions_{split.removeprefix('eval_')}.parquet"
        _table(trained, split, *pair).to_parquet(folder / name)
    summary = _summary(trained, prediction, at_mode, fitted)
    if restarts:
        summary["restarts"] = [_of_restart(place) for place in restarts]
    for split, (predicted, _) in pairs.items():
        if split != "eval":
            summary[split] = _scores(trained, predicted)
    if by_rank:
        summary["by_rank"] = by_rank
    return summary


def _of_restart(folder: Path) -> dict:
    """What of a restart's summary stands in that of the run."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {key: summary[key] for key in ("seed", "metric", "nll", "ece", "elbo_per_example", "bops", "deployed")}


def _averaged_and_deployed(trained: Trained, split: str, draws: Gates) -> tuple[Prediction, Prediction]:
    config, mode = trained.parts.config, Gates(*(x[None] for x in deployed(trained.program)))
    if config.average_over == "dropout":
        return _predict(trained, split, draws, dropout_seed=config.seed), _predict(trained, split, mode)
    # the deployed allocation goes along as one more draw, and shares a forward with those that equal it
    both = _predict(trained, split, Gates(*(torch.cat(pair) for pair in zip(draws, mode, strict=True))))
    return both.of_draws(slice(config.draws)), both.of_draws(slice(config.draws, None))


def _by_rank(trained: Trained) -> list[dict]:
    """Scores of the deployed bit widths with the same rank everywhere, from 1 to R."""
    layout, z = trained.program.layout, deployed(trained.program).z
    ranks = torch.arange(layout.rank, device=z.device)
    g = (ranks[:-1] < ranks[:, None, None]).float().expand(-1, *layout.g_shape)  # (R, L, R - 1)
    gates = Gates(z.expand(layout.rank, *z.shape), g)
    prediction, bops = _predict(trained, "eval", gates), expected_bops(layout, *gates)
    return [
        {
            "rank": i + 1, **_scores(trained, prediction.of_draws(slice(i, i + 1))),
            "bops": {"adapted_ratio": float(bops.adapted_ratio[i]), "model_ratio": float(bops.model_ratio[i])},
        }
        for i in range(layout.rank)
    ]  # fmt: skip


def _predict(trained: Trained, split: str, draws: Gates, rows=None, dropout_seed: int | None = None) -> Prediction:
    """Of all rows, on every process, which each predicts some of."""
    rows = trained.parts.tokens[split] if rows is None else rows
    mine = own_share(batches_by_length(rows, 2 * trained.parts.config.batch_size))
    load = on_device(loader(rows, trained.parts.tokenizer, mine), trained.program.log_scale.device)
    bar = tqdm(load, desc=f"predict {split}", total=len(mine), leave=False, dynamic_ncols=True,
               disable=not accelerate.PartialState().is_main_process)  # fmt: skip
    prediction = predict(trained.program, bar, gates=draws, dropout_seed=dropout_seed)
    parts = gathered((prediction, [i for batch in mine for i in batch]))
    order = torch.tensor([i for _, numbers in parts for i in numbers])
    return Prediction.joined([part for part, _ in parts]).restored(order)


def _unsharded(trained: Trained) -> BayesianLoRA:
    """The trained program; of a sharded one a copy in this process's memory."""
    if not sharding_wanted():
        return trained.program
    copy = build(trained.parts.config).program
    with torch.no_grad():
        for mine, learned in zip(trainable(copy).values(), trainable(trained.program).values(), strict=True):
            mine.copy_(learned)
    return copy.eval()


def _scores(trained: Trained, prediction: Prediction) -> dict:
    """The metric's own numbers, the headline first, and calibration."""
    task = trained.parts.task
    decision, labels = prediction.decision.tolist(), prediction.labels.tolist()
    scores = task.metric().compute(predictions=decision, references=labels)
    correct = None if task.is_regression else float((prediction.decision == prediction.labels).double().mean())
    calibration = prediction.calibration()
    return {
        "metric": {"name": task.metric_name, "value": scores[task.metric_name]},
        "scores": scores,
        "accuracy": correct,
        "nll": prediction.nll,
        "ece": {"value": calibration["ece"], "bins": ECE_BINS},
        "brier": calibration["brier"],
    }


def _table(trained: Trained, split: str, prediction: Prediction, at_mode: Prediction) -> pd.DataFrame:
    """One line an example: its text, label, decision, and mean probability of each class (or mean and spread).

    `log_likelihood` is the log of the density averaged over draws, as in `nll`; `deployed_*`: of the one allocation.
    """
    task = trained.parts.task
    table = trained.parts.rows[split].to_pandas()
    table["decision"] = prediction.decision.numpy()
    if task.is_regression:
        table["std_over_draws"] = prediction.outputs.squeeze(-1).std(0, correction=0).numpy()
    else:
        for index, label in enumerate(task.labels):
            table[f"p_{label}"] = prediction.mean[:, index].numpy()
    table["log_likelihood"] = prediction.log_score.numpy()
    table["deployed_decision"], table["deployed_log_likelihood"] = at_mode.decision.numpy(), at_mode.log_score.numpy()
    return table


@torch.no_grad()
def _summary(trained: Trained, prediction: Prediction, at_mode: Prediction, fitted: Prediction) -> dict:
    program, config = trained.program, trained.parts.config
    net, layout, (z, g) = program.net, program.net.layout, marginals(program)
    learning = [*net.adapter_parameters(), *net.head_parameters()]
    kl_z, kl_g = mean_kl(program, seed=config.seed)
    expected, at = bops(program), expected_bops(layout, *deployed(program))
    ratios = expected_bops(layout, *draw(program, _BOPS_DRAWS, seed=config.seed)).adapted_ratio.cpu()
    bits, ranks = expected_bits(layout, z).cpu(), expected_rank(g).cpu()
    kinds = {p.type: [i for i, q in enumerate(layout.projections) if q.type == p.type] for p in layout.adapted}
    return {
        "task": config.task,
        "backbone": config.backbone,
        "method": config.method,
        "prior": "+".join(config.prior_names),
        "guide": config.guide,
        "seed": config.seed,
        "n_train": program.n_train,
        "n_eval": len(prediction.labels),
        **_scores(trained, prediction),
        "draws": config.draws,
        "averaging": f"mean of predicted probabilities over {config.draws} draws of {_AVERAGED[config.average_over]}",
        "deployed": _scores(trained, at_mode),
        "prior_state": program.prior.report() if hasattr(program.prior, "report") else {},
        "elbo_per_example": float(fitted.log_likelihood.mean()) - (kl_z + kl_g) / program.n_train,
        "kl": {"z": kl_z, "g": kl_g},
        "bops": {
            "adapted_ratio": float(expected.adapted_ratio),
            "model_ratio": float(expected.model_ratio),
            "interval": [float(ratios.quantile(p)) for p in _INTERVAL],
            "deployed": {"adapted_ratio": float(at.adapted_ratio), "model_ratio": float(at.model_ratio)},
        },
        "expected_bits": {
            tensor: float(bits[program.z_mask.cpu()[:, t], t].mean()) for t, tensor in enumerate(layout.tensors)
            if program.z_mask[:, t].any()
        },
        "expected_rank": {kind: float(ranks[rows].mean()) for kind, rows in kinds.items()},
        "adapter_parameters": sum(
            (p.in_features + p.out_features) * (1 + int((g[i] > 0.5).sum()))
            for i, p in enumerate(layout.projections) if p.adapted
        ),
        "trained_parameters": sum(p.numel() for p in learning),
        "seconds": {"training": round(trained.seconds, 2)},
        "peak_memory_bytes": _peak_memory(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)",
    }  # fmt: skip


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
