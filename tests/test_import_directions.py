"""The house keeps its floors: a module imports lower floors only, is explained, and fits on a few screens."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_blora"
FLOORS = {
    "example_axis": 4,
    "signals": 0,
    "files": 0,
    "run_lock": 0,
    "non_finite": 0,
    "resuming": 3,
    "optimizer": 5,
    "gradients": 5,
    "doctor": 4,
    "identity": 6,
    "jacobians": 5,
    "summary": 9,
    "evaluation": 8,
    "logbook": 8,
    "validation": 9,
    "scores": 7,
    "curvature": 7,
    "layers": 2,
    "weights": 2,
    "fitted_laws": 1,
    "weight_laws": 0,
    "xs": 0,
    "deberta_from_bert": 1,
    "calibration": 0,
    "baselines": 1,
    "verdicts": 2,
    "glossary": 4,
    "grid_sections": 5,
    "fields": 0,
    "gates": 0,
    "quantizer_triton": -2,
    "quantizer_cpu": -2,
    "relative_positions": -1,
    "quantizer": -1,
    "products": 0,
    "architectures": -2,
    "macs": -1,
    "layout": 0,
    "peft_config": 1,
    "methods": 0,
    "config": 1,
    "registry": 0,
    "handover": 1,
    "guides": 1,
    "bops": 1,
    "flags": 2,
    "schedule": 2,
    "tasks": 1,  # the whole folder: its files may import each other
    "backbone": 2,
    "tokenization": 0,
    "data": 1,
    "adapters": 3,
    "adaptive": 2,
    "estimators": 2,
    "checkpoint": 2,
    "priors": 3,
    "given": 2,
    "adalora": 4,
    "spectra": 4,
    "program": 4,
    "build": 5,
    "ranges": 5,
    "starting": 5,
    "posterior": 6,
    "arviz_data": 0,
    "watching": 7,
    "testing": 5,
    "training": 10,
    "charts": 0,
    "host": -3,
    "user_files": 0,
    "processes": 0,
    "diagnostics": 2,
    "run_files": 3,
    "findings": 3,
    "gate_sections": 4,
    "calibration_sections": 4,
    "sections": 5,
    "report": 6,
    "show": 4,
    "inference_data": 7,
    "model_card": 3,
    "provenance": 3,
    "exporting": 7,
    "run": 11,
    "__main__": 12,
    "__init__": 13,  # the public table
}
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
LONGEST = 300  # lines


def room(module):
    """The entry of the table that a module belongs to: its own name, or its folder's."""
    return module.partition("/")[0]


def imported_rooms(module, source):
    """The rooms of ours that a module imports, at its top or inside a function."""
    package = module.split("/")[:-1]  # the folder of the module, inside the package
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [name.name.split(".") for name in node.names if name.name.split(".")[0] == "pyro_blora"]
            yield from (path[1] if len(path) > 1 else "__init__" for path in paths)
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level == 0:
                if parts[:1] != ["pyro_blora"]:
                    continue
                path = parts[1:]
            else:
                path = [*package[: len(package) - node.level + 1], *parts]
            if path:
                yield path[0]
            else:  # `from . import bops`: each name is a module, or comes from the public table
                yield from (name.name if name.name in FLOORS else "__init__" for name in node.names)


def test_the_package_has_modules():
    assert {"gates", "config", "registry", "__main__"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_lower_floors_only(module):
    own = room(module)
    assert own in FLOORS, f"{module}.py is in no row of the table: give it a floor in tests/test_floors.py"
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    for other in imported_rooms(module, source):
        assert other in FLOORS, f"{module}.py imports {other}, which has no floor"
        inside_tasks = own == other == "tasks"
        assert inside_tasks or FLOORS[other] < FLOORS[own], f"{module}.py (floor {FLOORS[own]}) imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_explained_and_fits_on_a_few_screens(module):
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), f"{module}.py has no docstring"
    assert len(source.splitlines()) <= LONGEST, f"{module}.py has more than {LONGEST} lines: cut it"


@pytest.mark.parametrize(
    ("module", "source", "rooms"),
    [
        ("training", "from .program import loss", ["program"]),
        ("training", "def f():\n    from . import program, fit", ["program", "__init__"]),
        ("training", "import pyro_blora.gates\nimport pyro_blora\nimport torch", ["gates", "__init__"]),
        ("training", "from pyro_blora.gates import NestedBernoulli", ["gates"]),
        ("tasks/glue", "from ..config import RunConfig\nfrom .task import Task\nfrom . import metric", None),
    ],
)
def test_every_way_to_import_is_seen(module, source, rooms):
    assert list(imported_rooms(module, source)) == (rooms or ["config", "tasks", "tasks"])
