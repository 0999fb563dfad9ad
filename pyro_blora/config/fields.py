"""What the value of one field of a run's configuration may be: types, ranges, and the remedy where it is neither."""

import functools
import json
import math
import operator
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..registries import CHOSEN
from ..user_values import LARGEST, as_plain, coerce, shown

_DEEPEST = 20  # levels of a setting
_MOST_VALUES = 10_000  # of the settings of one part


def _at_least(low: float) -> tuple:
    return (lambda value: value >= low), f"at least {low}"


def _from_to(low: int, high: int) -> tuple:
    return (lambda value: low <= value <= high), f"from {low} to {high:,}"


def _positive() -> tuple:
    return (lambda value: 0 < value < math.inf), "a positive number"


def _not_negative() -> tuple:
    return (lambda value: 0 <= value < math.inf), "0 or a positive number"


def _fraction() -> tuple:
    return (lambda value: 0 <= value <= 1), "between 0 and 1"


MOST_FITS = 1000  # restarts, or members of an ensemble: one after the other
RANGES = {  # field: (check, what is expected, remedy)
    "rank": (*_from_to(1, 65_536), "8 is usual; the gates close ranks that are not needed"),
    "alpha": (*_positive(), "twice the rank is usual"),
    "embedding_bits": ((lambda value: value == 32 or 2 <= value <= 16), "2 to 16, or 32", "8 is nearly exact"),
    "max_train": (*_at_least(1), "leave it out to use everything"),
    "epochs": (*_from_to(1, 100_000), "one pass is the shortest run; max_train makes it shorter"),
    "batch_size": (*_from_to(1, 65_536), "accumulation keeps the effective batch when memory is short"),
    "accumulation": (*_from_to(1, 65_536), "1 means a step after every batch"),
    "restarts": (*_from_to(1, MOST_FITS), "1 is a single fit; 3 or 4 show whether they agree"),
    "lr": (*_positive(), "1e-3 is usual for adapters"),
    "lr_head": (*_positive(), "leave it out to use lr"),
    "lr_gates": (*_not_negative(), "0 freezes the gates"),
    "lr_ranges": (*_not_negative(), "0 freezes the ranges"),
    "weight_decay": (*_not_negative(), "0 switches it off"),
    "warmup": (*_fraction(), "it is a fraction of the steps, not a number of steps"),
    "kl_weight": (*_positive(), "1 is the ELBO"),
    "kl_warmup": (*_fraction(), "it is a fraction of the steps; 1 starts the gates when training has ended"),
    "rest": (*_fraction(), "half of the steps after kl_warmup is usual; 0: gates learn from their start on"),
    "settle": (*_fraction(), "0: gates learn to the end; all that is left by kl_warmup: they do not learn"),
    "distillation": (*_fraction(), "0.5 weighs the labels and the open network alike; 0 switches it off"),
    "temperature_start": (*_positive(), "0.5 is usual"),
    "temperature_end": (*_positive(), "0.1 is usual; at 0 the relaxed gates have no gradient"),
    "clip_norm": (*_positive(), "a large number, such as 1e9, switches clipping off"),
    "max_length": (*_from_to(4, 131_072), "a pair of texts needs three special tokens and a word"),
    "data_seed": ((lambda value: 0 <= value < 2**32), "between 0 and 4294967295", "leave it out to use seed"),
    "validation": ((lambda value: 0 <= value < 1), "a fraction from 0 to below 1", "0.1 is usual"),
    "seed": ((lambda value: 0 <= value < 2**32), "between 0 and 4294967295", "NumPy's generators take 32 bits"),
    "draws": (*_from_to(1, 100_000), "15 is usual"),
    "logging_steps": (*_at_least(1), "1 logs every step"),
    "checkpoint_steps": (*_at_least(1), "a number beyond the last step writes none in between"),
    "checkpoint_minutes": (*_positive(), "5 is usual; a large number leaves it to checkpoint_steps"),
    "max_skipped_steps": (*_at_least(0), "0 stops at the first one"),
    "task": (bool, "a name or file.py:function", "`pyro-blora tasks` lists the names"),
    "backbone": (bool, "a name or a folder", "demo needs no download"),
    "prior": (bool, "a name or file.py:function", "`pyro-blora priors` lists the names"),
    "guide": (bool, "a name or file.py:function", "`pyro-blora guides` lists the names"),
    "weights": (bool, "a name or file.py:function", "`pyro-blora weights` lists the names"),
    "output_dir": (bool, "a folder", "runs is the default"),
    "glue_dir": (bool, "a folder", "give none to download"),
    "backbone_revision": (bool, "a branch, tag or commit", "give none for the newest"),
    "ood_task": (bool, "a name or file.py:function", "give none for no other task"),
    "tracker": (bool, "a name that Accelerate knows", "give none for no tracker"),
}


def fit(name: str, annotation: Any, value: Any) -> Any:
    """The value as the field's type: whole numbers become floats where floats are meant, so that digests are stable."""
    allowed = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if isinstance(value, list | tuple) and tuple in allowed:
        return tuple(value)
    if dict in allowed:
        return _table(name, value)
    if int in allowed:
        _require_short(name, value)
    plain = functools.reduce(operator.or_, (kind for kind in allowed if kind is not tuple))
    return coerce(str(value) if isinstance(value, Path) else value, plain, name)


def _table(name: str, value: Any) -> dict:
    """A copy of a table of settings."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a table of settings, got {shown(value)}")
    _require_small(name, value)
    try:
        # a copy, and proof that it can be stored
        return json.loads(json.dumps(dict(value), allow_nan=False, default=_stored))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold plain numbers, words and lists, got {shown(value)}: {error}") from error


def _stored(value: Any) -> Any:
    """What JSON has no word for: a path, or a number of NumPy."""
    found = str(value) if isinstance(value, Path) else as_plain(value)
    if found is value:
        raise TypeError(f"{type(value).__name__} has no form in a file")
    return found


def read_files(config: Any) -> None:
    """Put what the files that settings name hold in place of their names; of a prior, also of a site's own prior."""
    for owner, registry in CHOSEN.items():
        settings = getattr(config, f"{owner}_settings")
        own = [(f"{site}.", settings[site]) for site in ("z", "g") if owner == "prior" and site in settings]
        for prefix, name in (("", getattr(config, owner)), *own):
            registry.read_files(str(name), settings, prefix)


def _require_short(name: str, value: Any) -> None:
    """Refuse a number that not every reader of a file has."""
    try:
        long = not isinstance(value, bool) and abs(float(value)) > LARGEST
    except OverflowError:
        long = True
    except (TypeError, ValueError):  # not a number: `coerce` reports it
        return
    if long:
        raise ValueError(f"{name} must be a whole number of at most 18 digits, got {shown(value)}: lower it")


def _require_small(name: str, settings: Mapping) -> None:
    """Refuse settings that no part has: a file whose aliases multiply, lists in lists without end, giant numbers."""
    count = 0
    level: list[Any] = [settings]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError(f"{name}: a whole number must have at most 18 digits, got {shown(value)}: lower it")
            if isinstance(value, Mapping | list | tuple):
                below += value.values() if isinstance(value, Mapping) else value
                count += len(value)
            if count > _MOST_VALUES:
                raise ValueError(f"{name} has more than {_MOST_VALUES:,} values: leave out what no setting needs")
        level = below
    if level:
        raise ValueError(f"{name} has more than {_DEEPEST} levels inside each other: flatten it")


def targets(value: str | tuple | None) -> str | tuple[str, ...] | None:
    """None, a tuple of names (also from `query,value`), or one regular expression."""
    if isinstance(value, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", value.strip()):
        value = tuple(part.strip() for part in value.split(","))
    if isinstance(value, tuple) or value == "":
        if not value or not all(isinstance(part, str) and part for part in value):
            raise ValueError(f"target_modules must be names of modules, got {value!r}: query,value for example")
        return value
    if value is not None:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"target_modules {shown(value)} is no regular expression ({error})") from error
    return value
