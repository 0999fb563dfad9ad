"""One run's configuration: a frozen dataclass with its checks, its JSON and its digest."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ..registry import suggest
from ..user_files import load_json, read_text
from .fields import MOST_FITS, RANGES, fit, shown
from .methods import METHODS, resolved

PRESETS = Path(__file__).parent / "presets"
CHOICES = {
    "estimator": ("relaxed", "straight_through", "score_function", "enumerate"),
    "method": tuple(METHODS),
    "adapter": ("lora", "xs", "adalora", "none"),
    "init_lora_weights": ("default", "eva"),
    "average_over": ("gates", "dropout"),
    "scope": ("adapted", "encoder"),
    "precision": ("float32", "bf16"),
}
# Left out of the digest: they say where and how a run is watched and saved, not what it computes.
NOT_IN_DIGEST = ("output_dir", "tracker", "checkpoint_steps", "checkpoint_minutes")
# Later than runs whose folders are to keep their names.
_ADDED = (
    ("data_seed", None), ("restarts", 1), ("share_inputs", False), ("adapter_settings", {}), ("weights", "point"),
    ("weights_settings", {}), ("validation", 0.0), ("choose_epoch", False), ("ood_task", None),
    ("group_by_length", False), ("backbone_revision", None), ("max_skipped_steps", 10),
)  # fmt: skip
OWNERS = ("prior", "guide", "adapter", "weights")  # fields that have settings of their own, in NAME_settings
_USUAL = {"lr": 1e-3, "kl_warmup": 0.3}  # where neither user nor method says anything
_XS_RATE = 5e-3  # a core's: of the rates tried on SST-2, from 1e-3 to 5e-2, the one that learned; LoRA's was not tuned


def _field(default: Any, description: str) -> Any:
    given = {"default_factory": dict} if default is dict else {"default": default}
    return dataclasses.field(**given, metadata={"help": description})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides what a run computes.

    Errors: ValueError naming the field, what was given, what was expected and the remedy.
    """

    task: str = _field("acceptability", "task to learn: acceptability needs no download; the GLUE tasks by name")
    backbone: str = _field(
        "demo", "demo (a packaged MiniLM), demo-deberta, a folder, a name on the hub, or file.py:function"
    )
    backbone_revision: str | None = _field(None, "branch, tag or commit of a backbone on the hub; none: its newest")
    glue_dir: str | None = _field(None, "folder of GLUE files to read instead of downloading; none: download")
    method: str = _field("bayesian_lora", "bayesian_lora, or what it is compared with; `pyro-blora methods` lists them")
    prior: str = _field("bops", "prior of the gates: a name that `pyro-blora priors` lists, or file.py:function")
    prior_settings: dict = _field(dict, "settings of the prior, on the command line as --prior.rate 3")
    guide: str = _field("mean_field", "variational family: a name that `pyro-blora guides` lists, or file.py:function")
    guide_settings: dict = _field(dict, "settings of the guide, on the command line as --guide.NAME VALUE")
    estimator: str = _field("relaxed", "gradient of the gates: relaxed, straight_through, score_function, enumerate")
    adapter: str = _field("lora", "what learns beside the head: lora, xs (B-LoRA-XS); adalora and none are methods'")
    adapter_settings: dict = _field(dict, "settings of the adapter xs, on the command line as --adapter.NAME VALUE")
    weights: str = _field("point", "distribution of the adapter's weights: a name that `pyro-blora weights` lists")
    weights_settings: dict = _field(dict, "settings of the weights' law, on the command line as --weights.NAME VALUE")
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
    validation: float = _field(
        0.0, "fraction of training rows held out, for temperature, epoch, prior precision; 0: none"
    )
    choose_epoch: bool = _field(False, "end with the epoch of least NLL on the validation rows, not with the last")
    batch_size: int = _field(16, "examples per device and forward")
    accumulation: int = _field(1, "forwards per optimizer step")
    group_by_length: bool = _field(False, "batches of rows of similar length: less padding, so less time")
    lr: float | None = _field(None, "learning rate of the adapter; none: 1e-3, of xs 5e-3, or the method's own")
    lr_head: float | None = _field(None, "learning rate of the classification head; none: lr")
    lr_gates: float = _field(0.1, "first learning rate of the gates, nats per step; falls to 1 %; 0 freezes them")
    lr_ranges: float = _field(1e-3, "learning rate of the quantization ranges; 0 freezes them")
    weight_decay: float = _field(0.01, "decoupled weight decay of adapter and head; gates and ranges have none")
    warmup: float = _field(0.06, "learning-rate warm-up, as a fraction of the steps")
    kl_weight: float = _field(1.0, "weight of the KL once the gates start; below 1: a cold, more confident posterior")
    kl_warmup: float | None = _field(
        None, "fraction of the steps with open gates, before they start; 1: after training; none: 0.3, or the method's"
    )
    temperature_start: float = _field(0.5, "temperature of the relaxed gates at the first step")
    temperature_end: float = _field(0.1, "temperature of the relaxed gates at the last step")
    clip_norm: float = _field(1.0, "largest norm of the gradient of adapter and head")
    max_skipped_steps: int = _field(
        10, "steps in a row, at most a quarter of all, left out for a gradient that is not finite, before it stops"
    )
    precision: str = _field("float32", "arithmetic inside the backbone: float32 or bf16; likelihood and gates: float32")
    gradient_checkpointing: bool = _field(False, "recompute activations in the backward pass: less memory, more time")
    max_length: int = _field(128, "longest input, in tokens; longer ones are cut")
    seed: int = _field(0, "seed of data order, initialization and draws")
    data_seed: int | None = _field(None, "seed of the training rows that max_train keeps; none: seed")
    restarts: int = _field(1, "fits from seed, seed + 1, ...: the chains of posterior.nc; the first is exported")
    draws: int = _field(15, "draws of gates and random weights, for posterior and predictions")
    average_over: str = _field(
        "gates", "what draws of predictions differ in: gates (gates and weights), or dropout (masks as well)"
    )
    ood_task: str | None = _field(None, "another task, whose sentences uncertainty should tell from this one's")
    output_dir: str = _field("runs", "folder that receives the run's folder")
    logging_steps: int = _field(10, "optimizer steps between lines of metrics.jsonl")
    checkpoint_steps: int = _field(100, "optimizer steps between checkpoints")
    checkpoint_minutes: float = _field(5.0, "minutes after which a checkpoint is written whatever the step")
    tracker: str | None = _field(None, "experiment tracker by its Accelerate name: tensorboard, wandb, ...; none: none")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, fit(field.name, field.type, getattr(self, field.name)))
        if self.method in METHODS:  # an unknown one is refused below
            self._follow_method()
        if self.weights == "dropout":
            object.__setattr__(self, "average_over", "dropout")
        object.__setattr__(self, "target_modules", _targets(self.target_modules))
        if self.precision in ("fp16", "float16", "half"):
            raise ValueError(
                f"precision {self.precision!r} is refused: the summed likelihood and the 16-bit grid overflow or round "
                "away in half precision: use bf16"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: {suggest(getattr(self, name), choices)}")
        for name, (holds, expected, remedy) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {expected}, got {shown(value)}: {remedy}")
        self._require_consistent()
        start, end = self.temperature_start, self.temperature_end
        if end > start:
            raise ValueError(f"temperature_end must be at most temperature_start, got {end} > {start}: it is cooled")

    def _follow_method(self) -> None:
        """Set what the method fixes or proposes."""
        fields = dataclasses.fields(self)
        given = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        for owner in OWNERS:
            given |= {f"{owner}.{key}": value for key, value in given.pop(f"{owner}_settings").items()}
        usual = _USUAL | ({"lr": _XS_RATE} if self.adapter == "xs" else {})
        usual = {flag: value for flag, value in usual.items() if flag not in given}
        for flag, value in {**usual, **resolved(self.method, given)}.items():
            owner, dot, setting = flag.partition(".")
            if dot:
                getattr(self, f"{owner}_settings")[setting] = value
            else:
                object.__setattr__(self, flag, value)

    def _require_consistent(self) -> None:
        if self.choose_epoch and not self.validation:
            raise ValueError("choose_epoch needs rows to choose by: give --validation 0.1, or drop --choose_epoch")
        if self.choose_epoch and self.kl_warmup == 1:
            raise ValueError(
                "gates that are set after training (kl_warmup 1) leave no epoch for --choose_epoch to choose: drop it, "
                "or lower --kl_warmup"
            )
        if self.choose_epoch and self.law_of_fits == "swag":
            raise ValueError("--weights swag averages over the epochs among which --choose_epoch chooses: drop one")
        if self.average_over == "dropout" and self.law_of_fits == "laplace":
            raise ValueError("--weights laplace predicts by a network without dropout: drop --average_over dropout")
        if self.adapter == "xs" and self.init_lora_weights != "default":
            raise ValueError(f"--init_lora_weights {self.init_lora_weights} is for LoRA, --adapter xs starts from W0")
        if self.weights == "ensemble" and self.restarts > 1:
            raise ValueError("the members of --weights ensemble are restarts already: drop --restarts")
        members = self.weights_settings.get("members", 3)
        if self.weights == "ensemble" and isinstance(members, int | float) and not members <= MOST_FITS:
            raise ValueError(f"weights.members must be at most {MOST_FITS:,}, got {members}: 3 to 10 are usual")

    @property
    def fits(self) -> int:
        """Fits of the run from seeds of their own: its restarts, or the members of an ensemble."""
        return int(self.weights_settings.get("members", 3)) if self.weights == "ensemble" else self.restarts

    @property
    def law_of_fits(self) -> str:
        """The law of the weights of every fit: an ensemble's members have one of their own."""
        return self.weights_settings.get("of", "point") if self.weights == "ensemble" else self.weights

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
        """A configuration from JSON text, or from a `config.json` given as a Path; not what it says of the machine."""
        where = str(source) if isinstance(source, Path) else "the configuration"
        values = load_json(read_text(source) if isinstance(source, Path) else source, where)
        if not isinstance(values, dict):
            raise ValueError(f"{where} must be a JSON object, got {type(values).__name__}")
        for of_machine in ("versions", "threads"):
            values.pop(of_machine, None)
        return cls.from_dict(values)

    def to_json(self, *, versions: Mapping[str, str] | None = None, threads: int | None = None) -> str:
        """JSON with sorted keys; `versions` (package to version) and torch's `threads` travel along for the reader."""
        values = dataclasses.asdict(self)
        if versions is not None:
            values["versions"] = dict(versions)
        if threads is not None:  # sums in another order differ in their last bits, and trainings grow apart
            values["threads"] = threads
        return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that two configurations share only if they compute the same."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in NOT_IN_DIGEST}
        values = {key: value for key, value in values.items() if (key, value) not in _ADDED}
        for owner in (f"{owner}_settings" for owner in OWNERS):  # 3 and 3.0 are the same setting
            if owner in values:
                values[owner] = {k: float(v) if type(v) is int else v for k, v in values[owner].items()}
        values |= {x: _with_content(values[x]) for x in ("prior", "guide", "weights", "backbone") if x in values}
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
        """`<task>-<backbone>-<prior>-<digest>`, safe as a file name on every system.

        Of a method but bayesian_lora its name in place of a prior that it fixes, and before one that is free:
        `lora`, `bayesian_bits.bops+off`.
        """
        if self.method == "bayesian_lora":
            return self._named(self._prior)
        return self._named(self.method if "prior" in METHODS[self.method].fixes else f"{self.method}.{self._prior}")

    @property
    def folder(self) -> Path:
        """The run's folder in output_dir; one of an older version, whose name had the prior whatever the method."""
        root, now, before = Path(self.output_dir), self.folder_name, self._named(self._prior)
        is_older = before != now and any((root / name).exists() for name in (before, f".{before}.partial"))
        return root / (before if is_older and not (root / now).exists() else now)

    @property
    def _prior(self) -> str:
        return "+".join(map(_basename, self.prior_names))

    def _named(self, law: str) -> str:
        return "-".join([_basename(self.task), _basename(self.backbone), law, self.digest])


def field_names() -> list[str]:
    """The names of all fields, in the order of the dataclass."""
    return [field.name for field in dataclasses.fields(RunConfig)]


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
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"target_modules {shown(value)} is no regular expression ({error})") from error
    return value


def _with_content(name: str) -> str:
    """A law in a user's file is what the file says, not what it is called."""
    file = Path(os.path.expanduser(name.rpartition(":")[0]))
    return f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}" if file.is_file() else name


def _basename(name: str) -> str:
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._]", "_", last).strip(".") or "local"
