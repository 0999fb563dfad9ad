"""Priors: the distributions of the gates before any data, each made from the layout by a named function.

The function takes `(layout, **settings)` and returns `Gates(z, g)`, or a `Prior` where the distributions adapt, learn
or use the data. Register it with `@register_prior("name")`, or name it as `--prior file.py:function`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..costs import Spent
from ..gates import Gates, NestedBernoulli
from ..layout import AdapterLayout
from ..registries import PRIORS
from ..registry import adopted, undefined

_FORMER = ("sample", "divergence")  # methods of older versions that a prior with random settings had


class Prior(nn.Module):
    """The distributions of the gates before the data.

    A subclass must define `forward`; the other methods have defaults. State that is not constant must be in buffers and
    parameters, so that it moves between devices and is in checkpoints; a parameter is learned from the guide's KL.
    A plain nn.Module with these methods works as well.

    Shapes: L projections, T tensors, K gates of a ladder, R ranks, M components of the guide, S draws.
    Units: rates are in nats per gate: p(open | parent open) = exp(-rate).
    """

    if TYPE_CHECKING:  # nn.Module's own takes and returns anything

        def __call__(self) -> Gates[NestedBernoulli]: ...

    def forward(self) -> Gates[NestedBernoulli]:
        """Two NestedBernoulli: z of batch shape (L, T) with K gates, g of batch shape (L,) with R - 1 gates."""
        raise undefined(self, "forward")

    # --- a prior that follows the training ----------------------------------------------------------------------------

    def adapt(self, means: Gates[Tensor]) -> None:
        """Called after every step with the guide's marginals, z (M, L, T, K) and g (M, L, R - 1).

        It must write into its buffers in place and read no value on the host: a step may be a recorded CUDA graph.
        """

    def explain(self, ratios: Tensor) -> None:
        """Called when the gates start.  ratios (L, R): share of a layer input's variance along each component."""

    @property
    def adapts(self) -> bool:
        """Whether `adapt` does anything; else it is not called."""
        return type(self).adapt is not Prior.adapt

    @property
    def explains(self) -> bool:
        """Whether `explain` does anything; else the variances are not computed."""
        return type(self).explain is not Prior.explain

    # --- a prior whose own settings are random: sample sites of the model, and of the guide ---------------------------

    def pyro_model(self) -> Gates[NestedBernoulli]:
        """Sample the settings as Pyro sites from their distribution; the distributions of the gates there."""
        return self()

    def pyro_guide(self) -> dict[str, Tensor]:
        """Sample the same sites from their variational distributions, reparametrized; the draws by name.

        The KL is in closed form: one that Pyro does not have is to be registered with torch.distributions.register_kl.
        """
        return {}

    def sample_prior(self, draws: int) -> Gates[NestedBernoulli]:
        """The distributions at draws of the settings before any data, with S first: (S, L, T), (S, L)."""
        return Gates(*(q.expand((draws, *q.batch_shape)) for q in self()))

    @property
    def rate_names(self) -> list[str]:
        """Names of the n random rates; where there are some, the next three are needed."""
        return []

    def draw_rates(self, draws: int, distribution: str = "posterior") -> Tensor:
        """(S, n) rates, from their guide (`posterior`) or from their distribution (`prior`)."""
        raise undefined(self, "draw_rates")

    def gates_at(self, rates: Tensor) -> Gates[NestedBernoulli]:
        """The distributions at rates (S, n), with S first."""
        raise undefined(self, "gates_at")

    def log_ratio(self, rates: Tensor) -> Tensor:
        """Log density of their distribution less that of their guide, nats.  (S, n) -> (S,)"""
        raise undefined(self, "log_ratio")

    def rate_parts(self) -> dict[str, "Prior"]:
        """The priors that have random rates, by the sites that they are of: `zg` for both."""
        return {"zg": self} if self.rate_names else {}

    # --- other --------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, float]:
        """Numbers for the log and the summary, by name."""
        return {}

    def spent(self, means: Gates[Tensor]) -> Spent | None:
        """What is spent of the cost by which the prior was asked, if it is not bit operations; gates as in `adapt`."""
        return None

    def missed(self, means: Gates[Tensor]) -> str | None:
        """A sentence on what was asked of the training and is not met, with the remedy; gates as in `adapt`."""
        return None

    def only(self, site: str) -> None:
        """Called where it is the prior of `z` or `g` alone: its distribution of the other site is ignored."""


class Constant(Prior):
    """Constant Gates as a module, so that they move between devices with the program."""

    z_log_probs: Tensor  # (L, T, K)
    g_log_probs: Tensor  # (L, R - 1)

    def __init__(self, gates: Gates[NestedBernoulli]):
        super().__init__()
        self.register_buffer("z_log_probs", gates.z.log_probs.contiguous(), persistent=False)
        self.register_buffer("g_log_probs", gates.g.log_probs.contiguous(), persistent=False)

        self._distributions: Gates[NestedBernoulli] | None = None

    def forward(self) -> Gates[NestedBernoulli]:
        """The same objects at every call, as they cache what they compute, until the buffers are replaced."""
        log_probs = self.z_log_probs, self.g_log_probs
        distributions = self._distributions
        if distributions is None or any(q.log_probs is not x for q, x in zip(distributions, log_probs, strict=True)):
            distributions = self._distributions = Gates(*(NestedBernoulli(x, validate_args=False) for x in log_probs))
        return distributions


def build_one(name: str | Callable[..., Any], settings: dict, layout: AdapterLayout) -> Prior:
    """The named prior of both sites.  Errors: as `per_site.build_prior`."""
    function = PRIORS.resolve(name)
    name = PRIORS.called(name)
    result = function(layout, **PRIORS.settings(function, settings))
    prior = adopted(result, Prior) if isinstance(result, nn.Module) else Constant(checked(name, result, layout))
    if not isinstance(prior(), Gates):
        raise ValueError(f"prior {name!r} must return Gates(z, g) when it is called, got {type(prior()).__name__}")
    checked(name, prior(), layout)
    if type(prior).pyro_guide is Prior.pyro_guide and any(hasattr(prior, former) for former in _FORMER):
        raise ValueError(
            f"prior {name!r} has sample() or divergence(), which are no longer called: write pyro_model() and "
            "pyro_guide() in their place, which sample its random settings as Pyro sites; see priors/base.py"
        )
    return prior


def checked(name: str, gates: Any, layout: AdapterLayout) -> Gates[NestedBernoulli]:
    """The gates of a prior.  Errors: ValueError unless they are two NestedBernoulli in the shapes of the layout."""
    if not (isinstance(gates, tuple) and len(gates) == 2):
        raise ValueError(f"prior {name!r} must return Gates(z, g), got {type(gates).__name__}")
    gates = Gates(*gates)
    for site, shape in (("z", layout.z_shape), ("g", layout.g_shape)):
        distribution = getattr(gates, site)
        if not isinstance(distribution, NestedBernoulli):
            raise ValueError(f"prior {name!r}: {site} must be a NestedBernoulli, got {type(distribution).__name__}")
        if tuple(distribution.log_probs.shape) != shape:
            raise ValueError(
                f"prior {name!r}: {site} has shape {tuple(distribution.log_probs.shape)}, expected {shape}"
            )
        if distribution.log_probs.dtype != torch.float32:
            raise ValueError(
                f"prior {name!r}: {site} is {distribution.log_probs.dtype}, expected torch.float32: end with .float()"
            )
        if not bool((distribution.log_probs <= 0).all()):
            raise ValueError(f"prior {name!r}: the log-probabilities of {site} must be <= 0 and not nan")
    return gates
