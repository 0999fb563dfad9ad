"""One run's configuration: a frozen dataclass with its checks, its JSON and its digest."""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from .methods import METHODS, resolved

PRESETS = Path(__file__).parent / "presets"
CHOICES = {
    "estimator": ("relaxed", "straight_through", "score_function", "enumerate"),
    "method": tuple(METHODS),
    "adapter": ("lora", "adalora", "none"),
    "init_lora_weights": ("default", "eva"),
    "average_over": ("gates", "dropout"),
    "scope": ("adapted", "encoder"),
    "precision": ("float32", "bf16"),
}
# Left out of the digest: they say where and how a run is watched and saved, not what it computes.
NOT_IN_DIGEST = ("output_dir", "tracker", "checkpoint_steps")
# Later than runs whose folders are to keep their names.
_ADDED = (("data_seed", None), ("restarts", 1), ("share_inputs", False))
_USUAL = {"lr": 1e-3, "kl_warmup": 0.3}  # where neither user nor method says anything
_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", dict: "a table of settings"}


def _field(default: Any, description: str) -> Any:
    given = {"default_factory": dict} if default is dict else {"default": default}
    return dataclasses.field(**given, metadata={"help": description})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides what a run computes.

    Errors: ValueError naming the field, what was given, what was expected and the remedy.
    """

    task: str = _field("acceptability", "task to learn: acceptability needs no download; the GLUE tasks by name")
    backbone: str = _field("demo", "demo (a packaged MiniLM), a folder, a name on the hub, or file.py:function")
    glue_dir: str | None = _field(None, "folder of GLUE files to read instead of downloading; none: download")
    method: str = _field("bayesian_lora", "bayesian_lora, or what it is compared with; `pyro-blora methods` lists them")
    prior: str = _field("bops", "law of the gates: a name that `pyro-blora priors` lists, or file.py:function")
    prior_settings: dict = _field(dict, "settings of the prior, on the command line as --prior.rate 3")
    guide: str = _field("mean_field", "variational family: a name that `pyro-blora guides` lists, or file.py:function")
    guide_settings: dict = _field(dict, "settings of the guide, on the command line as --guide.NAME VALUE")
    estimator: str = _field("relaxed", "gradient of the gates: relaxed, straight_through, score_function, enumerate")
    adapter: str = _field("lora", "what learns beside the head: lora; adalora and none belong to methods")
    init_lora_weights: str = _field("default", "how lora_A starts: default (as in PEFT) or eva (principal components)")
    rank: int = _field(8, "largest rank R of every adapter")
    alpha: float = _field(16.0, "scale of the adapter: its output is multiplied by alpha / rank")
    target_modules: str | tuple | None = _field(
        None, "modules to adapt: names separated by commas, or one regular expression; none: the architecture's preset"
    )
    scope: str = _field("adapted", "what is quantized: adapted (the adapted projections) or encoder (every projection)")
    share_inputs: bool = _field(False, "query, key and value of a layer share the bit gates of their input: less time")
    max_train: int | None = _field(None, "training examples to use; none: all")
    epochs: int = _field(3, "passes over the training examples")
    batch_size: int = _field(16, "examples per device and forward")
    accumulation: int = _field(1, "forwards per optimizer step")
    lr: float | None = _field(None, "learning rate of the adapter; none: 1e-3, or the method's own")
    lr_head: float | None = _field(None, "learning rate of the classification head; none: lr")
    lr_gates: float = _field(0.1, "first learning rate of the gates, nats a step; falls to 1 %; 0 freezes them")
    lr_ranges: float = _field(1e-3, "learning rate of the quantization ranges; 0 freezes them")
    weight_decay: float = _field(0.01, "decoupled weight decay of adapter and head; gates and ranges have none")
    warmup: float = _field(0.06, "learning-rate warm-up, as a fraction of the steps")
    kl_weight: float = _field(1.0, "weight of the KL once the gates start; below 1: a cold posterior, surer gates")
    kl_warmup: float | None = _field(
        None, "fraction of the steps with open gates, before they start; 1: after training; none: 0.3, or the method's"
    )
    temperature_start: float = _field(0.5, "temperature of the relaxed gates at the first step")
    temperature_end: float = _field(0.1, "temperature of the relaxed gates at the last step")
    clip_norm: float = _field(1.0, "largest norm of the gradient of adapter and head")
    precision: str = _field("float32", "arithmetic inside the backbone: float32 or bf16; likelihood and gates: float32")
    gradient_checkpointing: bool = _field(False, "recompute activations in the backward pass: less memory, more time")
    max_length: int = _field(128, "longest input, in tokens; longer ones are cut")
    seed: int = _field(0, "seed of data order, initialization and gate draws")
    data_seed: int | None = _field(None, "seed of the training rows that max_train keeps; none: seed")
    restarts: int = _field(1, "fits from seed, seed + 1, ...: the chains of posterior.nc; the first is exported")
    draws: int = _field(15, "draws of the gates for posterior and predictions")
    average_over: str = _field(
        "gates", "what draws of predictions differ in: gates, or (dropout) gates and dropout masks"
    )
    output_dir: str = _field("runs", "folder that receives the run's folder")
    logging_steps: int = _field(10, "optimizer steps between lines of metrics.jsonl")
    checkpoint_steps: int = _field(100, "optimizer steps between checkpoints")
    tracker: str | None = _field(None, "experiment tracker by its Accelerate name: tensorboard, wandb, ...; none: none")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _fit(field.name, field.type, getattr(self, field.name)))
        if self.method in METHODS:  # an unknown one is refused below
            self._follow_method()
        object.__setattr__(self, "target_modules", _targets(self.target_modules))
        if self.precision in ("fp16", "float16", "half"):
            raise ValueError(
                f"precision {self.precision!r} is refused: the summed likelihood and the 16-bit grid overflow or round "
                "away in half precision: use bf16"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: {suggest(getattr(self, name), choices)}")
        for name, (holds, expected, remedy) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}: {remedy}")
        start, end = self.temperature_start, self.temperature_end
        if end > start:
            raise ValueError(f"temperature_end must be at most temperature_start, got {end} > {start}: it is cooled")

    def _follow_method(self) -> None:
        """Set what the method fixes or proposes."""
        fields = dataclasses.fields(self)
        given = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        for owner in ("prior", "guide"):
            given |= {f"{owner}.{key}": value for key, value in given.pop(f"{owner}_settings").items()}
        usual = {flag: value for flag, value in _USUAL.items() if flag not in given}
        for flag, value in {**usual, **resolved(self.method, given)}.items():
            owner, dot, setting = flag.partition(".")
            if dot:
                getattr(self, f"{owner}_settings")[setting] = value
            else:
                object.__setattr__(self, flag, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from field values; an unknown name is refused with the nearest one."""
        known = field_names()
        for key in values:
            if key not in known:
                raise ValueError(f"unknown configuration field {key!r}: {suggest(key, known)}")
        return cls(**values)

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """A configuration from JSON text, or from a `config.json` given as a Path; its `versions` are not read."""
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"a configuration must be a JSON object, got {type(values).__name__}")
        values.pop("versions", None)
        return cls.from_dict(values)

    def to_json(self, *, versions: Mapping[str, str] | None = None) -> str:
        """JSON with sorted keys; `versions` (package to version) travels along for the reader."""
        values = dataclasses.asdict(self)
        if versions is not None:
            values["versions"] = dict(versions)
        return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that two configurations share only if they compute the same."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in NOT_IN_DIGEST}
        values = {key: value for key, value in values.items() if (key, value) not in _ADDED}
        for owner in ("prior_settings", "guide_settings"):  # 3 and 3.0 are the same setting
            values[owner] = {k: float(v) if type(v) is int else v for k, v in values[owner].items()}
        values |= {owner: _with_content(values[owner]) for owner in ("prior", "guide", "backbone")}
        own = values["prior_settings"]
        own |= {site: _with_content(own[site]) for site in ("z", "g") if isinstance(own.get(site), str)}
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    @property
    def prior_names(self) -> list[str]:
        """The prior's name; where a site has a prior of its own, that of z and that of g."""
        sites = [str(self.prior_settings.get(site, self.prior)) for site in ("z", "g")]
        return [self.prior] if sites == [self.prior] * 2 else sites

    @property
    def folder_name(self) -> str:
        """`<task>-<backbone>-<prior>-<digest>`, safe as a file name on every system."""
        prior = "+".join(map(_basename, self.prior_names))
        return "-".join([_basename(self.task), _basename(self.backbone), prior, self.digest])


def field_names() -> list[str]:
    """The names of all fields, in the order of the dataclass."""
    return [field.name for field in dataclasses.fields(RunConfig)]


def _at_least(low: float) -> tuple:
    return (lambda value: value >= low), f"at least {low}"


def _positive() -> tuple:
    return (lambda value: 0 < value < math.inf), "a positive number"


def _not_negative() -> tuple:
    return (lambda value: 0 <= value < math.inf), "0 or a positive number"


def _fraction() -> tuple:
    return (lambda value: 0 <= value <= 1), "between 0 and 1"


_RANGES = {  # field: (check, what is expected, remedy)
    "rank": (*_at_least(1), "8 is usual; the gates close ranks that are not needed"),
    "alpha": (*_positive(), "twice the rank is usual"),
    "max_train": (*_at_least(1), "leave it out to use everything"),
    "epochs": (*_at_least(1), "one pass is the shortest run; max_train makes it shorter"),
    "batch_size": (*_at_least(1), "accumulation keeps the effective batch when memory is short"),
    "accumulation": (*_at_least(1), "1 means a step after every batch"),
    "restarts": (*_at_least(1), "1 is a single fit; 3 or 4 show whether they agree"),
    "lr": (*_positive(), "1e-3 is usual for adapters"),
    "lr_head": (*_positive(), "leave it out to use lr"),
    "lr_gates": (*_not_negative(), "0 freezes the gates"),
    "lr_ranges": (*_not_negative(), "0 freezes the ranges"),
    "weight_decay": (*_not_negative(), "0 switches it off"),
    "warmup": (*_fraction(), "it is a fraction of the steps, not a number of steps"),
    "kl_weight": (*_positive(), "1 is the ELBO"),
    "kl_warmup": (*_fraction(), "it is a fraction of the steps; 1 starts the gates when training has ended"),
    "temperature_start": (*_positive(), "0.5 is usual"),
    "temperature_end": (*_positive(), "0.1 is usual; at 0 the relaxed gates have no gradient"),
    "clip_norm": (*_positive(), "a large number, such as 1e9, switches clipping off"),
    "max_length": (*_at_least(4), "a pair of texts needs three special tokens and a word"),
    "data_seed": ((lambda value: 0 <= value < 2**32), "between 0 and 4294967295", "leave it out to use seed"),
    "seed": ((lambda value: 0 <= value < 2**32), "between 0 and 4294967295", "NumPy's generators take 32 bits"),
    "draws": (*_at_least(1), "15 is usual"),
    "logging_steps": (*_at_least(1), "1 logs every step"),
    "checkpoint_steps": (*_at_least(1), "a number beyond the last step writes none in between"),
    "task": (bool, "a name", "acceptability needs no download"),
    "backbone": (bool, "a name or a folder", "demo needs no download"),
    "prior": (bool, "a name or file.py:function", "`pyro-blora priors` lists the names"),
    "guide": (bool, "a name or file.py:function", "`pyro-blora guides` lists the names"),
    "output_dir": (bool, "a folder", "runs is the default"),
}


def _fit(name: str, annotation: Any, value: Any) -> Any:
    """The value as the field's type: whole numbers become floats where floats are meant, so that digests are stable."""
    allowed = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    optional = types.NoneType in allowed
    if value is None and optional:
        return None
    (kind, *more) = (a for a in allowed if a is not types.NoneType)
    if isinstance(value, list | tuple) and tuple in more:
        return tuple(value)
    if kind is dict and isinstance(value, Mapping):
        try:
            return json.loads(json.dumps(dict(value), allow_nan=False))  # a copy, and proof that it can be stored
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must hold plain numbers, words and lists, got {value!r}: {error}") from error
    if kind is str and isinstance(value, str | Path):
        return str(value)
    if kind is bool and (isinstance(value, bool) or str(value).lower() in ("true", "false")):
        return str(value).lower() == "true"
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isnan(number) and (kind is float or number.is_integer()):
            return kind(number)
    raise ValueError(f"{name} must be {_NOUNS[kind]}{' or none' if optional else ''}, got {value!r}")


def _targets(value: str | tuple | None) -> str | tuple[str, ...] | None:
    """None, a tuple of names (also from `query,value`), or one regular expression."""
    if isinstance(value, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", value.strip()):
        value = tuple(part.strip() for part in value.split(","))
    if isinstance(value, tuple):
        if not value or not all(isinstance(part, str) and part for part in value):
            raise ValueError(f"target_modules must be names of modules, got {value!r}: query,value for example")
        return value
    if value is not None:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"target_modules {value!r} is no regular expression ({error})") from error
    return value


def _with_content(name: str) -> str:
    """A law in a user's file is what the file says, not what it is called."""
    file = Path(os.path.expanduser(name.rpartition(":")[0]))
    return f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}" if file.is_file() else name


def _basename(name: str) -> str:
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._]", "_", last).strip(".") or "local"


def suggest(name: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}"
