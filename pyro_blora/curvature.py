"""Laplace's approximation of the weights' posterior, by laplace-torch, from Jacobians of our own.

The Gauss-Newton curvature needs the Jacobian of each example's logits, of a regression that of its predicted mean.
laplace-torch makes curvature, posterior and marginal likelihood of these. Gates are at their deployed allocation.
Shapes: B batch, C outputs, D random weights; Jacobians (B, C, D).
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .gates import Gates
from .jacobians import jacobians
from .program import GateProgram


class _Loader(list):
    """Batches as laplace-torch asks for them."""

    @property
    def dataset(self) -> range:
        return range(sum(len(batch["labels"]) for batch in self))


class _Network(nn.Module):
    """What laplace-torch sees: one vector of parameters, and the outputs of a batch: logits, or predicted means."""

    def __init__(self, program: GateProgram, gates: Gates, regression: bool):
        super().__init__()
        self.__dict__["program"] = program
        self.gates, self.regression = gates, regression
        self.theta = nn.Parameter(program.weights.mean.detach().clone())

    def outputs(self, logits: Tensor) -> Tensor:
        scale = self.program.log_scale.exp().detach()
        return self.program.likelihood(logits, scale=scale).mean[:, None] if self.regression else logits

    def forward(self, batch: dict) -> Tensor:
        return self.outputs(self.program.logits(_inputs(batch), self.gates, self.theta))

    def jacobians(self, batch: dict) -> tuple[Tensor, Tensor]:
        J, logits = jacobians(self.program, _inputs(batch), self.gates)
        if not self.regression:
            return J, logits
        with torch.enable_grad():  # by the chain rule: an example's mean is a function of its own logit
            logits = logits.clone().requires_grad_()
            means = self.outputs(logits)
            (slopes,) = torch.autograd.grad(means.sum(), logits)
        return J * slopes[..., None], means.detach()


def _inputs(batch: dict) -> dict:
    return {key: x for key, x in batch.items() if key != "labels"}


def fit_laplace(program: GateProgram, batches: Iterable[tuple[dict, Tensor]], gates: Gates) -> None:
    """Set the scale of the program's Laplace law from training examples, all of them.

    Errors: ValueError where laplace-torch is not installed.
    """
    try:
        from laplace import DiagLaplace, FullLaplace
        from laplace.curvature import GGNInterface
    except ImportError as error:
        raise ValueError(
            f"weights 'laplace' needs laplace-torch ({error}): pip install 'pyro-blora[laplace]', or choose others"
        ) from None

    class Backend(GGNInterface):
        def jacobians(self, x, enable_backprop: bool = False):
            return self.model.jacobians(x)

    law, batches = program.weights, list(batches)
    with torch.no_grad():
        example = program.likelihood(program.logits(batches[0][0], gates), scale=program.log_scale.exp())
    regression = not hasattr(example, "probs")
    kind = FullLaplace if law.curvature == "full" else DiagLaplace
    settings = {"sigma_noise": program.log_scale.exp().item()} if regression else {}
    network = _Network(program, gates, regression)
    approximation = kind(network, "regression" if regression else "classification", backend=Backend, **settings)
    program.eval()
    shape = (-1, 1) if regression else (-1,)
    approximation.fit(_Loader([{**inputs, "labels": labels.view(shape)} for inputs, labels in batches]))
    if law.given_precision is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about how it would predict, which it does not
            approximation.optimize_prior_precision(pred_type="glm", method="marglik", prior_structure="scalar")
    else:
        approximation.prior_precision = law.given_precision
    with torch.no_grad():
        law.scale.copy_(approximation.posterior_scale)
        law.prior_precision.copy_(approximation.prior_precision.squeeze())
