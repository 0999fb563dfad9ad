"""What was learned: draws, predictions, their calibration, exact statements about gates, and ArviZ."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .arviz import to_arviz as to_arviz
    from .draws import bops as bops
    from .draws import component_marginals as component_marginals
    from .draws import deployed as deployed
    from .draws import divergences as divergences
    from .draws import draw as draw
    from .draws import draw_weights as draw_weights
    from .draws import marginals as marginals
    from .draws import mean_kl as mean_kl
    from .draws import rates as rates
    from .draws import seeded as seeded
    from .gate_posterior import Posterior as Posterior
    from .prediction import Prediction as Prediction
    from .prediction import predict as predict
else:
    __getattr__, __dir__, __all__ = lazily(__name__, __file__)
