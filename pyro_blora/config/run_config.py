"""One run's configuration: a frozen dataclass with its checks, its JSON and its digest."""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

from ..bit_widths import LADDER, ladder_of, written
from ..registries import CHOSEN, WEIGHTS
from ..registry_entries import Entry
from ..user_files import load_json, read_text
from ..user_values import suggest
from .checks import require_valid
from .config_file import without_machine, without_retired
from .fields import fit, read_files, targets
from .methods import METHODS, proposed_settle, resolved
from .naming import basename, digest, named_after

PRESETS = Path(__file__).parent / "presets"
OWNERS = tuple(CHOSEN)  # fields that name a part, whose settings are in NAME_settings
_USUAL = {  # where neither user nor method nor a part sets a value
    "lr": 1e-3, "lr_gates": 0.1, "gate_optimizer": "auto", "kl_warmup": 0.3, "rest": 0.0, "settle": 0.0,
    "estimator": "relaxed", "max_length": 128, "group_by_length": False,
}  # fmt: skip


def _field(default: Any, description: str) -> Any:
    given = {"default_factory": dict} if default is dict else {"default": default}
    return dataclasses.field(**given, metadata={"help": description})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides what a run computes.

    Errors: ValueError naming the field, what was given, what was expected and the remedy.
    """

    task: str = _field("acceptability", "task to learn: a name that `pyro-blora tasks` lists, or file.py:function")
    task_settings: dict = _field(dict, "settings of the task, on the command line as --task.NAME VALUE")
    backbone: str = _field(
        "demo",
        "demo (a packaged MiniLM), demo-deberta, demo-decoder (SmolLM2), a folder, a name on the hub, or "
        "file.py:function",
    )
    backbone_revision: str | None = _field(None, "branch, tag or commit of a backbone on the hub; none: its newest")
    glue_dir: str | None = _field(None, "folder of GLUE files to read instead of downloading; none: download")
    method: str = _field("bayesian_lora", "bayesian_lora, or what it is compared with; `pyro-blora methods` lists them")
    prior: str = _field("bops", "prior of the gates: a name that `pyro-blora priors` lists, or file.py:function")
    prior_settings: dict = _field(dict, "settings of the prior, on the command line as --prior.rate 3")
    guide: str = _field("mean_field", "variational family: a name that `pyro-blora guides` lists, or file.py:function")
    guide_settings: dict = _field(dict, "settings of the guide, on the command line as --guide.NAME VALUE")
    estimator: str | None = _field(
        None, "gradient of the gates: a name that `pyro-blora elbos` lists, or file.py:name; none: the guide's own"
    )
    estimator_settings: dict = _field(dict, "settings of the estimator, on the command line as --estimator.NAME VALUE")
    gate_optimizer: str | None = _field(
        None,
        "how the gates learn: natural (gradients, no rate), adam, or auto, as none: as the estimator's gradient is",
    )
    adapter: str = _field(
        "lora", "what learns beside the head: a name that `pyro-blora adapters` lists, or file.py:function"
    )
    adapter_settings: dict = _field(dict, "settings of the adapter, on the command line as --adapter.NAME VALUE")
    weights: str = _field(
        "point", "distribution of the adapter's weights: a name that `pyro-blora weights` lists, or file.py:function"
    )
    weights_settings: dict = _field(dict, "settings of the weights, on the command line as --weights.NAME VALUE")
    init_lora_weights: str = _field("default", "how lora_A starts: default (as in PEFT) or eva (principal components)")
    rank: int = _field(8, "largest rank R of every adapter")
    alpha: float = _field(16.0, "scale of the adapter: its output is multiplied by alpha / rank")
    target_modules: str | tuple | None = _field(
        None,
        "modules to adapt: names separated by commas, one regular expression, or all-linear; none: the architecture's "
        "preset",
    )
    scope: str = _field(
        "adapted",
        "what is quantized: adapted (the adapted projections), encoder (every projection, where adapters on all of "
        "them pay: --target_modules all-linear), or encoder+head (and the output matrix of a language model)",
    )
    bit_widths: str | tuple = _field(written(LADDER), "bit widths that a tensor can have, rising; 32 is unquantized")
    granularity: str = _field("tensor", "what of a weight has a range of its own: the tensor, or every output channel")
    share_inputs: bool = _field(False, "query, key and value of a layer share the bit gates of their input: less time")
    smoothing: bool = _field(False, "learned scales move outliers of inputs into weights, channel by channel")
    embedding_bits: int = _field(32, "bits of the backbone's embeddings, a range for each row; 32: as they are")
    max_train: int | None = _field(None, "training examples to use; none: all")
    epochs: int = _field(3, "passes over the training examples")
    validation: float = _field(
        0.0, "fraction of training rows held out, for temperature, epoch, prior precision; 0: none"
    )
    choose_epoch: bool = _field(False, "end with the epoch of least NLL on the validation rows, not with the last")
    batch_size: int = _field(16, "examples per device and forward")
    accumulation: int = _field(1, "forwards per optimizer step")
    group_by_length: bool | None = _field(
        None, "batches of rows of similar length: less padding, so less time; none: as the task proposes, or not"
    )
    lr: float | None = _field(None, "learning rate of the adapter; none: 1e-3, of xs 5e-3, or the method's own")
    lr_head: float | None = _field(None, "learning rate of the classification head; none: lr")
    lr_gates: float | None = _field(
        None, "first learning rate of gates under Adam, nats per step; falls to 1 %; 0 freezes gates; none: 0.1"
    )
    lr_ranges: float = _field(1e-3, "learning rate of the quantization ranges; 0 freezes them")
    weight_decay: float = _field(0.01, "decoupled weight decay of adapter and head; gates and ranges have none")
    warmup: float = _field(0.06, "learning-rate warm-up, as a fraction of the steps")
    kl_weight: float = _field(1.0, "weight of the KL once the gates start; below 1: a cold, more confident posterior")
    kl_warmup: float | None = _field(
        None, "fraction of the steps with open gates, before they start; 1: after training; none: 0.3, or the method's"
    )
    rest: float | None = _field(
        None,
        "fraction of the steps, from where the gates start, in which weights first train at the allocation that they "
        "start from, before the gates learn; none: 0",
    )
    settle: float | None = _field(
        None,
        "fraction of the steps, the last ones, in which weights train on at the deployed allocation and gates rest; "
        "none: 0, or what the prior proposes: budget all of them, unless a flag says how its gates learn",
    )
    gated_dropout: bool | None = _field(
        None,
        "dropout once the gates have started; none: where they do not learn by natural gradients",
    )
    distillation: float = _field(0.0, "weight of the open network's answers beside the labels, once gates start")
    temperature_start: float = _field(0.5, "temperature of the relaxed gates at the first step")
    temperature_end: float = _field(0.1, "temperature of the relaxed gates at the last step")
    clip_norm: float = _field(1.0, "largest norm of the gradient of adapter and head")
    max_skipped_steps: int = _field(
        10, "steps in a row, at most a quarter of all, left out for a gradient that is not finite, before it stops"
    )
    precision: str = _field("float32", "arithmetic inside the backbone: float32 or bf16; likelihood and gates: float32")
    gradient_checkpointing: bool = _field(False, "recompute activations in the backward pass: less memory, more time")
    max_length: int | None = _field(
        None, "longest input, in tokens; longer ones are cut; none: 128, or what the task proposes"
    )
    seed: int = _field(0, "seed of data order, initialization and draws")
    data_seed: int | None = _field(None, "seed of the training rows that max_train keeps; none: seed")
    restarts: int = _field(1, "fits from seed, seed + 1, ...: the chains of posterior.nc; the first is exported")
    draws: int = _field(15, "draws of gates and random weights, for posterior and predictions")
    average_over: str = _field(
        "gates", "what draws of predictions differ in: gates (gates and weights), or dropout (masks as well)"
    )
    ood_task: str | None = _field(None, "another task, whose sentences should be more uncertain than this one's")
    output_dir: str = _field("runs", "folder that receives the run's folder")
    logging_steps: int = _field(10, "optimizer steps between lines of metrics.jsonl")
    checkpoint_steps: int = _field(100, "optimizer steps between checkpoints")
    checkpoint_minutes: float = _field(5.0, "minutes after which a checkpoint is written whatever the step")
    tracker: str | None = _field(None, "experiment tracker by its Accelerate name: tensorboard, wandb, ...; none: none")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, fit(field.name, field.type, getattr(self, field.name)))
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        given = {name: copy.copy(getattr(self, name)) for name in usual if getattr(self, name) != usual[name]}
        object.__setattr__(self, "_given", given)  # before anything is proposed
        if self.method in METHODS:  # an unknown one is refused below
            self._follow_method()
        for part in self.parts:
            for flag, value in part.sets.items():
                object.__setattr__(self, flag, value)
        read_files(self)
        object.__setattr__(self, "target_modules", targets(self.target_modules))
        object.__setattr__(self, "bit_widths", written(ladder_of(self.bit_widths)))
        require_valid(self)

    def _follow_method(self) -> None:
        """Set what the method fixes or proposes."""
        given = {**vars(self)["_given"]}
        for owner in OWNERS:
            given |= {f"{owner}.{key}": value for key, value in given.pop(f"{owner}_settings").items()}
        own = resolved(self.method, given)
        for flag, value in own.items():
            owner, dot, setting = flag.partition(".")
            if dot:
                getattr(self, f"{owner}_settings")[setting] = value
            else:
                object.__setattr__(self, flag, value)
        usual: dict[str, Any] = {**_USUAL}
        for part in self.parts:  # the method's among them
            usual |= part.proposes
        if self.gate_optimizer == "adam":  # which takes no natural gradients
            usual["estimator"] = _USUAL["estimator"]
        for flag in usual.keys() - given.keys() - own.keys():
            object.__setattr__(self, flag, usual[flag])
        if "settle" not in given and usual["settle"]:
            object.__setattr__(self, "settle", proposed_settle(usual["settle"], cast(float, self.kl_warmup), given))

    def replace(self, **changes: Any) -> Self:
        """A configuration as this one was given, but for the changes.

        What a former prior or method proposed goes with it; `dataclasses.replace` keeps it, as if it had been given.
        """
        return type(self)(**{**vars(self)["_given"], **changes})

    @property
    def parts(self) -> list[Entry]:
        """What is known of the parts that were chosen."""
        names = {kind: self.prior_names if kind == "prior" else [getattr(self, kind)] for kind in CHOSEN}
        return [CHOSEN[kind].entry(x) for kind, each in names.items() for x in each if x not in (None, "off")]

    def require_known(self) -> None:
        """Errors: ValueError for a part that is not registered, with the nearest name; nothing is imported."""
        for kind, registry in CHOSEN.items():
            for name in self.prior_names if kind == "prior" else [getattr(self, kind)]:
                if name != "off":  # of a site
                    registry.require_known(name)

    @property
    def is_ensemble(self) -> bool:
        """Whether the fits are members of one, whose predictions are averaged."""
        return bool(WEIGHTS.entry(self.weights).fits)

    @property
    def fits(self) -> int:
        """Number of fits of the run, each from its own seed: its restarts, or the members of an ensemble."""
        return int(self.of_weights(WEIGHTS.entry(self.weights).fits)) if self.is_ensemble else self.restarts

    @property
    def weights_of_fits(self) -> str:
        """The name of the weights' distribution of every fit; an ensemble's members may have another than the run."""
        return str(self.of_weights(WEIGHTS.entry(self.weights).each)) if self.is_ensemble else self.weights

    def of_weights(self, setting: str) -> Any:
        """A setting of the weights, or its default."""
        return self.weights_settings.get(setting, WEIGHTS.entry(self.weights).settings[setting])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from field values; an unknown name is refused with the nearest one."""
        known, values = field_names(), without_retired(values)
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
        return cls.from_dict(without_machine(values))

    def to_json(self, *, versions: Mapping[str, str] | None = None, **of_machine: int) -> str:
        """JSON with sorted keys; `versions` (package to version), torch's `threads` and `processes` travel along.

        Sums in another order differ in their last bits, and a step of several processes is one of larger batches.
        """
        values = dataclasses.asdict(self) | of_machine
        if versions is not None:
            values["versions"] = dict(versions)
        return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that two configurations share only if they compute the same."""
        return digest(dataclasses.asdict(self))

    @property
    def prior_names(self) -> list[str]:
        """The prior's name; where a site has a prior of its own, that of z and that of g."""
        sites = [str(self.prior_settings.get(site, self.prior)) for site in ("z", "g")]
        return [self.prior] if sites == [self.prior] * 2 else sites

    @property
    def folder_name(self) -> str:
        """`<task>-<backbone>-<prior>-<digest>`, safe as a file name on every system.

        In place of a task that reads a file of the user's, the name of that file.

        Of a method but bayesian_lora its name in place of a prior that it fixes, and before one that is free:
        `lora`, `bayesian_bits.bops+off`.
        """
        if self.method == "bayesian_lora":
            return self._named(self._prior)
        return self._named(self.method if "prior" in METHODS[self.method].fixes else f"{self.method}.{self._prior}")

    @property
    def folder(self) -> Path:
        """The run's folder in output_dir; one of an older version, whose name had the prior whatever the method."""
        root, now, before = Path(self.output_dir).expanduser(), self.folder_name, self._named(self._prior)
        is_older = before != now and any((root / name).exists() for name in (before, f".{before}.partial"))
        return root / (before if is_older and not (root / now).exists() else now)

    @property
    def _prior(self) -> str:
        return "+".join(map(basename, self.prior_names))

    def _named(self, of: str) -> str:
        return "-".join([named_after(self.task, self.task_settings), basename(self.backbone), of, self.digest])


def field_names() -> list[str]:
    """The names of all fields, in the order of the dataclass."""
    return [field.name for field in dataclasses.fields(RunConfig)]
