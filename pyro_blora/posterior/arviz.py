"""To ArviZ: a trained program's draws and exact distributions as named groups and dimensions, `posterior.nc`.

Groups: posterior and prior (z, g, bits, ranks, bops_adapted, bops_model; rate where the prior's rates are random, and
theta in the posterior where the weights are), sample_stats (log_q; log_prior, at the mean of random rates; log_ratio of
the rates), constant_data (exact: the distributions of guide and prior over widths and ranks, marginals, KL, and the
deployed allocation; each projection's layer and type, to group by; attributes: the layout, the KL's weight). Held-out
rows are in predictions (what the kind of outcome predicts: label and probability, or mean; log_likelihood of the
observed label) and predictions_constant_data (label, observed): there is no group log_likelihood, as `arviz.loo` would
treat its rows as training data and remove an influence that they never had. `arviz_compat.held_out_elpd` scores them.
Dimensions: chain (one fit is one chain; restarts are further ones), draw, projection, tensor, rung, rank, width,
open_rank, component, `law` (the random rates), weight, example, and those of the kind of outcome (class). Tensors that
a projection does not have are nan.
"""

import json

import numpy as np
import torch
import xarray
from torch import Tensor

from ..bops import expected_bits, expected_bops, expected_rank
from ..gates import Gates
from ..guides.base import components, log_prob
from ..layout import AdapterLayout
from ..program import BayesianLoRA
from .arviz_compat import container
from .draws import deployed, divergences, draw, marginals, rates
from .prediction import Prediction

SAMPLED = ("posterior", "prior", "sample_stats", "predictions")  # lead with (chain, draw)
_DIMS = {  # of a variable, after (chain, draw) where it is sampled
    "z": ("projection", "tensor", "rung"),
    "g": ("projection", "rank"),
    "bits": ("projection", "tensor"),
    "ranks": ("projection",),
    "rate": ("law",),
    "theta": ("weight",),
    "log_likelihood": ("example",),
    "log_q_width": ("chain", "component", "projection", "tensor", "width"),
    "log_q_rank": ("chain", "component", "projection", "open_rank"),
    "log_prior_width": ("chain", "projection", "tensor", "width"),
    "log_prior_rank": ("chain", "projection", "open_rank"),
    "z_marginal": ("chain", "projection", "tensor", "rung"),
    "g_marginal": ("chain", "projection", "rank"),
    "z_kl": ("chain", "projection", "tensor"),
    "g_kl": ("chain", "projection"),
    "z_deployed": ("chain", "projection", "tensor", "rung"),
    "g_deployed": ("chain", "projection", "rank"),
    "clipped": ("chain", "projection", "tensor"),
    "macs": ("projection",),
    "layer": ("projection",),
    "type": ("projection",),
}
_MOST_WEIGHTS = 10_000  # in a posterior.nc
_SAID = {  # (long_name, units)
    "z": ("bit gate: 1 where the rung is open", ""),
    "g": ("rank gate: 1 where the rank is open", ""),
    "bits": ("bit width", "bit"),
    "ranks": ("open ranks", ""),
    "rate": ("rate of the prior", "nat a gate"),
    "theta": ("random weight of the adapters", ""),
    "bops_adapted": ("bit operations of the adapted projections, of those at 32 x 32 bit with all ranks", ""),
    "bops_model": ("bit operations of the model, of those at 32 x 32 bit with all ranks", ""),
    "log_likelihood": ("log likelihood of the observed label of a held-out row under the draw", "nat"),
    "log_q": ("log probability of the draw under the guide", "nat"),
    "log_prior": ("log probability of the draw under the prior", "nat"),
    "log_ratio": ("log density of the rates' best distribution over that of their guide, up to a constant", "nat"),
    "z_kl": ("KL of guide from prior", "nat"),
    "g_kl": ("KL of guide from prior", "nat"),
    "log_q_width": ("log probability of a bit width under the guide", "nat"),
    "log_q_rank": ("log probability of a number of open ranks under the guide", "nat"),
    "log_prior_width": ("log probability of a bit width under the prior", "nat"),
    "log_prior_rank": ("log probability of a number of open ranks under the prior", "nat"),
    "clipped": ("share of values beyond the range of their grid", ""),
    "macs": ("multiplications of a forward, per example", ""),
}


def coordinates(layout: AdapterLayout) -> dict[str, list]:
    """Real names: projections as `7.value` (their full path where that is not unique), rungs in bit, ranks from 2."""
    return {
        "projection": list(layout.names),
        "tensor": list(layout.tensors),
        "rung": list(layout.ladder[1:]),
        "rank": list(range(2, layout.rank + 1)),
        "width": list(layout.ladder),
        "open_rank": list(range(1, layout.rank + 1)),
    }


def to_arviz(
    program: BayesianLoRA, draws: Gates, prediction: Prediction | None = None, *, labels: tuple[str, ...] = (),
    clipped: Tensor | None = None, theta: Tensor | None = None, seed: int = 0,
):  # fmt: skip
    """ArviZ data of a trained program: an InferenceData (ArviZ 0.x) or a DataTree (1.x), of one chain.

    draws: from `posterior.draw`. prediction: from `predict` with the same draws, for the example groups. labels: class
    names, in place of the likelihood's. clipped (L, T): shares of values beyond their ranges, from `adapters.clipped`.
    theta (S, D): draws of the weights, from `draw_weights`; more than 10,000 weights are left out. seed: of the prior's
    draws, of the rates and of the predicted labels.
    Errors: ValueError where the prediction has another number of draws.
    """
    layout, S, found = program.net.layout, len(draws.z), rates(program, len(draws.z), seed=seed)
    before = draw(program, S, seed=seed, distribution="prior")
    if found is not None:  # a draw's gates are of its rates
        before = before._replace(**found.prior_gates)
    groups = {
        "posterior": _gate_group(program, layout, draws),
        "prior": _gate_group(program, layout, before),
        "sample_stats": _densities(program, draws),
        "constant_data": _constants(program, layout),
    }
    if clipped is not None:
        groups["constant_data"]["clipped"] = _array(clipped)[None]
    coords, dims = coordinates(layout), dict(_DIMS)
    if found is not None:
        groups["posterior"]["rate"], groups["prior"]["rate"] = _chain(found.posterior), _chain(found.prior)
        groups["sample_stats"]["log_ratio"] = _chain(found.log_ratio)
        coords["law"] = list(found.names)
    if theta is not None and theta.shape[1] <= _MOST_WEIGHTS:
        groups["posterior"]["theta"] = _chain(theta)
        coords["weight"] = [
            f"{coords['projection'][i]}.{name}[{', '.join(map(str, place))}]" for (i, name), part in
            program.weights.split(program.weights.mean).items() for place in np.ndindex(*part.shape)
        ]  # fmt: skip
    if prediction is not None:
        if len(prediction.outputs) != S:
            raise ValueError(f"prediction has {len(prediction.outputs)} draws, the gates {S}: use the same")
        groups |= _example_groups(prediction, seed)
        coords |= {"example": list(range(len(prediction.labels)))} | prediction.likelihood.coords
        coords |= {"class": list(labels)} if labels else {}
        dims |= prediction.likelihood.dims
    datasets = {name: _dataset(name, arrays, dims, coords) for name, arrays in groups.items()}
    datasets["constant_data"].attrs["layout"] = json.dumps(layout.to_dict())
    datasets["constant_data"].attrs["kl_weight"] = program.kl_weight
    return container(datasets, {"created_by": "pyro_blora"})


def _dataset(group: str, arrays: dict[str, np.ndarray], dims_of: dict, coords: dict[str, list]) -> xarray.Dataset:
    """dims_of: dimensions by variable. Those without coordinates are numbered."""
    lead = ("chain", "draw") if group in SAMPLED else ()
    found = {}
    for name, array in arrays.items():
        dims = lead + dims_of.get(name, ())
        known = {dim: coords.get(dim, range(array.shape[i])) for i, dim in enumerate(dims)}
        attrs = dict(zip(("long_name", "units"), _SAID.get(name, ()), strict=False))
        found[name] = xarray.DataArray(array, coords=known, dims=dims, attrs={k: v for k, v in attrs.items() if v})
    return xarray.Dataset(found)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _chain(x: Tensor) -> np.ndarray:
    """One fit is one chain: (S, ...) -> (1, S, ...)."""
    return _array(x)[None]


def _where(mask: Tensor, x: Tensor, component: bool = False) -> Tensor:
    """nan where a tensor or an adapter does not exist; mask is aligned to the left, after a component's dimension."""
    mask = mask[None] if component else mask
    return torch.where(mask.view(mask.shape + (1,) * (x.dim() - mask.dim())), x.float(), torch.nan)


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


@torch.no_grad()
def _constants(program: BayesianLoRA, layout: AdapterLayout) -> dict[str, np.ndarray]:
    marginal, kl, mode = marginals(program), divergences(program), deployed(program)
    distributions, prior = components(program.gate_guide), program.prior()
    found = {
        "log_q_width": distributions.z.depth_log_probs, "log_q_rank": distributions.g.depth_log_probs,
        "log_prior_width": prior.z.depth_log_probs, "log_prior_rank": prior.g.depth_log_probs,
        "z_marginal": marginal.z, "g_marginal": marginal.g, "z_kl": kl.z, "g_kl": kl.g,
        "z_deployed": mode.z, "g_deployed": mode.g,
    }  # fmt: skip
    masks = {name: program.z_mask if "tensor" in _DIMS[name] else program.g_mask for name in found}
    masked = {name: _where(masks[name], x, component="component" in _DIMS[name]) for name, x in found.items()}
    named = {key: np.array([getattr(p, key) for p in layout.projections]) for key in ("layer", "type")}
    return {name: _array(x)[None] for name, x in masked.items()} | {"macs": _array(layout.macs)} | named


def _example_groups(prediction: Prediction, seed: int) -> dict[str, dict[str, np.ndarray]]:
    generator = torch.Generator().manual_seed(seed)
    kind = prediction.likelihood
    predicted = {name: _chain(x) for name, x in kind.predicted(prediction.outputs, generator).items()}
    predicted["log_likelihood"] = _chain(prediction.log_likelihood)
    return {"predictions": predicted, "predictions_constant_data": {kind.observed: _array(prediction.labels)}}
