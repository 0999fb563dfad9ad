"""Bayesian-LoRA as a probabilistic program: low-rank adapters whose bit widths and ranks are random."""

from . import old_names
from .lazily import lazily

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "RunConfig": "config",
        "attach": "adapters",
        "draw": "posterior",
        "expected_bops": "bops",
        "export": "deploy",
        "fit": "training",
        "load": "deploy",
        "predict": "posterior",
        "register_guide": "guides",
        "register_prior": "priors",
        "to_arviz": "posterior",
    },
)
old_names.install()
