"""The flags of `pyro-blora train`: every field of a RunConfig, in groups, each with its unit."""

import argparse
import dataclasses

from ..registries import TASKS
from .checks import CHOICES
from .command_line import preset_names
from .run_config import RunConfig

_LISTED = 5  # choices that a flag's help names; more have a command that lists them
GROUPS = {  # title: (what stands below it, {flag: its unit, or what its value is})
    "run": ("", {"method": "NAME"}),
    "data": (
        "",
        {
            "task": "NAME", "glue_dir": "FOLDER", "max_train": "EXAMPLES", "data_seed": "SEED",
            "validation": "FRACTION", "max_length": "TOKENS",
        },
    ),
    "model and adapter": (
        "Settings of an adapter have a dot: --adapter xs --adapter.singular_values split.",
        {
            "backbone": "NAME", "backbone_revision": "COMMIT", "adapter": "NAME", "rank": "RANKS", "alpha": "SCALE",
            "target_modules": "NAMES", "scope": "NAME", "bit_widths": "BITS", "granularity": "NAME",
            "share_inputs": "", "smoothing": "", "init_lora_weights": "NAME",
            "embedding_bits": "BITS",
        },
    ),
    "gates": (
        "Prior, guide and ELBO of the gates. Their settings have a dot: --guide mixture --guide.components 4;\n"
        "--prior bops --prior.rate 3: one more bit of the tensor with the most MACs costs 3 nats.",
        {
            "prior": "NAME", "guide": "NAME", "estimator": "NAME", "kl_weight": "WEIGHT", "kl_warmup": "FRACTION",
            "rest": "FRACTION", "settle": "FRACTION", "distillation": "WEIGHT",
            "temperature_start": "TEMPERATURE", "temperature_end": "TEMPERATURE", "gate_optimizer": "NAME",
            "lr_gates": "RATE", "lr_ranges": "RATE", "gated_dropout": "",
        },
    ),
    "weights": (
        "Settings have a dot: --weights swag --weights.rank 10.",
        {"weights": "NAME"},
    ),
    "training": (
        "",
        {
            "epochs": "EPOCHS", "choose_epoch": "", "batch_size": "EXAMPLES", "accumulation": "FORWARDS",
            "group_by_length": "", "lr": "RATE", "lr_head": "RATE", "warmup": "FRACTION", "weight_decay": "RATE",
            "clip_norm": "NORM", "max_skipped_steps": "STEPS", "seed": "SEED", "restarts": "FITS",
        },
    ),
    "evaluation": ("", {"draws": "DRAWS", "average_over": "NAME", "ood_task": "NAME"}),
    "output": (
        "",
        {
            "output_dir": "FOLDER", "logging_steps": "STEPS", "checkpoint_steps": "STEPS",
            "checkpoint_minutes": "MINUTES", "tracker": "NAME",
        },
    ),
    "machine": ("", {"precision": "NAME", "gradient_checkpointing": ""}),
}  # fmt: skip


def add_run_flags(parser: argparse.ArgumentParser) -> dict[str, argparse._ArgumentGroup]:
    """A flag for every field of a RunConfig, for some settings of tasks, and `--preset`.

    Returns the groups by title, for flags of a command's own.

    Values are words: RunConfig judges them, with better sentences than argparse.
    """
    fields = RunConfig.__dataclass_fields__
    groups = {}
    for title, (below, units) in GROUPS.items():
        group = groups[title] = parser.add_argument_group(title, below or None)
        if title == "run":
            group.add_argument("--preset", metavar="NAME", help=f"a YAML file, or one of {', '.join(preset_names())}")
        for name, unit in units.items():
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, **_shown(fields[name], unit))
        for entry in TASKS.entries() if "task" in units else ():
            for name, text in entry.flags.items():
                shown = f"{text} (--task {entry.name})"
                group.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=text.partition(" ")[0], help=shown)
    return groups


def _shown(field: dataclasses.Field, unit: str) -> dict:
    is_switch, default = field.type in (bool, bool | None), "none" if field.default is None else str(field.default)
    default = default.lower() if is_switch else default
    shown = {"help": f"{field.metadata['help']} (default: {default})".replace("%", "%%")}
    if is_switch:
        return {**shown, "metavar": "{true,false}", "nargs": "?", "const": "true"}
    choices = CHOICES.get(field.name, ())
    return {**shown, "metavar": f"{{{','.join(choices)}}}" if 0 < len(choices) <= _LISTED else unit}
