"""What a run's configuration must fulfil, each with the sentence that names the remedy."""

from typing import Any

from ..registries import WEIGHTS
from ..user_values import shown, suggest
from .fields import MOST_FITS, RANGES
from .methods import METHODS

CHOICES = {  # of what cannot be added to
    "method": tuple(METHODS),
    "init_lora_weights": ("default", "eva"),
    "average_over": ("gates", "dropout"),
    "scope": ("adapted", "encoder", "encoder+head"),
    "granularity": ("tensor", "channel"),
    "precision": ("float32", "bf16"),
    "gate_optimizer": ("auto", "natural", "adam"),
}


def require_valid(config: Any) -> None:
    """Check a RunConfig.

    Errors: ValueError naming the field, what was given, what was expected and the remedy.
    """
    if config.precision in ("fp16", "float16", "half"):
        raise ValueError(
            f"precision {config.precision!r} is refused: the summed likelihood and the 16-bit grid overflow or round "
            "away in half precision: use bf16"
        )
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"unknown {name} {getattr(config, name)!r}: {suggest(getattr(config, name), choices)}")
    for name, (holds, expected, remedy) in RANGES.items():
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} must be {expected}, got {shown(value)}: {remedy}")
    _require_consistent(config)
    start, end = config.temperature_start, config.temperature_end
    if end > start:
        raise ValueError(f"temperature_end must be at most temperature_start, got {end} > {start}: it is cooled")


def _require_consistent(config: Any) -> None:
    if config.choose_epoch and not config.validation:
        raise ValueError("choose_epoch needs rows to choose by: give --validation 0.1, or drop --choose_epoch")
    if config.choose_epoch and config.kl_warmup == 1:
        raise ValueError(
            "gates that are set after training (kl_warmup 1) leave no epoch for --choose_epoch to choose: drop it, "
            "or lower --kl_warmup"
        )
    if config.kl_warmup + config.rest + config.settle > 1 + 1e-9:
        raise ValueError(
            f"kl_warmup {config.kl_warmup:g}, rest {config.rest:g} and settle {config.settle:g} are more than all of "
            "the steps: the gates start after the first fraction, and rest in the others: lower one of them"
        )
    of_fits = WEIGHTS.entry(config.weights_of_fits)
    for flag, sentence in [pair for part in (*config.parts, of_fits) for pair in part.excludes.items()]:
        if getattr(config, flag) != type(config).__dataclass_fields__[flag].default:
            raise ValueError(sentence)
    if not config.is_ensemble:
        return
    weights = WEIGHTS.entry(config.weights)
    if of_fits.fits or of_fits.sets:
        known = [entry.name for entry in WEIGHTS.entries() if not (entry.fits or entry.sets)]
        raise ValueError(
            f"weights {config.weights!r}: {weights.each} must be one of {', '.join(known)}, or file.py:function, got "
            f"{of_fits.name!r}"
        )
    count = config.of_weights(weights.fits)
    if isinstance(count, int | float) and not count <= MOST_FITS:
        raise ValueError(f"weights.{weights.fits} must be at most {MOST_FITS:,}, got {count}: 3 to 10 are usual")
