"""What a run on GLUE costs on a GPU: its steps from the task's real size, their seconds from measured steps.

Nothing is estimated that could be measured; what is scaled is scaled upwards:
- by the batch and by the square of its length (attention), never below what was measured;
- a task's batches are taken to be as long as 19 in 20 of them are;
- evaluation is not recorded: a forward is a third of a step whose kernels the host launches one by one, unless the file
  has one. Such a step takes the longer of the host's time, whatever the batch, and that of its kernels.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from pyro_blora.bit_widths import LADDER, written
from pyro_blora.config import METHODS, RunConfig
from pyro_blora.training import Schedule
from pyro_blora.user_files import read_json

_PAD_TO = 8  # tokens, as in pyro_blora.tasks.batching
_PHASES = 2  # a graph for every shape before the gates start, and one after
_TO_RECORD = 2  # steps launched kernel by kernel: one before the recording, and the recording
_USUAL = {  # a step of `gauss_newton` takes no longer than one of `relaxed`, by which steps were measured
    "guide": ("mean_field",), "estimator": ("relaxed", "gauss_newton"), "adapter": ("lora",), "weights": ("point",),
    "precision": ("bf16",), "gradient_checkpointing": (False,), "granularity": ("tensor",),
    "bit_widths": (written(LADDER),),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rows:
    """train, dev: rows of the official release. length: tokens of a padded batch of 32 training rows, by DeBERTaV3's
    tokenizer, at the length limit of the task's preset: 19 in 20 batches are no longer.
    """

    train: int
    dev: int
    length: int


GLUE = {  # Wang et al. 2019; lengths of mnli and qqp from 200 rows, of qnli from 8,999, of the others from all
    "cola": Rows(8_551, 1_043, 32),
    "mnli": Rows(392_702, 9_815 + 9_832, 136),  # matched and mismatched
    "mrpc": Rows(3_668, 408, 88),
    "qnli": Rows(104_743, 5_463, 152),
    "qqp": Rows(363_846, 40_430, 104),
    "rte": Rows(2_490, 277, 240),
    "sst2": Rows(67_349, 872, 56),
    "stsb": Rows(5_749, 1_500, 88),
    "wnli": Rows(635, 71, 96),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """Milliseconds at the measured shape: of a recorded step, of one launched kernel by kernel, of a forward."""

    recorded_ms: float | None = None
    eager_ms: float | None = None
    forward_ms: float | None = None

    def step_ms(self, factor: float, *, recorded: bool) -> float:
        if recorded or self.eager_ms is None:
            return self.recorded_ms * factor
        return max(self.eager_ms, self.recorded_ms * factor) if self.recorded_ms else self.eager_ms * factor

    def predict_ms(self, factor: float) -> float:
        return self.step_ms(factor, recorded=False) / 3 if self.forward_ms is None else self.forward_ms * factor


@dataclasses.dataclass(frozen=True)
class Nearest:
    """A kind that stands for one that nobody has measured.  eager: its step cannot be recorded."""

    kind: str
    why: str
    eager: bool = False


@dataclasses.dataclass(frozen=True)
class Steps:
    """Measured steps of one card.  rank: of the adapters. other_s: of a run, for loading, tokens, export and page."""

    card: str
    software: str
    backbone: str
    batch: int
    length: int
    rank: int
    other_s: float
    kinds: dict[str, Kind]
    nearest: dict[str, Nearest]

    @classmethod
    def read(cls, path: Path) -> "Steps":
        """Errors: ValueError naming the file for one of another form."""
        if not path.is_file():
            raise ValueError(f"{path} does not exist: give a file of measured steps, such as benchmarks/gpu/steps.json")
        values = read_json(path)
        try:
            tables = {"kinds": Kind, "nearest": Nearest}
            found = {key: {k: of(**v) for k, v in values[key].items()} for key, of in tables.items()}
            steps = cls(**{**values, **found})
            numbers = [steps.batch, steps.length, steps.rank, steps.other_s]
            numbers += [x for kind in steps.kinds.values() for x in dataclasses.astuple(kind) if x is not None]
            wrong = [x for x in numbers if not (isinstance(x, int | float) and 0 < x < math.inf)]
            empty = [k for k, kind in steps.kinds.items() if kind.recorded_ms is None and kind.eager_ms is None]
            lost = [near.kind for near in steps.nearest.values() if near.kind not in steps.kinds]
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{path} is no file of measured steps ({error}): see benchmarks/gpu/steps.json") from None
        if wrong or empty or lost:
            what = f"{wrong[0]!r} is no positive number" if wrong else f"kind {(empty + lost)[0]!r} has no step"
            raise ValueError(f"{path}: {what}: correct it")
        return steps

    def of(self, config: RunConfig) -> tuple[str, Kind, Nearest | None]:
        """(name, times, and why where another kind stands for it) of a run's steps.  Errors: ValueError for none."""
        name = kind_of(config)
        if name in self.kinds:
            return name, self.kinds[name], None
        if name not in self.nearest:
            raise ValueError(
                f"no step of kind {name!r} was measured: add it to `kinds`, or name the nearest one in `nearest`. "
                f"Known: {', '.join([*self.kinds, *self.nearest])}"
            )
        near = self.nearest[name]
        return near.kind, self.kinds[near.kind], near

    def factor(self, batch: int, length: int) -> float:
        """How many times as long as at the measured shape: an upper bound, and at least 1."""
        return max(1.0, batch / self.batch) * max(1.0, length / self.length) ** 2


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run.  steps: of the optimizer; ms: of one; source: what it comes from; seconds of its parts."""

    steps: int
    ms: float
    source: str
    training_s: float
    evaluation_s: float
    other_s: float

    @property
    def hours(self) -> float:
        return (self.training_s + self.evaluation_s + self.other_s) / 3600


def kind_of(config: RunConfig) -> str:
    """The kind of a run's steps: `gated`, or the method, and whatever else is not usual."""
    fixed: dict[str, Any] = METHODS[config.method].fixes
    words = ["gated" if config.method == "bayesian_lora" else config.method]
    words += ["shared inputs"] * config.share_inputs + ["every projection"] * (config.scope == "encoder")
    for name, usual in _USUAL.items():
        value = getattr(config, name)
        if value not in ((fixed[name],) if name in fixed else usual):
            words.append(f"{name} {value}")
    return ", ".join(words)


def forwards(config: RunConfig) -> int:
    """Of every dev row: one a draw and one of what is deployed; one where nothing is random; DyLoRA's every rank."""
    if config.average_over == "dropout":
        return config.draws + 1
    if config.prior in ("fixed", "random") or config.guide == "allocated":
        return 1
    return config.draws + 1 + (config.rank if config.guide == "uniform_rank" else 0)


def cost_of(config: RunConfig, steps: Steps) -> Cost:
    """Errors: ValueError for a task, backbone or kind of step about which nothing is known."""
    if config.task not in GLUE:
        raise ValueError(f"the size of task {config.task!r} is not known here: plan tasks of GLUE, {', '.join(GLUE)}")
    if config.backbone != steps.backbone:
        raise ValueError(f"steps were measured with {steps.backbone}, not with {config.backbone}: give other --steps")
    rows = GLUE[config.task]
    train = min(rows.train, config.max_train or rows.train)
    held_out = round(config.validation * train)
    name, kind, near = steps.of(config)
    length = min(rows.length, math.ceil(config.max_length / _PAD_TO) * _PAD_TO)
    factor = steps.factor(config.batch_size, length)
    recorded = kind.recorded_ms is not None and not (near and near.eager)
    each = kind.step_ms(factor, recorded=recorded)  # ms of a micro-batch
    count = Schedule.of(config, train - held_out).steps
    shapes = math.ceil(config.max_length / _PAD_TO) * _PHASES if recorded else 0
    recording = shapes * _TO_RECORD * kind.step_ms(factor, recorded=False)
    batches = math.ceil((rows.dev + held_out) / (2 * config.batch_size))
    prediction = kind.predict_ms(steps.factor(2 * config.batch_size, length))
    scaled = each / kind.step_ms(1.0, recorded=recorded)
    source = [f"nearest: {name}{'' if recorded else ' (eager)'}" if near else "measured"]
    source += [f"scaled x {scaled:.2f}"] * (scaled > 1) + [f"rank {config.rank}"] * (config.rank != steps.rank)
    return Cost(
        steps=count,
        ms=each * config.accumulation,
        source=", ".join(source),
        training_s=config.fits * (count * config.accumulation * each + recording) / 1000,
        evaluation_s=config.fits * batches * forwards(config) * prediction / 1000,
        other_s=config.fits * steps.other_s,
    )
