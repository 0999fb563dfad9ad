"""Laplace's approximation of the weights' posterior, by laplace-torch, from our own Jacobians.

The Gauss-Newton curvature needs the Jacobian of each example's logits, of a regression that of its predicted mean.
laplace-torch makes curvature, posterior and marginal likelihood of these; of low rank from the eigenvectors that
`eigenvectors_of` finds. Gates are at their deployed allocation.
Shapes: B batch, C outputs, D random weights, K eigenvalues; Jacobians (B, C, D).
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..build import Parts
from ..gates import Gates
from ..posterior.calibration import nll
from ..posterior.draws import deployed
from ..posterior.jacobians import jacobians
from ..program import GateProgram
from ..progress import phase
from ..tasks.batching import by_length, on_device, take
from ..weights.laplace import PRECISIONS, Laplace

_HELD_OUT = 256  # rows that choose the prior precision
_NOISES = 64  # draws of the logits behind a probability on held-out rows
_TRIED = 19  # prior precisions, evenly in their logarithm, before the best one's neighbourhood is searched
_SINGULAR = (
    "weights 'laplace': the curvature with a prior precision of {:.3g} has no inverse in float32, as the rows do not "
    "determine every weight: give --weights.prior_precision 1 or more, or --validation 0.1, whose rows choose one"
)
_TINY, _RELATIVE = 1e-12, 1e-10  # eigenvalues that count as 0: absolute, and relative to the largest


class _Loader(list):
    """Batches (inputs, labels) in the form of laplace-torch's loaders; passes over them are shown."""

    def __iter__(self):
        with phase("computing the curvature", len(self), unit="batches") as shown:
            yield from shown.over(super().__iter__())

    @property
    def dataset(self) -> range:
        return range(sum(len(labels) for _, labels in self))


class _Network(nn.Module):
    """What laplace-torch sees: one vector of parameters, and the outputs of a batch: logits, or predicted means."""

    program: GateProgram

    def __init__(self, program: GateProgram, gates: Gates):
        super().__init__()
        self.__dict__["program"] = program  # no part of this module
        self.gates = gates
        self.theta = nn.Parameter(program.weights.mean.detach().clone())

    def outputs(self, logits: Tensor) -> Tensor:
        return self.program.likelihood.linearized(logits, self.program.log_scale.exp().detach())

    def forward(self, batch: dict) -> Tensor:
        return self.outputs(self.program.logits(dict(batch), self.gates, self.theta))

    def jacobians(self, batch: dict) -> tuple[Tensor, Tensor]:
        J, logits = jacobians(self.program, dict(batch), self.gates)
        with torch.enable_grad():  # by the chain rule: an output is a function of its own logit
            logits = logits.clone().requires_grad_()
            outputs = self.outputs(logits)
            (slopes,) = torch.autograd.grad(outputs.sum(), logits)
        return J * slopes[..., None], outputs.detach()


def eigenvectors_of(blocks: Iterable[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """(D, K) eigenvectors and (K,) eigenvalues of the sum of U^T U over blocks U, the largest, K <= rank.

    Blocks are merged one after the other into the directions kept so far: exact where the rank of the sum is at most
    `rank`, and otherwise without what fell below it on the way. Memory: some (rank + rows of a block) D numbers.
    """
    kept: Tensor | None = None  # rows: eigenvectors times the roots of their eigenvalues
    for block in blocks:
        rows = block if kept is None else torch.cat([kept, block])
        wide = rows.double()  # squares of single precision would lose half the digits
        values, mixing = torch.linalg.eigh(wide @ wide.mT)
        largest = values > values[-1].clamp(min=_TINY) * _RELATIVE
        kept = mixing[:, largest][:, -rank:].to(rows.dtype).mT @ rows
    if kept is None:
        raise ValueError("a curvature needs at least one batch of rows, got none")
    roots = kept.norm(dim=1)
    return (kept / roots[:, None]).mT, roots.square()


def in_directions(directions: Tensor | None, J: Tensor) -> tuple[Tensor, Tensor]:
    """J along the directions of the curvature (D, K), (E, C, K), and the products of what is beside them, (E, C, C).

    directions None: the unit vectors.
    """
    along = J if directions is None else J @ directions
    rest = torch.zeros_like(J[..., :1])
    if directions is not None and directions.shape[0] != directions.shape[1]:
        rest = J - along @ directions.mT
    return along, rest @ rest.mT


def precision_of_least_nll(
    eigenvalues: Tensor, along: Tensor, beside: Tensor, outputs: Tensor, labels: Tensor, noise_std: float | None
) -> float:
    """The prior precision whose linearized predictions of these held-out examples have the least NLL.

    eigenvalues (K,): of the curvature, 0 elsewhere. along, beside: `in_directions` of the examples' Jacobians. outputs
    (E, C): at the mean. labels (E,): classes, or with a noise_std values. Probabilities are averaged over draws of the
    logits, the same for every precision.
    """
    from scipy.optimize import minimize_scalar

    noise = torch.randn(_NOISES, *outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)

    def nll_at(log_precision: float) -> float:
        precision = math.exp(log_precision)
        covariance = along / (eigenvalues + precision) @ along.mT + beside / precision
        if noise_std is not None:
            distribution = torch.distributions.Normal(outputs, (covariance[..., 0] + noise_std**2).sqrt())
            return -distribution.log_prob(labels[:, None]).mean().item()
        values, vectors = torch.linalg.eigh(covariance)
        shift = torch.einsum("eck,ek,sek->sec", vectors, values.clamp(min=0).sqrt(), noise)
        return nll((outputs + shift).softmax(-1).mean(0), labels)

    grid = np.linspace(*PRECISIONS, _TRIED)
    best = int(np.argmin([nll_at(x) for x in grid]))
    bounds = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    return math.exp(minimize_scalar(nll_at, bounds=bounds, method="bounded").x)


def _spectrum(approximation, structure: str) -> tuple[Tensor | None, Tensor]:
    """Directions and eigenvalues of a fitted curvature, see `in_directions`."""
    approximation.prior_precision = 0.0  # then the posterior's precision is the curvature
    curvature = approximation.posterior_precision
    if structure == "low_rank":
        return curvature[0]
    if structure == "diag":
        return None, curvature
    values, vectors = torch.linalg.eigh(curvature)
    return vectors, values.clamp(min=0)


def fit_run(parts: Parts) -> None:
    """Fit a run's Laplace approximation to its training rows, and the prior precision to held-out rows, if any."""
    program = parts.program

    def batches(rows):
        load, _ = by_length(rows, parts.collate, parts.config.batch_size)
        return on_device(load, program.log_scale.device)

    held_out = parts.tokens.get("validation")
    chosen = [] if held_out is None else batches(take(held_out, _HELD_OUT, parts.config.seed))
    with phase("fitting Laplace's approximation"):
        fit_laplace(program, batches(parts.tokens["train"]), deployed(program), chosen)


def fit_laplace(
    program: GateProgram, batches: Iterable[tuple[dict, Tensor]], gates: Gates,
    held_out: Iterable[tuple[dict, Tensor]] = (),
) -> None:  # fmt: skip
    """Set the scale of the program's Laplace approximation from all training examples.

    held_out: examples that choose the prior precision, where it is not given; without them the marginal likelihood
    does. Errors: ValueError where laplace-torch is not installed.
    """
    try:
        from laplace import DiagLaplace, FullLaplace, LowRankLaplace, ParametricLaplace
        from laplace.curvature import GGNInterface
        from transformers import BatchEncoding
    except ImportError as error:
        raise ValueError(
            f"weights 'laplace' needs laplace-torch ({error}): pip install 'pyro-blora[laplace]', or choose others"
        ) from None

    class Backend(GGNInterface):
        model: Any

        def jacobians(self, x, enable_backprop: bool = False):
            return self.model.jacobians(x)

        def eig_lowrank(self, data_loader):
            losses = []

            def blocks():
                for x, y in data_loader:
                    J, outputs = self.model.jacobians(x)
                    losses.append(self.factor * self.lossfunc(outputs, y))
                    yield likelihood.gauss_newton_rows(J, outputs)

            return *eigenvectors_of(blocks(), rank), sum(losses)

    class LowRank(LowRankLaplace):
        def __init__(self, *arguments, **settings):  # bypass the parent constructor, which requires asdfghjkl
            ParametricLaplace.__init__(self, *arguments, **settings)

    weights, likelihood, batches = program.weights, program.likelihood, list(batches)
    if not isinstance(weights, Laplace):
        raise ValueError(
            f"weights of {type(weights).__name__} have no curvature to fit: subclass pyro_blora.weights.Laplace"
        )
    rank = weights.rank
    if likelihood.curvature is None:
        raise ValueError(f"weights 'laplace' has no curvature for {likelihood.title}: choose other --weights")
    noise = likelihood.noise_std(program.log_scale.exp())
    kind = {"full": FullLaplace, "low_rank": LowRank, "diag": DiagLaplace}[weights.curvature]
    settings = {} if noise is None else {"sigma_noise": noise.item()}
    network = _Network(program, gates)
    approximation = kind(network, likelihood.curvature, backend=Backend, **settings)
    program.eval()
    shape = (-1,) if noise is None else (-1, 1)
    loader = _Loader((BatchEncoding(inputs), labels.view(shape)) for inputs, labels in batches)
    approximation.fit(loader)
    held_out = list(held_out)
    if weights.given_precision is not None:
        approximation.prior_precision = weights.given_precision
    elif held_out:
        with torch.no_grad():
            directions, eigenvalues = _spectrum(approximation, weights.curvature)
        seen = []  # of each batch: Jacobians of all rows would be C times D numbers a row
        for inputs, labels in held_out:
            J, outputs = network.jacobians(inputs)
            with torch.no_grad():
                seen.append((*in_directions(directions, J), outputs, labels))
        with torch.no_grad():
            along, beside, outputs, labels = map(torch.cat, zip(*seen, strict=True))
            chosen = precision_of_least_nll(eigenvalues, along, beside, outputs, labels, settings.get("sigma_noise"))
        approximation.prior_precision = chosen
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about how it would predict, which it does not
            approximation.optimize_prior_precision(pred_type="glm", method="marglik", prior_structure="scalar")
    _keep(approximation, weights)


@torch.no_grad()
def _keep(approximation, weights: Laplace) -> None:
    """Take over what was fitted.  Errors: ValueError where curvature and prior precision have no inverse."""
    weights.prior_precision.copy_(approximation.prior_precision.squeeze())
    try:
        if weights.curvature == "low_rank":
            found, _ = approximation.posterior_precision
            for kept, each in zip((weights.directions, weights.eigenvalues), found, strict=True):
                kept.zero_()[..., : each.shape[-1]] = each  # fewer, where the rows are fewer
        else:
            weights.scale.copy_(approximation.posterior_scale)
    except torch.linalg.LinAlgError:
        raise ValueError(_SINGULAR.format(float(weights.prior_precision))) from None
    if not all(bool(x.isfinite().all()) for x in weights.buffers()):
        raise ValueError(_SINGULAR.format(float(weights.prior_precision)))
