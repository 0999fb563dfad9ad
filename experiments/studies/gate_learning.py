"""Cells of `experiments/gates.py`: one training each, and what its gates are worth beside those that it started from.

Shapes: D draws, E examples.   Units: nats.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_blora.bops import expected_bits, expected_bops
from pyro_blora.build import Parts, build
from pyro_blora.config import RunConfig
from pyro_blora.evaluation.evaluating import predicted
from pyro_blora.evaluation.metrics import scores_of
from pyro_blora.gates import Gates
from pyro_blora.posterior.draws import deployed, draw
from pyro_blora.tasks.batching import take
from pyro_blora.training import Schedule, fit

from .cells import CHECKPOINT, CODE, kept, settings_of, trunk, warm

DRAWS, ROWS = 64, 400  # of the gates, and training rows, behind an ELBO: it has rare draws that cost much
_FEW = 8  # draws of predictions


def cell(path: Path, config: RunConfig, lora: RunConfig, *, train: bool = True) -> dict | None:
    """The cell in the file; where it is missing, trained from the shared LoRA, or None."""
    found = kept(path, config)
    if found is not None or not train:
        return found
    folder = config.folder.parent / f".gates-{path.stem}"
    if not folder.exists():
        n_train = len(build(lora).rows["train"])
        warm(config, trunk(lora, Schedule.of(config, n_train)), folder)
    trained = fit(config, folder=folder)
    found = {"config": settings_of(config), "code": CODE, **_judged(trained.parts, _started(folder)),
             "seconds": trained.seconds}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(found) + "\n", encoding="utf-8")
    path.with_suffix(".tmp").rename(path)
    shutil.rmtree(folder)
    return found


def _started(folder: Path) -> list[Tensor] | None:
    """The log Bayes factors that natural gradients started from, as the last checkpoint has them."""
    from safetensors.torch import load_file

    state = load_file(folder / CHECKPOINT)
    keys = [f"start/gate_guide.{site}_evidence" for site in Gates._fields]
    return [state[key] for key in keys] if all(key in state for key in keys) else None


@torch.no_grad()
def _judged(parts: Parts, start: list[Tensor] | None) -> dict:
    program, seed = parts.program, parts.config.seed
    program.eval()
    few, mode = draw(program, _FEW, seed=seed), Gates(*(x[None] for x in deployed(program)))
    both = Gates(*(torch.cat(pair) for pair in zip(few, mode, strict=True)))
    predictions = predicted(parts, "eval", both)
    averaged, single = (scores_of(parts.task, predictions.of_draws(part)) for part in (slice(_FEW), slice(_FEW, None)))
    nll = _nll(parts)
    found = {
        "n_train": program.n_train,
        "learned": _elbo(parts, nll),
        "draws": _score(averaged),
        "deployed": _score(single),
    }
    if start is not None:
        factors = [program.gate_guide.z_evidence, program.gate_guide.g_evidence]
        moved = [(e - before)[:, mask] for e, before, mask in
                 zip(factors, start, (program.z_mask, program.g_mask), strict=True)]  # fmt: skip
        found["moved"] = torch.cat([x.flatten() for x in moved]).square().mean().sqrt().item()
        kl = float(sum(program.kl()))
        for e, before in zip(factors, start, strict=True):
            e.copy_(before)
        found["gain"] = gain(_nll(parts) - nll, float(sum(program.kl())) - kl, program.n_train)
    return found


def gain(nll: Tensor, kl: float, n_train: int) -> dict[str, float]:
    """How far the ELBO of all examples rises where the NLL of some falls by `nll` (D, E) and the KL by `kl`; nats.

    error: its standard error, over draws, of `n_train` rows these, and both; each part has what is of a row and a draw.
    """
    draws, rows = nll.shape
    of_draws = n_train * float(nll.mean(1).std()) / draws**0.5
    of_rows = n_train * float(nll.mean(0).std()) * max(0.0, 1 / rows - 1 / n_train) ** 0.5
    return {"nats": n_train * float(nll.mean()) + kl, "of_draws": of_draws, "of_rows": of_rows,
            "error": float(np.hypot(of_draws, of_rows))}  # fmt: skip


def _nll(parts: Parts) -> Tensor:
    """Of some training examples under draws of the gates, from the same random numbers each time; (D, E)."""
    rows = take(parts.tokens["train"], ROWS, parts.config.seed)
    return -predicted(parts, "train", draw(parts.program, DRAWS, seed=parts.config.seed), rows=rows).log_likelihood


def _score(scores: dict) -> dict:
    return {"metric": scores["metric"]["name"], "score": scores["metric"]["value"], "nll": scores["nll"]}


def _elbo(parts: Parts, nll: Tensor) -> dict:
    """The ELBO per example with discrete draws, its standard error over them, and the allocation.  nll (D, E)"""
    program, layout, nll = parts.program, parts.program.layout, nll.mean(1)
    kl = float(sum(program.kl()))
    z, g = (q.mean for q in program.gate_guide.posterior())
    z_deployed, g_deployed = deployed(program)
    return {
        "elbo": -float(nll.mean()) - kl / program.n_train, "error": float(nll.std()) / DRAWS**0.5, "kl": kl,
        "bops": float(expected_bops(layout, z, g).model_ratio),
        "bits": float(expected_bits(layout, z)[program.z_mask].mean()),
        "depths": z_deployed.sum(-1)[program.z_mask].int().tolist() + g_deployed.sum(-1)[program.g_mask].int().tolist(),
    }  # fmt: skip
