"""From presets and command-line words to the fields of a RunConfig.

The presets are package data, in `pyro_blora/config/presets/`, so that an installed `pyro-blora train --preset demo`
finds them without a checkout. A setting of a part that is chosen by name (prior, guide, ...) has a dot in its own:
`--prior.rate 3` on the line, `prior.rate: 3` in a preset; `--prior.g depth` gives one site a separate prior,
`--prior.g.NAME` its settings.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from ..registries import CHOSEN, TASKS
from ..user_code import is_of_file
from ..user_files import compose_yaml, load_yaml, read_text, value_of
from ..user_values import shown, spelled, suggest
from .config_file import OF_MACHINE, RETIRED, without_machine, without_retired
from .methods import left_open, require_consistent
from .run_config import OWNERS, PRESETS, RunConfig, field_names

_PATTERN = rf"(?:{'|'.join(OWNERS)})\.\w+|prior\.[zg]\.\w+"
OWNED = re.compile(_PATTERN)
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # a number, also where YAML reads a string
_LONG = 1000  # characters of a command
_SETTING = re.compile(rf"--({_PATTERN})(?:=(.*))?", re.DOTALL)


_ELSEWHERE = {  # what other programs call it
    "learning_rate": "lr", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation", "max_seq_length": "max_length", "max_train_samples": "max_train",
    "model": "backbone", "model_name_or_path": "backbone", "task_name": "task", "lora_r": "rank", "r": "rank",
    "lora_alpha": "alpha", "warmup_ratio": "warmup", "bf16": "precision bf16", "max_grad_norm": "clip_norm",
}  # fmt: skip


def called_elsewhere(word: str) -> str | None:
    """The remedy for a flag as other programs call it, for one that is no more, for a preset without its flag, for a
    device; else None.
    """
    name = word.lstrip("-").replace("-", "_")
    if word.startswith("-") and name in _ELSEWHERE:
        return f"it is --{_ELSEWHERE[name]} here"
    if word.startswith("-") and name in RETIRED:
        return f"it {RETIRED[name][1]}"
    if name in ("device", "cuda", "gpu", "no_cuda"):
        return (
            "a GPU is used where torch finds one: drop it (`pyro-blora doctor` tells; CUDA_VISIBLE_DEVICES= hides it)"
        )
    return f"a preset is chosen by --preset {word}" if word in preset_names() else None


def preset_names() -> list[str]:
    """The names of the presets that travel with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The RunConfig fields that a preset sets; `prior.rate: 3` becomes an entry of `prior_settings`."""
    return gather_settings(read_preset(name))


def read_preset(name: str) -> dict[str, Any]:
    """The flags that a preset sets, from a packaged name, a YAML file of the user's, or a run's `config.json`.

    Errors: ValueError naming the file, and the line of a key that is unknown or given twice.
    """
    path = PRESETS / f"{name}.yaml" if name in preset_names() else Path(os.path.expanduser(name))
    if not path.is_file():
        raise ValueError(f"unknown preset {name!r}: {suggest(name, preset_names())}; or give a YAML file that exists")
    node = compose_yaml(read_text(path), f"preset {path}")
    values = value_of(node, f"preset {path}")
    if node is None or values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"preset {path} must be a table of `flag: value` lines, got {type(values).__name__}")
    seen: set[str] = set()
    for key_node, _ in node.value:
        where = f"preset {path}, line {key_node.start_mark.line + 1}"
        key = key_node.value
        if key in seen:
            raise ValueError(f"{where}: {key!r} is given twice")
        if key not in (*flag_names(), *OF_MACHINE, *RETIRED) and not OWNED.fullmatch(key):
            raise ValueError(f"{where}: unknown key {key!r}: {suggest(key, flag_names())}")
        seen.add(key)
    return without_retired(without_machine(values))


def flag_names() -> list[str]:
    """What a preset and a grid file may set, beside settings with a dot: fields, and flags of tasks, as `data`."""
    return [*field_names(), *_task_flags()]


def _task_flags() -> dict[str, str]:
    """The task of each flag that belongs to one."""
    return {name: entry.name for entry in TASKS.entries() for name in entry.flags}


def _as_settings(values: Mapping[str, Any], dashes: str = "") -> dict[str, Any]:
    """With each flag of a task, as `data`, as the setting that it is, `task.data`, and with the task that it chooses.

    Errors: ValueError where another task is chosen, or where the setting is there as well.
    """
    found = dict(values)
    for name, task in _task_flags().items():
        if name in found:
            if found.setdefault("task", task) != task:
                raise ValueError(
                    f"{dashes}{name} is of {dashes}task {task}, not of {found['task']!r}: drop one of them"
                )
            if f"task.{name}" in found:
                raise ValueError(f"{dashes}{name} and {dashes}task.{name} are one setting: give it once")
            found[f"task.{name}"] = found.pop(name)
    return found


def gather_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with every `prior.NAME`, `guide.NAME`, ... moved into `prior_settings`, `guide_settings`, ...

    Errors: ValueError as of `_as_settings`.
    """
    values = _as_settings(values)
    gathered = {key: value for key, value in values.items() if "." not in key}
    for key, value in values.items():
        if "." in key:
            owner, _, setting = key.partition(".")
            if key in ("prior.z", "prior.g") and value is False:
                value = "off"  # YAML's reading of the word
            gathered[f"{owner}_settings"] = {**gathered.get(f"{owner}_settings", {}), setting: value}
    return gathered


def _or_none(value: str) -> str | None:
    return None if value.lower() in ("none", "null") else value


def run_fields(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The RunConfig fields of a command line: the preset's, overridden by the flags and settings given."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(RunConfig):
        if hasattr(arguments, field.name):
            value, kind = getattr(arguments, field.name), cast(Any, field.type)
            optional = not isinstance(kind, type) and isinstance(None, kind)
            given[field.name] = _or_none(value) if optional else value
    flags = {name: _or_none(getattr(arguments, name)) for name in _task_flags() if hasattr(arguments, name)}
    chosen = {"task": given["task"]} if "task" in given else {}
    settings = _as_settings({**chosen, **settings, **flags}, "--")
    given |= {"task": settings.pop("task")} if "task" in settings else {}
    preset = {} if arguments.preset is None else read_preset(arguments.preset)
    if _is_of_a_run(preset) and given.keys() & {"method", *OWNERS}:  # without what the replaced parts have set
        config = RunConfig.from_dict(preset)
        preset = {name: getattr(config, name) for name in _stated(config)}
    if given.get("method", preset.get("method")) != preset.get("method"):
        preset = left_open(given["method"], preset)
    preset = gather_settings(preset)
    for owner in OWNERS:
        chosen = preset.get(owner, RunConfig.__dataclass_fields__[owner].default)
        if given.get(owner, chosen) != chosen:
            preset.pop(f"{owner}_settings", None)  # they belong to the part that the line has replaced
    require_consistent(given.get("method", preset.get("method", "bayesian_lora")), {**given, **settings})
    line = gather_settings(settings)
    for key in line.keys() & preset.keys():
        line[key] = {**preset[key], **line[key]}
    return {**preset, **given, **line}


def _is_of_a_run(preset: Mapping[str, Any]) -> bool:
    """Whether it is a run's `config.json`, which has the value of every field, whoever has set it."""
    return {"method", "seed", *(f"{owner}_settings" for owner in OWNERS)} <= preset.keys()


def _stated(config: RunConfig) -> set[str]:
    """The fields that are enough to make this configuration: its parts, and what these and the task do not say."""
    names = {"task", "method", "seed"}

    def differing(among: Iterable[str]) -> set[str]:
        """The fields among these that would have another value if only `names` were given."""
        again = RunConfig(**{name: getattr(config, name) for name in names})
        return {name for name in among if getattr(again, name) != getattr(config, name)}

    try:
        for owner in sorted(OWNERS, key=lambda owner: owner == "estimator"):  # which the others propose
            names |= differing([owner, f"{owner}_settings"])
        while more := differing(field_names()) - names:
            names |= more
    except ValueError:  # parts that need other values than they propose
        return set(field_names())
    return names


def command_line(config: RunConfig, written: Path | None = None) -> str:
    """The `pyro-blora train` line of a configuration: what its method, parts and task do not say.

    written: a run's `config.json` that differs in the seed only; it stands in a line that would be long, as that of an
    allocation with the width of every tensor.
    """
    usual, words, stated = RunConfig(method=config.method, task=config.task), ["pyro-blora", "train"], _stated(config)
    for field in dataclasses.fields(RunConfig):
        value = getattr(config, field.name)
        if field.name.endswith("_settings"):
            owner = field.name.removesuffix("_settings")
            known = getattr(usual, field.name) if getattr(usual, owner) == getattr(config, owner) else {}
            for key, setting in value.items():
                if key not in known or known[key] != setting:
                    words += _setting_words(owner, key, setting, config)
        elif field.name in stated:
            words += [f"--{field.name}", spelled(value)]
    line = shlex.join(words)
    if written is not None and len(line) > _LONG:
        return shlex.join(["pyro-blora", "train", "--preset", str(written), "--seed", str(config.seed)])
    return line


def _setting_words(owner: str, key: str, setting: Any, config: RunConfig) -> list[str]:
    """The flag that gives a setting, and its value as the line reads it back: quoted where YAML takes it for more."""
    if not isinstance(setting, str):
        return [f"--{owner}.{key}", json.dumps(setting)]
    is_plain = not setting.startswith("-") and setting.lower() not in ("none", "null")
    if owner == "task" and is_plain and _task_flags().get(key) == config.task:
        return [f"--{key}", setting]
    name = f"{owner}.{key}"
    try:
        read = gather_settings({name: _value(name, setting)})[f"{owner}_settings"][key]
    except ValueError:
        read = None
    return [f"--{name}", setting if is_plain and read == setting else json.dumps(setting, ensure_ascii=False)]


def of_scripts(config: RunConfig) -> list[tuple[str, str]]:
    """(kind, name) of parts that a script has registered: a command line knows them only where they are of a file."""
    chosen = {kind: [getattr(config, kind)] for kind in CHOSEN} | {"prior": config.prior_names}
    each = ((kind, name) for kind, names in chosen.items() for name in names if name != "off")
    return [(kind, name) for kind, name in each if not is_of_file(name) and not CHOSEN[kind].has_own(name)]


def take_settings(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split off `--prior.rate 3` and `--guide.NAME=VALUE`; values are YAML, and numbers such as 1e-3 are numbers."""
    settings: dict[str, Any] = {}
    rest, tokens = [], iter(argv)
    for token in tokens:
        match = _SETTING.fullmatch(token)
        if match is None:
            rest.append(token)
            continue
        name, text = match.groups()
        text = next(tokens, None) if text is None else text
        if text is None or text.startswith("--"):
            raise ValueError(f"--{name} needs a value: --{name} 3 for example")
        if name in settings:
            raise ValueError(f"--{name} is given twice")
        settings[name] = _value(name, text)
    return settings, rest


def _value(name: str, text: str) -> Any:
    try:
        return float(text) if EXPONENT.fullmatch(text) else load_yaml(text, f"--{name}")
    except ValueError as error:
        raise ValueError(f"--{name} must be a number, a word or a YAML list, got {shown(text)} ({error})") from None
