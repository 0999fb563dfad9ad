"""One run, from a configuration to a finished folder, and the table a user sees at the end.

The folder is filled under a temporary name (`.<name>.partial`), from which an interrupted run resumes, and renamed when
everything is there. A finished run is never overwritten.
"""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import time
from pathlib import Path

import accelerate
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from .bops import expected_bits, expected_bops, expected_rank
from .build import check_names
from .config import RunConfig
from .data import by_length, on_device, take
from .exporting import export
from .gates import Gates
from .inference_data import save, to_arviz
from .posterior import ECE_BINS, Prediction, bops, deployed, draw, marginals, mean_kl, predict
from .training import Trained, fit

_INTERVAL = (0.03, 0.97)  # ArviZ's usual 94 %
_BOPS_DRAWS = 1000  # bit operations need no forward, so their interval can afford many
_ELBO_EXAMPLES, _ELBO_DRAWS = 512, 4  # training rows and discrete draws behind elbo_per_example
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
    partial = folder.with_name(f".{folder.name}.partial")
    trained = fit(config, folder=partial)
    if accelerate.PartialState().is_main_process:
        began = time.perf_counter()
        summary = _finish(trained, partial)
        summary["seconds"]["evaluation"] = round(time.perf_counter() - began, 2)
        (partial / "config.json").write_text(config.to_json(versions=versions()), encoding="utf-8")
        (partial / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder)
        show_run(folder)
    return folder


def show_run(folder: str | Path) -> None:
    """Print the result table of a finished run.  Errors: ValueError for a folder that is none."""
    folder = Path(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        tables = result_tables(summary)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is not a finished run: no readable summary.json ({error})") from None
    console = Console()
    for table in tables:
        console.print(table)
    console.print(f"Run folder: {folder}", soft_wrap=True)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found


def _finish(trained: Trained, folder: Path) -> dict:
    """Everything that follows training: predictions, posterior, adapter; returns the summary."""
    parts, program, config = trained.parts, trained.program, trained.parts.config
    shutil.rmtree(folder / "adapter", ignore_errors=True)  # of a run that was cut off while it was finishing
    draws = draw(program, config.draws, seed=config.seed)
    pairs = {split: _averaged_and_deployed(trained, split, draws) for split in parts.tokens if split != "train"}
    prediction, at_mode = pairs["eval"]
    save(to_arviz(program, draws, prediction, labels=parts.task.labels, seed=config.seed), folder / "posterior.nc")
    export(program, folder / "adapter")
    for split, pair in pairs.items():
        name = "predictions.parquet" if split == "eval" else f"predictions_{split.removeprefix('eval_')}.parquet"
        _table(trained, split, *pair).to_parquet(folder / name)
    summary = _summary(trained, prediction, at_mode)
    for split, (predicted, _) in pairs.items():
        if split != "eval":
            summary[split] = _scores(trained, predicted)
    if getattr(program.gate_guide, "serves_every_rank", False):
        summary["by_rank"] = _by_rank(trained)
    return summary


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
    parts, device = trained.parts, trained.program.log_scale.device
    tokens = parts.tokens[split] if rows is None else rows
    batches, order = by_length(tokens, parts.tokenizer, 2 * parts.config.batch_size)
    bar = tqdm(on_device(batches, device), desc=f"predict {split}", total=len(batches), leave=False, dynamic_ncols=True)
    return predict(trained.program, bar, gates=draws, dropout_seed=dropout_seed).restored(order)


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
def _summary(trained: Trained, prediction: Prediction, at_mode: Prediction) -> dict:
    parts, program, config = trained.parts, trained.program, trained.parts.config
    net, layout, (z, g) = program.net, program.net.layout, marginals(program)
    learning = [*net.adapter_parameters(), *net.head_parameters()]
    kl_z, kl_g = mean_kl(program, seed=config.seed)
    train = take(parts.tokens["train"], _ELBO_EXAMPLES, config.seed)
    fitted = _predict(trained, "train", draw(program, _ELBO_DRAWS, seed=config.seed), train)
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


def result_tables(summary: dict) -> list[Table]:
    """What a user wants to know first: the score, its calibration, what the gates learned, what it costs."""
    method = summary.get("method", "bayesian_lora")
    name = f"prior {summary['prior']}" if method == "bayesian_lora" else method
    head = Table(title=f"{summary['task']} · {summary['backbone']} · {name}", title_justify="left")
    for column, justify in (("", "left"), (f"{summary['draws']} draws", "right"), ("deployed", "right")):
        head.add_column(column, justify=justify)
    at_mode, metric = summary["deployed"], summary["metric"]["name"]
    head.add_row(metric, _number(summary["metric"]["value"]), _number(at_mode["metric"]["value"]))
    head.add_row("NLL (nats an example)", _number(summary["nll"]), _number(at_mode["nll"]))
    if summary["ece"]["value"] is not None:
        bins = summary["ece"]["bins"]
        head.add_row(f"ECE ({bins} bins)", _number(summary["ece"]["value"]), _number(at_mode["ece"]["value"]))
    gates = Table(title="What the gates learned", title_justify="left")
    for column in ("", "expected"):
        gates.add_column(column, justify="left" if not column else "right")
    for role, bits in summary["expected_bits"].items():
        gates.add_row(f"bits of {role}", f"{bits:.1f}")
    for kind, rank in summary["expected_rank"].items():
        gates.add_row(f"rank of {kind}", f"{rank:.1f}")
    low, high = summary["bops"]["interval"]
    gates.add_row(
        "BOPs / adapted projections at 32 x 32", f"{summary['bops']['adapted_ratio']:.2%} [{low:.2%}, {high:.2%}]"
    )
    gates.add_row("BOPs / whole model at 32 x 32", f"{summary['bops']['model_ratio']:.2%}")
    gates.add_row("adapter parameters", f"{summary['adapter_parameters']:,}")
    if "by_rank" not in summary:
        return [head, gates]
    ranks = Table(title="At every rank", title_justify="left")
    for column in ("rank", metric, "NLL", "BOPs / adapted"):
        ranks.add_column(column, justify="right")
    for row in summary["by_rank"]:
        value, share = row["metric"]["value"], row["bops"]["adapted_ratio"]
        ranks.add_row(str(row["rank"]), _number(value), _number(row["nll"]), f"{share:.2%}")
    return [head, gates, ranks]


def _number(value: float) -> str:
    return f"{value:.4f}"
