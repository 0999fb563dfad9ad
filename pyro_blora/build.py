"""From a RunConfig to what a run is made of: task, data, tokenizer and program. Training and loading share it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch

from .adapters.attaching import attach
from .bit_widths import ladder_of
from .config.run_config import RunConfig
from .distillation import Teacher
from .guides.base import build_guide, require_natural
from .layout import BATCH_SIZE, AdapterLayout
from .models.embeddings import EXACT, tables
from .models.layout import require_scope
from .models.loading import is_function, load_backbone, load_tokenizer
from .models.tokenization import require_readable, suit
from .priors import build_prior, parts
from .program import BayesianLoRA
from .progress import phase, say
from .registries import ADAPTERS, ELBOS, GUIDES, WEIGHTS
from .tasks import Task, get_task
from .tasks.batching import cut_short, held_out, tokenize, unlabelled
from .tasks.likelihoods import Collate
from .tasks.names import make_anew
from .tasks.outcomes import Form
from .weights.base import build_weights

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Parts:
    """rows: the splits as text, "train", "eval" and others to evaluate; tokens: the same, tokenized.

    Of them "validation" is held out of "train"; "ood" has another task's sentences, labelled 0.
    findings: `Task.findings`, with what max_train and max_length leave of the rows.
    """

    config: RunConfig
    task: Task
    rows: dict[str, datasets.Dataset]
    tokens: dict[str, datasets.Dataset]
    tokenizer: PreTrainedTokenizerBase
    program: BayesianLoRA
    findings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def collate(self) -> Collate:
        """What makes a batch of tokenized rows."""
        return self.task.likelihood.collator(self.tokenizer)


def longest_of(config: RunConfig) -> int:
    """The longest input, tokens: a configuration always has one when it is made."""
    return cast(int, config.max_length)


def check_names(config: RunConfig) -> Task:
    """The task; everything that can be wrong with a name or a setting is found here, before anything is loaded."""
    config.require_known()
    task = get_task(config.task, config.task_settings)
    require_scope(config.scope, task.likelihood.head)
    parts(config.prior, config.prior_settings)
    check_parts(config)
    if config.ood_task is not None:
        other, kind = get_task(config.ood_task), task.likelihood
        if not kind.has_confidence or other == task or other.likelihood.head != kind.head:
            raise ValueError(
                f"ood_task {config.ood_task!r} must be another task than {config.task!r}, of texts of the same form, "
                f"and answers to {config.task!r} must have a confidence: drop it, or name a task of other sentences"
            )
    return task


def check_parts(config: RunConfig) -> None:
    """The same of guide, weights, adapter and ELBO alone."""
    for registry, name, settings in (
        (GUIDES, config.guide, config.guide_settings), (WEIGHTS, config.weights, config.weights_settings),
        (ADAPTERS, config.adapter, config.adapter_settings), (ELBOS, config.estimator, config.estimator_settings),
    ):  # fmt: skip
        registry.settings(registry.resolve(cast(str, name)), settings)
    WEIGHTS.resolve(config.weights_of_fits)


def require_config(config: object) -> None:
    """Errors: ValueError for what is no configuration, as a dict."""
    if not isinstance(config, RunConfig):
        raise ValueError(f"a run is made of a RunConfig, got {type(config).__name__}: RunConfig(task=..., ...)")


def build(config: RunConfig) -> Parts:
    """Everything a run needs, deterministic from config.seed.

    Errors: ValueError for whatever the user gave that cannot work; nothing is written.
    """
    make_anew()
    task = check_names(config)
    glue_dir = Path(os.path.expanduser(config.glue_dir)) if config.glue_dir else None
    seed = config.seed if config.data_seed is None else config.data_seed
    with phase(f"reading the data of task {task.name}", still=glue_dir is None):
        rows = task.load(glue_dir=glue_dir, seed=seed, n_train=config.max_train)
        rows = task.validate(rows, source=config.glue_dir or "the data")
    rows = {split: table for split, table in rows.items() if split != "test"}
    if config.validation:
        rows["train"], rows["validation"] = held_out(rows["train"], config.validation, seed)
    own = is_function(config.backbone)  # it makes a tokenizer with its model: no need to make both twice
    from_hub = not (config.backbone.startswith("demo") or Path(os.path.expanduser(config.backbone)).exists())
    with phase(f"loading backbone {config.backbone}", still=from_hub and not own):
        tokenizer = None if own else load_tokenizer(config.backbone, revision=config.backbone_revision)
        torch.manual_seed(config.seed)  # the head and lora_A are drawn now
        program = build_program(config, task, len(rows["train"]))
        if config.distillation:
            net, closes = program.net, program.gates_close
            program.teacher = Teacher(net, program.log_scale, config.distillation, gates_close=closes)
        tokenizer = tokenizer or load_tokenizer(config.backbone)
    if sharing := program.net.layout.sharing:
        with phase(sharing, still=True):
            pass
    suit(tokenizer, program.net.backbone, config.backbone)
    tokens = {}
    for split, table in rows.items():
        with phase(f"tokenizing {len(table):,} rows of {split}"):
            tokens[split] = tokenize(table, tokenizer, task, longest_of(config))
    require_readable(tokens["train"], tokenizer, program.net.backbone, config.backbone)
    if config.ood_task is not None:
        other = get_task(config.ood_task)
        with phase(f"reading the data of task {other.name}", still=True):
            foreign = other.load(glue_dir=glue_dir, seed=seed, n_train=1)
            foreign = other.validate(foreign, source=config.glue_dir or "the data")["eval"]
        rows["ood"] = unlabelled(foreign, other.text_columns)
        tokens["ood"] = tokenize(rows["ood"], tokenizer, other, longest_of(config))
    return Parts(config, task, rows, tokens, tokenizer, program, _findings(config, task, rows, tokens, tokenizer))


def _findings(
    config: RunConfig, task: Task, rows: dict[str, datasets.Dataset], tokens: dict[str, datasets.Dataset],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:  # fmt: skip
    """Those of the task, shown to the user, and the rows that are cut at max_length."""
    if not task.findings:
        return {}
    found = {**task.findings, **{x: [*task.findings.get(x, ())] for x in ("sentences", "warnings")}}
    if config.max_train is not None:
        found["sentences"].append(
            f"{len(rows['train']):,} of the training rows are used, --max_train {config.max_train}"
        )
    for split, called in (("train", "training"), ("eval", "validation")):
        count = cut_short(rows[split], tokens[split], tokenizer, task, longest_of(config))
        found["truncated"] = {**found.get("truncated", {}), split: count}
        if count:
            found["warnings"].append(
                f"{count:,} of {len(rows[split]):,} {called} rows have more than {config.max_length} tokens and are "
                "cut: --max_length reads more, for more time"
            )
    say(f"Data of {found.get('source', task.name)}:", [*found["sentences"], *(f"! {x}" for x in found["warnings"])])
    return found


def in_float32(function: Callable[P, T]) -> Callable[P, T]:
    """Called with torch's default of float32: a user's float64 would give parameters of two precisions."""

    @functools.wraps(function)
    def called(*arguments: P.args, **settings: P.kwargs) -> T:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return function(*arguments, **settings)
        finally:
            torch.set_default_dtype(before)

    return called


@in_float32
def build_program(
    config: RunConfig, task: Task | Form, n_train: int, stored: AdapterLayout | None = None, *,
    prior: Callable[..., Any] | None = None, of: type[BayesianLoRA] = BayesianLoRA,
) -> BayesianLoRA:  # fmt: skip
    """stored: the layout of a finished run, whose batch size for counting MACs and whose names of roles are kept.

    prior: in place of the named one. of: the class of the program.
    """
    kind = task.likelihood
    backbone = load_backbone(
        config.backbone, kind, revision=config.backbone_revision, embedding_bits=config.embedding_bits
    )
    net = attach(
        backbone, rank=config.rank, alpha=config.alpha, target_modules=config.target_modules, scope=config.scope,
        adapter=config.adapter, adapter_settings=config.adapter_settings, init_lora_weights=config.init_lora_weights,
        share_inputs=config.share_inputs, smoothing=config.smoothing, sequence_length=longest_of(config),
        head=kind.head, ladder=ladder_of(config.bit_widths), granularity=config.granularity,
        batch_size=BATCH_SIZE if stored is None else stored.batch_size,
    )  # fmt: skip
    if stored is not None:
        net.name_as(stored)
    if config.embedding_bits != EXACT and any(table.weight.requires_grad for _, table in tables(net)):
        raise ValueError(
            f"method {config.method!r} learns the embeddings, which would not stay rounded: drop --embedding_bits"
        )
    net.autocast = torch.bfloat16 if config.precision == "bf16" else None
    if config.gradient_checkpointing:
        net.gradient_checkpointing_enable()
    drops = any(module.p > 0 for module in net.modules() if isinstance(module, torch.nn.Dropout))
    if config.average_over == "dropout" and not drops:
        raise ValueError(f"backbone {config.backbone!r} has no dropout to draw masks of: drop --average_over dropout")
    before = build_prior(prior or config.prior, net.layout, {} if prior else config.prior_settings)
    guide = build_guide(config.guide, net.layout, before, config.guide_settings)
    head = dict(enumerate(net.head_parameters()))
    weights = build_weights(config.weights, net.random_weights(), head, config.weights_settings)
    if weights.curvature and kind.curvature is None:
        raise ValueError(
            f"weights {config.weights_of_fits!r} has no curvature for {kind.title}, the kind of task "
            f"{config.task!r}: choose other --weights"
        )
    if net.allocates and not guide.is_allocated:
        raise ValueError(
            f"adapter {config.adapter!r} allocates ranks, which guide {config.guide!r} does not take: choose a guide "
            "with `allocate`"
        )
    if config.gate_optimizer == "natural":
        require_natural(guide, "--gate_optimizer natural", "--gate_optimizer adam")
    program = of(
        net, before, guide, kind, n_train=n_train, estimator=config.estimator,
        estimator_settings=config.estimator_settings, weights=weights,
    )  # fmt: skip
    if config.gate_optimizer == "adam" and getattr(program.elbo, "natural", False):
        raise ValueError(
            f"the gradient of estimator {config.estimator!r} is a natural one: drop --gate_optimizer adam, or use "
            "--estimator relaxed"
        )
    program.text_columns, program.kl_weight = task.text_columns, config.kl_weight
    return program
