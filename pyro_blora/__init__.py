"""Bayesian-LoRA as a probabilistic program: low-rank adapters whose bit widths and ranks are random."""

from . import old_names
from .lazily import lazily

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "Gates": "gates",
        "NestedBernoulli": "gates",
        "RunConfig": "config",
        "attach": "adapters",
        "draw": "posterior",
        "expected_bops": "bops",
        "export": "deploy",
        "fit": "training",
        "load": "deploy",
        "predict": "posterior",
        "register_adapter": "registries",
        "register_elbo": "registries",
        "register_guide": "registries",
        "register_prior": "registries",
        "register_section": "registries",
        "register_task": "tasks",
        "register_weights": "registries",
        "to_arviz": "posterior",
        "use_gates": "adapters",
    },
)
old_names.install()
