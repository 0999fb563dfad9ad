"""What was learned: draws, predictions, their calibration, exact statements about gates, and ArviZ."""

from ..lazily import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "Posterior": "gate_posterior",
        "Prediction": "prediction",
        "bops": "draws",
        "component_marginals": "draws",
        "deployed": "draws",
        "divergences": "draws",
        "draw": "draws",
        "draw_weights": "draws",
        "marginals": "draws",
        "mean_kl": "draws",
        "predict": "prediction",
        "rates": "draws",
        "seeded": "draws",
        "to_arviz": "arviz",
    },
)
