"""Stochastic variational inference of gates and adapters, from the first batch to the best epoch."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .loop import fit as fit
    from .optimizer import make_optimizer as make_optimizer
    from .schedule import Schedule as Schedule
    from .trained import Trained as Trained
else:
    __getattr__, __dir__, __all__ = lazily(__name__, __file__)
