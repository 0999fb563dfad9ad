"""Bayesian-LoRA as a probabilistic program: low-rank adapters whose bit widths and ranks are random."""

from typing import TYPE_CHECKING

from . import old_names
from .lazily import lazily

__version__ = "0.1.0"
if TYPE_CHECKING:
    from .adapters import attach as attach
    from .adapters import use_gates as use_gates
    from .bops import expected_bops as expected_bops
    from .config import RunConfig as RunConfig
    from .deploy import export as export
    from .deploy import load as load
    from .gates import Gates as Gates
    from .gates import NestedBernoulli as NestedBernoulli
    from .posterior import draw as draw
    from .posterior import predict as predict
    from .posterior import to_arviz as to_arviz
    from .registries import register_adapter as register_adapter
    from .registries import register_elbo as register_elbo
    from .registries import register_guide as register_guide
    from .registries import register_prior as register_prior
    from .registries import register_section as register_section
    from .registries import register_weights as register_weights
    from .run import train_run as train_run
    from .tasks import Task as Task
    from .tasks import register_task as register_task
    from .training import fit as fit
else:
    __getattr__, __dir__, __all__ = lazily(__name__, __file__)
old_names.install()
