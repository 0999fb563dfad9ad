"""Laws of the adapter's weights by name, as `--weights NAME --weights.SETTING VALUE`; what a law has: weight_laws.py.

A law is made by `(weights, head, **settings)`: the parameters of adapter and task head, by key. `ensemble` and
`dropout` are random in more than theta, and what makes them so is in the configuration (config.py). Register a law with
`@register_weights`.
"""

from typing import Literal

from torch import nn

from .fitted_laws import Laplace, Swag
from .registry import Registry
from .weight_laws import Gaussian, LowRank, Parameters, Point

WEIGHTS = Registry("weights")
register_weights = WEIGHTS.register
Sides = Literal["lora_A", "both"]
Members = Literal["point", "gaussian", "low_rank", "swag", "laplace"]


def _random_sides(weights: Parameters, sides: Sides) -> Parameters:
    chosen = {key: p for key, p in weights.items() if key[1] == "lora_A"}
    return chosen if sides == "lora_A" and chosen else weights  # an XS adapter has its core only


@register_weights("point")
def point(weights: Parameters, head: Parameters) -> Point:
    """Trained weights, nothing random but the gates."""
    return Point(weights)


@register_weights("gaussian")
def gaussian(
    weights: Parameters, head: Parameters, *, prior_std: float | None = None, start_std: float = 0.01,
    kl_weight: float = 1.0, sides: Sides = "lora_A",
) -> Gaussian:  # fmt: skip
    """Independent Gaussians, learned with the gates by SVI: mean field, the BLoB family.

    Settings: prior_std (default: for each matrix the best, which has a closed form); start_std; kl_weight, of theta's
    KL beside that of the run: where rows are few it outweighs what they say, and nothing is learned, until it is below
    1; sides, of LoRA: lora_A as in BLoB, or both. An XS adapter has its core.
    Source: Wang et al., BLoB (2024).
    """
    return Gaussian(_random_sides(weights, sides), head, prior_std, start_std, kl_weight)


@register_weights("low_rank")
def low_rank(
    weights: Parameters, head: Parameters, *, rank: int = 10, prior_std: float | None = None, start_std: float = 0.01,
    kl_weight: float = 1.0, sides: Sides = "lora_A",
) -> LowRank:  # fmt: skip
    """A Gaussian whose covariance is a diagonal plus `rank` directions across all matrices, learned by SVI.

    Settings: as of gaussian, and rank.
    Source: Ong, Nott and Smith, Gaussian variational approximation with a factor covariance structure (2018).
    """
    return LowRank(_random_sides(weights, sides), head, prior_std, start_std, kl_weight, rank)


@register_weights("swag")
def swag(
    weights: Parameters, head: Parameters, *, rank: int = 10, burn_in: float = 0.5, snapshots: int = 20,
    plateau: float = 0.5,
) -> Swag:  # fmt: skip
    """A Gaussian fitted to the path of the training, with the paper's covariance.

    Settings: rank, K: deviations that are kept, 0 for a diagonal covariance; burn_in, the fraction of the steps before
    the first snapshot; snapshots, taken evenly after it; plateau, the learning rate then, as a fraction of the peak.
    Source: Maddox et al., A simple baseline for Bayesian uncertainty (2019); Marszalek et al., B-LoRA-XS (2025).
    """
    return Swag(weights, head, rank, burn_in, snapshots, plateau)


@register_weights("laplace")
def laplace(
    weights: Parameters, head: Parameters, *, structure: Literal["full", "low_rank", "diag"] | None = None,
    rank: int = 100, prior_precision: float | None = None, linearized: bool = True,
) -> Laplace:  # fmt: skip
    """A Gaussian from the curvature at the trained weights, by laplace-torch.

    Settings: structure of the curvature (default: full up to 2,048 weights, low_rank above); rank, how many of its
    largest eigenvalues low_rank keeps; prior_precision (default: of the least NLL on rows held out by --validation;
    without them of the largest marginal likelihood, which is often far too low); linearized, whether predictions are
    those of the network linearized at its weights, with derivatives that pass rounding straight through: where bit
    gates leave few bits, false is truer.
    Source: Daxberger et al., Laplace redux (2021); Yang et al., Laplace-LoRA (2024).
    """
    return Laplace(weights, head, structure, rank, prior_precision, linearized)


@register_weights("ensemble")
def ensemble(weights: Parameters, head: Parameters, *, members: int = 3, of: Members = "point") -> Point:
    """Fits from several seeds, whose predicted probabilities are averaged; the first is exported.

    Settings: members; of, the law of each of them, with its own default settings: of laplace a mixture of Laplace
    approximations, of swag MultiSWAG; of dropout masks with --average_over dropout.
    Source: Lakshminarayanan et al., Deep ensembles (2017); Eschenhagen et al., Mixtures of Laplace approximations
    (2021); Wilson and Izmailov (2020).
    """
    if members < 2:
        raise ValueError(f"weights 'ensemble' needs at least 2 members, got {members}: one is weights 'point'")
    return build_weights(of, weights, head)


@register_weights("dropout")
def dropout(weights: Parameters, head: Parameters) -> Point:
    """Predictions average over dropout masks, the same as --average_over dropout.

    Source: Gal and Ghahramani (2016).
    """
    return Point(weights)


def build_weights(name: str, weights: Parameters, head: Parameters, settings: dict | None = None) -> Point:
    """The named law of the weights.  Errors: ValueError for an unknown name or setting, or for nothing to be random."""
    function = WEIGHTS.resolve(name)
    checked = WEIGHTS.settings(function, settings or {})
    law = function(weights, head, **checked)
    if not isinstance(law, nn.Module) or not hasattr(law, "random"):
        raise ValueError(f"weights {name!r} must return an nn.Module as in weights.py, got {type(law).__name__}")
    return law
