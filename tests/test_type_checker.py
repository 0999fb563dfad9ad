"""What mypy's settings name exists, so that a module that moves does not leave its checks behind."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["overrides"]


def named(section):
    names = section["module"]
    return [names] if isinstance(names, str) else names


def exists(name):
    path = ROOT / name.removesuffix(".*").replace(".", "/")
    return (
        path.is_dir() if name.endswith(".*") else path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    )


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: named(section)[0])
def test_modules_that_settings_of_the_type_checker_name_exist(section):
    ours = [name for name in named(section) if name.startswith("pyro_blora")]
    assert [name for name in ours if not exists(name)] == []
    assert len(set(ours)) == len(ours)
