"""summary.json: what a run computed, in numbers; and the table of its predictions."""

import json
import os
import platform
import resource
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..bops import expected_bits, expected_bops, expected_rank
from ..build import Parts
from ..config.naming import task_called
from ..config.run_config import RunConfig
from ..interval import INTERVAL
from ..posterior.draws import bops, component_marginals, deployed, draw, draw_weights, draws_vary, marginals, mean_kl
from ..posterior.prediction import Prediction
from ..program import BayesianLoRA
from ..tasks.columns import beside
from ..tasks.outcomes import described
from ..weights.laplace import Laplace
from .evaluating import Evaluated
from .metrics import calibration_of, deployed_scores, scores_of
from .writing import scored_texts

_WEIGHT_DRAWS = 100  # for their mean standard deviation; of many weights few, which say as much
_DRAWN_AT_ONCE = 50_000_000  # numbers
_RESTED = (
    "The gates rest where they started, at estimates from the Fisher information of the open adapter; the steps after "
    "that trained the weights at what is deployed. To let the gates learn: --rest 0.3 --settle 0."
)
_BOPS_DRAWS = 1000  # bit operations need no forward, so their interval can afford many


@torch.no_grad()
def summarize(parts: Parts, evaluated: Evaluated, seconds: float) -> dict:
    """All numbers of a run but those of its restarts."""
    program, config = parts.program, parts.config
    net, layout, (z, g) = program.net, program.net.layout, marginals(program)
    learning = [*net.adapter_parameters(), *net.head_parameters()]
    prediction, at_mode = evaluated.pairs["eval"]
    (kl_z, kl_g), kl_theta = mean_kl(program, seed=config.seed), float(program.weights.divergence())
    exported = deployed(program)
    expected, at = bops(program), expected_bops(layout, *exported)
    ratios = expected_bops(layout, *draw(program, _BOPS_DRAWS, seed=config.seed)).adapted_ratio.cpu()
    bits, ranks = expected_bits(layout, z).cpu(), expected_rank(g).cpu()
    kinds = {p.type: [i for i, q in enumerate(layout.projections) if q.type == p.type] for p in layout.adapted}
    found = {
        "task": task_called(config.task, config.task_settings),
        "outcome": described(parts.task.likelihood),
        **({"data": parts.findings} if parts.findings else {}),
        "backbone": config.backbone,
        "method": config.method,
        "prior": "+".join(config.prior_names),
        "guide": config.guide,
        "adapter": config.adapter,
        "weights": {"law": config.weights, **_of_weights(parts)},
        "seed": config.seed,
        "n_train": program.n_train,
        "n_eval": len(prediction.labels),
        **scores_of(parts.task, prediction),
        "draws": config.draws,
        "averaging": _averaging(parts),
        "deployed": deployed_scores(parts.task, prediction, at_mode),
        "prior_state": program.prior.report(),
        "elbo_per_example": (
            float(evaluated.fitted.log_likelihood.mean()) - (kl_z + kl_g + kl_theta) / program.n_train
        ),
        "kl": {"z": kl_z, "g": kl_g, "theta": kl_theta},
        "bops": {
            "adapted_ratio": float(expected.adapted_ratio),
            "model_ratio": float(expected.model_ratio),
            "interval": [float(ratios.quantile(p)) for p in INTERVAL],
            "deployed": {"adapted_ratio": float(at.adapted_ratio), "model_ratio": float(at.model_ratio)},
        },
        "expected_bits": {
            tensor: float(bits[program.z_mask.cpu()[:, t], t].mean()) for t, tensor in enumerate(layout.tensors)
            if program.z_mask[:, t].any()
        },
        "expected_rank": {kind: float(ranks[rows].mean()) for kind, rows in kinds.items()},
        "adapter_parameters": sum(
            net.parameters_per_rank(p) * (1 + int(exported.g[i].sum()))
            for i, p in enumerate(layout.projections) if p.adapted
        ),
        "trained_parameters": sum(p.numel() for p in learning),
        "seconds": {"training": round(seconds, 2)},
        "peak_memory_bytes": _peak_memory(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)",
    }  # fmt: skip
    spent, at_deployed = (program.prior.spent(gates) for gates in (component_marginals(program), exported))
    if spent is not None and at_deployed is not None:
        found["cost"] = spent._asdict() | {"deployed": {"value": at_deployed.value, "ratio": at_deployed.ratio}}
    if missed := program.prior.missed(component_marginals(program)):
        found["missed"] = missed
    if program.gates_are_random and _rests_at_its_start(config):
        found["rested"] = _RESTED
    if layout.sharing:
        found["sharing"] = layout.sharing
    found["calibration"] = calibration_of(evaluated.pairs)
    for split, (predicted, _) in evaluated.pairs.items():
        if split not in ("eval", "ood"):
            found[split] = scores_of(parts.task, predicted)
    if evaluated.by_rank:
        found["by_rank"] = evaluated.by_rank
    rows = {name: parts.rows["eval"][name] for name in (*program.text_columns, "label")}
    texts = scored_texts(program, parts.tokenizer, rows, evaluated.draws, evaluated.theta, 2 * config.batch_size)
    if texts:
        tables = {**found.get("tables", {}), **texts.pop("tables")}
        found |= {**texts, "tables": tables}
    return found


def _rests_at_its_start(config: RunConfig) -> bool:
    start, rest, settle = (x or 0.0 for x in (config.kl_warmup, config.rest, config.settle))
    return rest + settle > 0 and start + rest + settle > 1 - 1e-9


def stored(program: BayesianLoRA) -> int:
    """How many numbers are stored to draw an adapter: of its weights' distribution, and of weights that are points."""
    weights = program.weights
    return weights.stored + sum(p.numel() for p in program.net.adapter_parameters()) - weights.size


def _of_weights(parts: Parts) -> dict:
    """random: D; stored: numbers that are kept to draw the adapter; std: root mean square over all weights.

    Of Laplace also its prior_precision; of an ensemble the distribution of its members, the first of which this is.
    """
    weights, fits = parts.program.weights, parts.config.fits if parts.config.is_ensemble else 1
    found: dict[str, Any] = {
        "random": weights.size if weights.random else 0,
        "stored": fits * stored(parts.program),
    }
    if parts.config.weights_of_fits != parts.config.weights:
        found["of"] = parts.config.weights_of_fits
    draws = min(_WEIGHT_DRAWS, max(2, _DRAWN_AT_ONCE // max(1, weights.size)))
    drawn = draw_weights(parts.program, draws, seed=parts.config.seed)
    if drawn is not None:
        found["std"] = float(drawn.var(0).mean().sqrt())
    if isinstance(weights, Laplace):
        found["prior_precision"] = float(weights.prior_precision)
    return found


def _averaging(parts: Parts) -> str:
    config, program = parts.config, parts.program
    drawn = {
        "the gates": draws_vary(program), "the weights": program.weights.random,
        "dropout masks": config.average_over == "dropout",
    }  # fmt: skip
    averages = program.likelihood.averages
    names = " and of ".join(name for name, is_drawn in drawn.items() if is_drawn)
    each = f"over {config.draws} draws of {names}" if names else ""
    if config.is_ensemble:
        fits = f"{config.fits} fits from seeds of their own"
        return f"mean of {averages} over {fits}{f', of each {each}' if each else ''}"
    return f"mean of {averages} {each}" if each else "one network, in which nothing is random,"


def of_restart(folder: Path) -> dict:
    """What of a restart's summary stands in that of the run."""
    return of_fit(json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def of_fit(summary: dict) -> dict:
    """What fits from several seeds are compared by."""
    kept = ("seed", "metric", "nll", "ece", "elbo_per_example", "bops", "deployed", "beside")
    return {key: summary[key] for key in kept if key in summary}  # older ones have no `beside`


def predictions_table(parts: Parts, split: str, prediction: Prediction, at_mode: Prediction) -> pd.DataFrame:
    """One line per example: its text, label, decision, and what its kind of outcome adds, such as probabilities.

    `log_likelihood` is the log of the density averaged over draws, as in `nll`; `deployed_*`: of the one allocation.
    """
    table, kind = parts.rows[split].to_pandas(), prediction.likelihood
    texts = list(zip(*(table[name] for name in parts.task.text_columns if name in table), strict=True))
    found = {"decision": kind.cells(prediction.decision)}
    found |= kind.in_words(dict(kind.columns(prediction.outputs)), texts)
    if split == "ood":  # another task's sentences: no answer is right
        return beside(table, found).drop(columns="label")
    scored = {
        "log_likelihood": prediction.log_score.numpy(), "deployed_decision": kind.cells(at_mode.decision),
        "deployed_log_likelihood": at_mode.log_score.numpy(),
    }  # fmt: skip
    return beside(table, found | scored)


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
