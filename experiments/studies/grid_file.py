"""From a grid file to the cells of a study: every combination of its axes, each a checked RunConfig.

    base:                                  # flags of every run
      backbone: demo
      max_train: 2000
    axes:                                  # every combination of one entry from each
      task: [sst2, mrpc]
      prior:
        - nested
        - {prior: bops, prior.rate: 0.5}   # several flags that go together, shown as `bops` and told apart by `label`
      seed: [0, 1]

`preset: sst2` stands for the flags of that preset, wherever it is given; everything else in the file overrides it.
Nothing is trained, and nothing but the names of priors and guides is looked up, before every cell is known to be right.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pyro_blora.build import check_names
from pyro_blora.config import RunConfig
from pyro_blora.config.command_line import EXPONENT, OWNED, flag_names, gather_settings, read_preset
from pyro_blora.config.methods import left_open, require_consistent
from pyro_blora.guides import GUIDES, build_guide
from pyro_blora.priors import PRIORS, build_prior, parts
from pyro_blora.testing import example_layout
from pyro_blora.training import Schedule
from pyro_blora.user_files import compose_yaml, read_text, value_of
from pyro_blora.user_values import suggest

CELLS = "cells.json"  # beside the table of results: the labels of every cell, finished or not
_OF_THE_MODEL = ("allocation", "budget", "random")  # priors whose settings only the model itself can refuse
_preset = functools.cache(read_preset)  # once a grid, not once a cell


@dataclasses.dataclass(frozen=True)
class Entry:
    """One choice of an axis: what it is called in tables, the flags it sets, and its line in the file."""

    label: str
    flags: dict[str, Any]
    line: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid.  labels: axis -> label of its entry."""

    labels: dict[str, str]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.config.folder

    @property
    def name(self) -> str:
        return " ".join(f"{axis}={label}" for axis, label in self.labels.items())


def read_grid(
    path: str | Path, output_dir: str | None = None, glue_dir: str | None = None, taken: tuple[str, ...] = ()
) -> list[Cell]:
    """All cells of a grid file, in the order of its axes.

    output_dir: of the runs, unless the file names one (default: runs/<name of the file>). glue_dir: likewise.
    taken: names that no axis may have.
    Errors: ValueError naming the file and the line, or the combination, that cannot work.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"grid file {path} does not exist: give a YAML file, those of experiments/grids for example")
    root = compose_yaml(read_text(path), f"grid {path}")
    tables = dict(_pairs(root, path, "base and axes", ("base", "axes")))
    base = _flags(tables["base"], path) if "base" in tables else {}
    base = {"output_dir": output_dir or f"runs/{path.stem}", "glue_dir": glue_dir} | base
    axes = _axes(tables.get("axes"), path, taken)
    _preset.cache_clear()  # the user's own may have changed
    try:
        _checked_fields(base)
    except ValueError as error:
        raise ValueError(f"grid {path}, base: {error}") from None
    cells = []
    for chosen in itertools.product(*axes.values()):
        labels = {axis: entry.label for axis, entry in zip(axes, chosen, strict=True)}
        where = f"grid {path}, " + " with ".join(f"line {entry.line} ({entry.label})" for entry in chosen)
        try:
            cells.append(Cell(labels, _checked(base, *(entry.flags for entry in chosen))))
        except ValueError as error:
            raise ValueError(f"{_line_of(str(error), base, chosen, path) or where}: {error}") from None
    _refuse_twins(cells, path)
    return cells


def _checked(base: dict[str, Any], *entries: dict[str, Any]) -> RunConfig:
    """The configuration of a cell.  Errors: ValueError for what can be known to be wrong without loading anything."""
    config = _checked_fields(base, *entries)
    check_names(config)
    if config.glue_dir is not None and not Path(os.path.expanduser(config.glue_dir)).is_dir():
        raise ValueError(f"glue_dir {config.glue_dir} is no folder: give that of the official TSV release")
    if config.max_train is not None:
        Schedule.of(config, config.max_train)
    for name, settings in parts(config.prior, config.prior_settings).values():
        if name in PRIORS.names() and name not in _OF_THE_MODEL:
            build_prior(name, example_layout(rank=config.rank), settings)
    if config.guide in GUIDES.names():
        layout = example_layout(rank=config.rank)
        build_guide(config.guide, layout, build_prior("nested", layout), config.guide_settings)
    return config


def _checked_fields(base: dict[str, Any], *entries: dict[str, Any]) -> RunConfig:
    """Presets, under the base, under the entries; a method replaces what is under the level that names it."""
    flags: dict[str, Any] = {}
    for table in (base, *entries):
        flags |= _preset(table["preset"]) if "preset" in table else {}
    for level in ((base,), entries):
        for method in [table["method"] for table in level if "method" in table]:
            flags = left_open(method, flags)
        flags = _of_parts(flags, level, base)
        for table in level:
            flags |= table
    for table in entries if any("method" in entry for entry in entries) else (base, *entries):
        require_consistent(flags.get("method", "bayesian_lora"), table)
    flags.pop("preset", None)
    return RunConfig.from_dict(gather_settings(flags))


def _of_parts(flags: dict[str, Any], level: Sequence[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """The flags without the settings of a part that the tables of a level replace, in whatever order they do.

    Errors: ValueError where the base sets them for no part that it names: nobody would see that they are dropped.
    """
    for owner in ("prior", "guide"):
        chosen = [table[owner] for table in level if owner in table]
        if chosen and chosen[-1] != flags.get(owner):
            dropped = [key for key in flags if key.startswith(f"{owner}.")]
            if loose := [key for key in dropped if key in base and not base.keys() & {owner, "preset", "method"}]:
                raise ValueError(
                    f"base sets {loose[0]!r} and an axis chooses the {owner}: name its {owner} in base, too, or set "
                    f"{loose[0]!r} in the entries of that axis"
                )
            flags = {key: value for key, value in flags.items() if key not in dropped}
    return flags


def _line_of(message: str, base: dict[str, Any], chosen: tuple[Entry, ...], path: Path) -> str | None:
    """Where the entry is that makes the same mistake on its own."""
    for entry in chosen:
        try:
            _checked(base, entry.flags)
        except ValueError as error:
            if str(error) == message:
                return f"grid {path}, line {entry.line} ({entry.label})"
    return None


def _axes(node: yaml.Node | None, path: Path, taken: tuple[str, ...]) -> dict[str, list[Entry]]:
    if node is None:
        raise ValueError(f"grid {path} has no `axes`: a table such as `task: [sst2, mrpc]`")
    axes, owner = {}, {}
    for axis, choices in _pairs(node, path, "axes"):
        if not isinstance(choices, yaml.SequenceNode) or not choices.value:
            raise ValueError(f"{_at(path, choices)}: axis {axis!r} must be a list, such as [0, 1]")
        if axis in taken:
            raise ValueError(f"{_at(path, choices)}: axis {axis!r} would hide that column of the results: rename it")
        axes[axis] = [_entry(axis, choice, path) for choice in choices.value]
        labels = [entry.label for entry in axes[axis]]
        for i, entry in enumerate(axes[axis]):
            if entry.label in labels[:i]:
                where = f"grid {path}, line {entry.line}"
                raise ValueError(f"{where}: axis {axis!r} has two entries {entry.label!r}: give one a `label:`")
        for flag in {flag for entry in axes[axis] for flag in entry.flags}:
            if flag in owner:
                line = next(entry.line for entry in axes[axis] if flag in entry.flags)
                raise ValueError(f"grid {path}, line {line}: {flag!r} is set by the axes {owner[flag]!r} and {axis!r}")
            owner[flag] = axis
    return axes


def _entry(axis: str, node: yaml.Node, path: Path) -> Entry:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        value = _value(node, path)
        _require_flag(axis, node, path)
        return Entry(str(value), {axis: value}, line)
    flags = _flags(node, path, extra=("label",))
    label = flags.pop("label", flags.get(axis, flags.get("preset")))
    if label is None and axis not in flags:
        raise ValueError(f"{_at(path, node)}: an entry of axis {axis!r} that does not set {axis!r} needs a `label:`")
    return Entry(str(label), flags, line)


def _flags(node: yaml.Node, path: Path, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    found = {}
    for key, value in _pairs(node, path, "flags"):
        if key not in extra:
            _require_flag(key, value, path)
        found[key] = _value(value, path)
    return found


def _require_flag(key: str, node: yaml.Node, path: Path) -> None:
    if key != "preset" and key not in flag_names() and not OWNED.fullmatch(key):
        raise ValueError(f"{_at(path, node)}: unknown flag {key!r}: {suggest(key, ['preset', *flag_names()])}")


def _pairs(node: yaml.Node | None, path: Path, what: str, known: tuple[str, ...] = ()) -> list[tuple[str, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        where = f"grid {path}" if node is None else _at(path, node)
        raise ValueError(f"{where}: expected a table of {what}")
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{_at(path, key)}: a name must be a word, not a list or a table: {what} are named")
    keys = [key.value for key, _ in node.value]
    for i, (key, _) in enumerate(node.value):
        if key.value in keys[:i]:
            raise ValueError(f"{_at(path, key)}: {key.value!r} is given twice")
        if known and key.value not in known:
            raise ValueError(f"{_at(path, key)}: unknown key {key.value!r}: {suggest(key.value, known)}")
    return [(key.value, value) for key, value in node.value]


def _value(node: yaml.Node, path: Path) -> Any:
    if isinstance(node, yaml.ScalarNode) and node.style is None and EXPONENT.fullmatch(node.value):
        return float(node.value)  # YAML takes 1e-3 for a word
    return value_of(node, f"grid {path}")


def _at(path: Path, node: yaml.Node) -> str:
    return f"grid {path}, line {node.start_mark.line + 1}"


def _refuse_twins(cells: list[Cell], path: Path) -> None:
    held: dict[Path, Cell] = {}
    for cell in cells:
        if cell.folder in held:
            raise ValueError(
                f"grid {path}: {held[cell.folder].name} and {cell.name} are the same run: drop one of them"
            )
        held[cell.folder] = cell
