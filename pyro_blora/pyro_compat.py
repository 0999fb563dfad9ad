"""What Pyro's inference tools need of a program beyond its model and its guide."""

import copy
import math
import warnings
import weakref
from typing import Any

from pyro.poutine.runtime import _PYRO_STACK, effectful
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from .gates import Gates, NestedBernoulli


def show_parameters(program: nn.Module) -> None:
    """Where SVI collects parameters for its optimizer: all that learn, as `param` sites that no global store keeps.

    Errors: ValueError for a guide that SVI cannot train. Warns where a prior adapts, which SVI does not do.
    """
    if not any(isinstance(handler, TraceMessenger) and handler.param_only for handler in _PYRO_STACK):
        return
    _require_svi(program)
    for name, parameter in program.named_parameters():
        if parameter.requires_grad:
            shown: Any = parameter.detach()  # as Pyro's module-local parameters: a view that knows what is optimized
            shown.unconstrained = weakref.ref(parameter)
            effectful(lambda shown=shown: shown, type="param")(name=f"program.{name}")


def _require_svi(program: Any) -> None:
    if program.gate_guide.is_allocated:
        raise ValueError(
            f"the guide {type(program.gate_guide).__name__} cannot be trained by pyro.infer.SVI: an allocator sets its "
            "ranks after every step. Use pyro_blora.fit, or another guide"
        )
    if program.prior.adapts:
        warnings.warn(
            f"the prior {type(program.prior).__name__} adapts after every step: call program.prior.adapt(pyro_blora."
            "posterior.component_marginals(program)) after svi.step, or it stays as it is",
            stacklevel=2,
        )


def without_singletons(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What Predictive replays has a dimension of 1 for every plate of the model that a site is not in."""
    return x.reshape(shape) if x.dim() > len(shape) and x.numel() == math.prod(shape) else x


def taking_soft_draws(distributions: Gates[NestedBernoulli]) -> Gates[NestedBernoulli]:
    """The same without a check of values: Pyro computes the log-probability of a soft draw, and then uses the KL."""
    unchecked = Gates(*map(copy.copy, distributions))
    for distribution in unchecked:
        distribution._validate_args = False
    return unchecked
