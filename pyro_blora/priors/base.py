"""Laws of the gates before the data: functions of the layout, by name.

A prior is a pure function `(layout, **settings) -> Gates(z, g)`: two `NestedBernoulli`s, batch shapes (L, T), (L,).
Rates are in nats a gate: p(open | parent open) = exp(-rate). Register one with `@register_prior`, or name it as
`--prior file.py:function`. A prior that learns, adapts or looks at the data is an `nn.Module` whose call returns the
same; the function returns the module. What else it may have, all optional:

    adapt(means)      called after every step with the marginals of M components, z (M, L, T, K) and g (M, L, R - 1)
    explain(ratios)   called when the gates start, with the explained variances of layer inputs (L, R), input_pca.py
    pyro_model()      if its own settings are random: samples them as Pyro sites and returns the laws of the gates there
    pyro_guide()      ... samples the same sites from what is learned of them, reparametrised, and returns the draws by
                      name; their KL must be registered with torch.distributions.register_kl
    sample_prior(S)   ... the laws at S draws before any data
    report()          numbers for log and summary
    only(site)        called where it is the law of `z` or `g` alone: what it says of the other counts for nothing
"""

from torch import nn

from ..gates import Gates, NestedBernoulli
from ..layout import AdapterLayout
from ..registry import Registry

PRIORS = Registry("prior")
register_prior = PRIORS.register


class _Constant(nn.Module):
    """A prior without parameters, as a module, so that it moves between devices with its program."""

    def __init__(self, gates: Gates):
        super().__init__()
        self.register_buffer("z_log_probs", gates.z.log_probs, persistent=False)
        self.register_buffer("g_log_probs", gates.g.log_probs, persistent=False)

        self._laws = None

    def forward(self) -> Gates:
        """The same laws at every call, as they keep what they compute, until the buffers are others."""
        log_probs = self.z_log_probs, self.g_log_probs
        if self._laws is None or any(law.log_probs is not x for law, x in zip(self._laws, log_probs, strict=True)):
            self._laws = Gates(*(NestedBernoulli(x, validate_args=False) for x in log_probs))
        return self._laws


def build_one(name: str, settings: dict, layout: AdapterLayout) -> nn.Module:
    """The named prior of both sites, as a module that returns Gates.  Errors: as `per_site.build_prior`."""
    function = PRIORS.resolve(name)
    name = getattr(name, "__name__", name)
    result = function(layout, **PRIORS.settings(function, settings))
    prior = result if isinstance(result, nn.Module) else _Constant(checked(name, result, layout))
    if not isinstance(prior(), Gates):
        raise ValueError(f"prior {name!r} must return Gates(z, g) when it is called, got {type(prior()).__name__}")
    checked(name, prior(), layout)
    if not hasattr(prior, "pyro_guide") and (hasattr(prior, "sample") or hasattr(prior, "divergence")):
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
