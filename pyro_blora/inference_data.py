"""To ArviZ: named groups and dimensions, `posterior.nc`. The only file that knows ArviZ's version.

Groups: posterior and prior (z, g, bits, rank, bops_adapted, bops_model), sample_stats (log_q, log_prior),
log_likelihood and posterior_predictive (label, and probability or mean), observed_data, constant_data (exact marginals,
KL of each chain, MACs). Dimensions: chain (one fit is one chain; restarts are further ones), draw, projection, tensor,
rung, rank, example, class. Tensors that a projection does not have are nan.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.x whenever it is imported
    import arviz
import numpy as np
import pandas as pd
import torch
import xarray
from torch import Tensor

from .bops import expected_bits, expected_bops, expected_rank
from .gates import Gates
from .guides import log_prob
from .layout import AdapterLayout
from .posterior import Prediction, divergences, draw, marginals
from .program import BayesianLoRA

GATE_DIMS = {
    "z": ["projection", "tensor", "rung"],
    "g": ["projection", "rank"],
    "bits": ["projection", "tensor"],
    "ranks": ["projection"],
    "z_marginal": ["projection", "tensor", "rung"],
    "g_marginal": ["projection", "rank"],
    "z_kl": ["projection", "tensor"],
    "g_kl": ["projection"],
    "macs": ["projection"],
    "label": ["example"],
    "probability": ["example", "class"],
    "mean": ["example"],
}


def coordinates(layout: AdapterLayout) -> dict[str, list]:
    """Real names: projections as `7.value` (their full path where that is not unique), rungs in bit, ranks from 2."""
    short = [f"{p.layer}.{p.type}" for p in layout.projections]
    names = short if len(set(short)) == len(short) else [p.name for p in layout.projections]
    return {
        "projection": names,
        "tensor": list(layout.tensors),
        "rung": list(layout.ladder[1:]),
        "rank": list(range(2, layout.rank + 1)),
    }


def to_arviz(
    program: BayesianLoRA, draws: Gates, prediction: Prediction | None = None, *, labels: tuple[str, ...] = (),
    seed: int = 0,
):  # fmt: skip
    """ArviZ data of a trained program: an InferenceData (ArviZ 0.x) or a DataTree (1.x).

    draws: from `posterior.draw`. prediction: from `predict` with the same draws, for the example groups. labels: class
    names. seed: of the prior's draws and of the predicted labels.
    Errors: ValueError where the prediction has another number of draws.
    """
    layout = program.net.layout
    prior_draws = draw(program, len(draws.z), seed=seed, law="prior")
    groups = {
        "posterior": _gate_group(program, layout, draws),
        "prior": _gate_group(program, layout, prior_draws),
        "sample_stats": _densities(program, draws),
        "constant_data": _constants(program, layout),
    }
    coords = coordinates(layout)
    if prediction is not None:
        if len(prediction.outputs) != len(draws.z):
            raise ValueError(f"prediction has {len(prediction.outputs)} draws, the gates {len(draws.z)}: use the same")
        groups |= _example_groups(prediction, seed)
        coords["example"] = list(range(len(prediction.labels)))
        coords["class"] = list(labels) or list(range(prediction.outputs.shape[-1]))
    return assemble(groups, coords, dict(GATE_DIMS))


def assemble(groups: Mapping[str, Mapping[str, np.ndarray]], coords: dict, dims: dict):
    """Arrays by group and name to ArviZ's container; (chain, draw) lead everywhere but in the data groups.

    ArviZ 0.x takes groups as keywords, 1.x one nested dictionary, which 0.x would misread silently.
    """
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict({name: dict(group) for name, group in groups.items()}, coords=coords, dims=dims)
    return arviz.from_dict(**{name: dict(group) for name, group in groups.items()}, coords=coords, dims=dims)


def held_out(log_scores: np.ndarray, draws: int):
    """ArviZ's ELPDData of held-out examples, for `arviz.compare`: their log scores need no leaving out.

    log_scores (E,): of the predictive density averaged over `draws`, nats. ArviZ knows such data as `loo` only.
    """
    E = len(log_scores)
    pointwise = xarray.DataArray(np.asarray(log_scores, dtype=float), dims=["example"])
    total, error = float(pointwise.sum()), float(np.sqrt(E * pointwise.var()))
    if int(arviz.__version__.split(".")[0]) >= 1:
        from arviz_stats.utils import ELPDDataLOO

        return ELPDDataLOO(total, error, 0.0, draws, E, "log", False, 0.7, elpd_i=pointwise)
    from arviz.stats.stats_utils import ELPDData

    return ELPDData(pd.Series({
        "elpd_loo": total, "se": error, "p_loo": 0.0, "n_samples": draws, "n_data_points": E, "warning": False,
        "loo_i": pointwise, "scale": "log",
    }))  # fmt: skip


def leave_one_out(log_likelihood: np.ndarray, log_joint: np.ndarray, log_q: np.ndarray):
    """(ArviZ's PSIS-LOO of training examples under draws of a guide, whether it is corrected for the guide).

    log_likelihood (S, E), log_joint and log_q (S,) of the same draws, nats. ArviZ 1.x weighs the draws by joint over
    guide; 0.x takes them for draws of the posterior.
    Source: Magnusson et al., Bayesian leave-one-out cross-validation for large data (2019).
    """
    data = assemble({"posterior": {"log_q": log_q[None]}, "log_likelihood": {"label": log_likelihood[None]}}, {}, {})
    if int(arviz.__version__.split(".")[0]) >= 1:
        weights = [xarray.DataArray(x[None], dims=["chain", "draw"]) for x in (log_joint, log_q)]
        return arviz.loo_approximate_posterior(data, *weights, pointwise=True), True
    return arviz.loo(data, pointwise=True, reff=1.0), False


def save(data, path: Path) -> None:
    data.to_netcdf(str(path), engine="h5netcdf")


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _chain(x: Tensor) -> np.ndarray:
    """One fit is one chain: (S, ...) -> (1, S, ...)."""
    return _array(x)[None]


def _where(mask: Tensor, x: Tensor) -> Tensor:
    """nan where a tensor or an adapter does not exist; mask is aligned to the left of the gates' own dimensions."""
    shape = mask.shape + (1,) * (x.dim() - mask.dim())
    return torch.where(mask.view(shape), x, torch.nan)


def _gate_group(program: BayesianLoRA, layout: AdapterLayout, draws: Gates) -> dict[str, np.ndarray]:
    z, g = (x.float() for x in draws)
    bops = expected_bops(layout, z, g)
    z_mask, g_mask = program.z_mask[None], program.g_mask[None]
    return {
        "z": _chain(_where(z_mask, z)),
        "g": _chain(_where(g_mask, g)),
        "bits": _chain(_where(z_mask, expected_bits(layout, z))),
        "ranks": _chain(_where(g_mask, expected_rank(g))),
        "bops_adapted": _chain(bops.adapted_ratio),
        "bops_model": _chain(bops.model_ratio),
    }


@torch.no_grad()
def _densities(program: BayesianLoRA, draws: Gates) -> dict[str, np.ndarray]:
    prior = program.prior()
    log_prior = torch.where(program.z_mask, prior.z.log_prob(draws.z), 0.0).sum((-1, -2))
    log_prior = log_prior + torch.where(program.g_mask, prior.g.log_prob(draws.g), 0.0).sum(-1)
    log_q = log_prob(program.gate_guide, draws, program.z_mask, program.g_mask)
    return {"log_q": _chain(log_q), "log_prior": _chain(log_prior)}


def _constants(program: BayesianLoRA, layout: AdapterLayout) -> dict[str, np.ndarray]:
    z, g = marginals(program)
    kl = divergences(program)
    return {
        "z_marginal": _array(_where(program.z_mask, z)),
        "g_marginal": _array(_where(program.g_mask, g)),
        "z_kl": _array(_where(program.z_mask, kl.z)),
        "g_kl": _array(_where(program.g_mask, kl.g)),
        "macs": _array(layout.macs),
    }


def _example_groups(prediction: Prediction, seed: int) -> dict[str, dict[str, np.ndarray]]:
    generator = torch.Generator().manual_seed(seed)
    if prediction.is_regression:
        predictive = {"mean": _chain(prediction.outputs.squeeze(-1))}
    else:
        flat = prediction.outputs.flatten(0, 1)
        label = torch.multinomial(flat, 1, generator=generator).view(prediction.outputs.shape[:2])
        predictive = {"label": _chain(label), "probability": _chain(prediction.outputs)}
    return {
        "log_likelihood": {"label": _chain(prediction.log_likelihood)},
        "posterior_predictive": predictive,
        "observed_data": {"label": _array(prediction.labels)},
    }
