"""What a prior is: the distributions of the gates before the data, made from the layout by a function with a name.

The function takes `(layout, **settings)` and returns `Gates(z, g)`, or a `Prior` where the distributions adapt, learn
or look at the data. Register it with `@register_prior("name")`, or name it as `--prior file.py:function`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..gates import Gates, NestedBernoulli
from ..layout import AdapterLayout
from ..registries import PRIORS
from ..registry import adopted

_FORMER = ("sample", "divergence")  # methods of older versions that a prior with random settings had


class Prior(nn.Module):
    """The distributions of the gates before the data.

    Must have: `forward`. May have: everything else, whose defaults stand here. What is not constant is in buffers and
    parameters, so that it moves between devices and is in checkpoints; a parameter learns from the KL of the guide.
    A plain nn.Module with these methods serves as well.

    Shapes: L projections, T tensors, K gates of a ladder, R ranks, M components of the guide, S draws.
    Units: rates are in nats per gate: p(open | parent open) = exp(-rate).
    """

    if TYPE_CHECKING:  # nn.Module's own takes and returns anything

        def __call__(self) -> Gates: ...

    def forward(self) -> Gates:
        """Two NestedBernoulli: z of batch shape (L, T) with K gates, g of batch shape (L,) with R - 1 gates."""
        raise NotImplementedError

    # --- a prior that follows the training ----------------------------------------------------------------------------

    def adapt(self, means: Gates) -> None:
        """Called after every step with the guide's marginals, z (M, L, T, K) and g (M, L, R - 1).

        It writes into its buffers in place and asks no tensor for its value: a step may be recorded for a GPU.
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

    def pyro_model(self) -> Gates:
        """Sample the settings as Pyro sites from their distribution; the distributions of the gates there."""
        return self()

    def pyro_guide(self) -> dict[str, Tensor]:
        """Sample the same sites from what is learned of them, reparametrized; the draws by name.

        The KL is in closed form: one that Pyro does not have is to be registered with torch.distributions.register_kl.
        """
        return {}

    def sample_prior(self, draws: int) -> Gates:
        """The distributions at draws of the settings before any data, with S first: (S, L, T), (S, L)."""
        return Gates(*(law.expand((draws, *law.batch_shape)) for law in self()))

    @property
    def rate_names(self) -> list[str]:
        """Names of the n random rates; where there are some, the next three are needed."""
        return []

    def draw_rates(self, draws: int, law: str = "posterior") -> Tensor:
        """(S, n) rates, from their guide (`posterior`) or from their distribution (`prior`)."""
        raise NotImplementedError

    def gates_at(self, rates: Tensor) -> Gates:
        """The distributions at rates (S, n), with S first."""
        raise NotImplementedError

    def log_ratio(self, rates: Tensor) -> Tensor:
        """Log density of their distribution less that of their guide, nats.  (S, n) -> (S,)"""
        raise NotImplementedError

    def rate_parts(self) -> dict[str, "Prior"]:
        """The priors that have random rates, by the sites that they are of: `zg` for both."""
        return {"zg": self} if self.rate_names else {}

    # --- and else -----------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, float]:
        """Numbers for the log and the summary, by name."""
        return {}

    def only(self, site: str) -> None:
        """Called where it is the prior of `z` or `g` alone: what it says of the other site counts for nothing."""


class Constant(Prior):
    """What a function returned as Gates, as a module, so that it moves between devices with its program."""

    def __init__(self, gates: Gates):
        super().__init__()
        self.register_buffer("z_log_probs", gates.z.log_probs, persistent=False)
        self.register_buffer("g_log_probs", gates.g.log_probs, persistent=False)

        self._laws = None

    def forward(self) -> Gates:
        """The same distributions at every call, as they keep what they compute, until the buffers are others."""
        log_probs = self.z_log_probs, self.g_log_probs
        if self._laws is None or any(law.log_probs is not x for law, x in zip(self._laws, log_probs, strict=True)):
            self._laws = Gates(*(NestedBernoulli(x, validate_args=False) for x in log_probs))
        return self._laws


def build_one(name: str | Callable, settings: dict, layout: AdapterLayout) -> Prior:
    """The prior of both sites, of a name or of a function.  Errors: as `per_site.build_prior`."""
    function = PRIORS.resolve(name)
    name = PRIORS.called(name)
    result = function(layout, **PRIORS.settings(function, settings))
    prior = adopted(result, Prior) if isinstance(result, nn.Module) else Constant(checked(name, result, layout))
    if not isinstance(prior(), Gates):
        raise ValueError(f"prior {name!r} must return Gates(z, g) when it is called, got {type(prior()).__name__}")
    checked(name, prior(), layout)
    if type(prior).pyro_guide is Prior.pyro_guide and any(hasattr(prior, former) for former in _FORMER):
        raise ValueError(
            f"prior {name!r} has sample() or divergence(), which are not asked for any more: write pyro_model() and "
            "pyro_guide() in their place, which sample its random settings as Pyro sites; see priors/base.py"
        )
    return prior


def checked(name: str, gates: Gates, layout: AdapterLayout) -> Gates:
    """The gates of a prior.  Errors: ValueError for what is no pair of laws in the shapes of the layout."""
    if not (isinstance(gates, tuple) and len(gates) == 2):
        raise ValueError(f"prior {name!r} must return Gates(z, g), got {type(gates).__name__}")
    gates = Gates(*gates)
    for site, shape in (("z", layout.z_shape), ("g", layout.g_shape)):
        law = getattr(gates, site)
        if not isinstance(law, NestedBernoulli):
            raise ValueError(f"prior {name!r}: {site} must be a NestedBernoulli, got {type(law).__name__}")
        if tuple(law.log_probs.shape) != shape:
            raise ValueError(f"prior {name!r}: {site} has shape {tuple(law.log_probs.shape)}, expected {shape}")
        if not bool((law.log_probs <= 0).all()):
            raise ValueError(f"prior {name!r}: the log-probabilities of {site} must be <= 0 and not nan")
    return gates
