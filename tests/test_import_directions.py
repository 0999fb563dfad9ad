"""The house keeps its directions: a package imports earlier rows of README's table, nothing goes in a circle, a file is
explained and fits on a few screens."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_blora"
LONGEST = 300  # lines
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__").replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def table(readme):
    """The row of each package and top module, by name, from README's table of packages."""
    lines = readme.partition("| row | packages and modules |")[2].split("\n\n")[0].splitlines()[2:]
    return {name: row for row, line in enumerate(lines) for name in re.findall(r"`([\w.]+?)/?`", line)}


ROWS = table((PACKAGE / "README.md").read_text(encoding="utf-8"))


def room(module):
    """The entry of the table that a module belongs to: its package, or its own name at the top."""
    return module.partition(".")[0]


def imported(module, source, modules=MODULES):
    """The modules of ours that a module imports, at its top or inside a function."""
    is_package = module in modules and modules[module].name == "__init__.py"
    package = [] if module == "__init__" else module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [name.name.split(".") for name in node.names if name.name.split(".")[0] == "pyro_blora"]
            yield from (".".join(path[1:]) or "__init__" for path in paths)
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level == 0:
                if parts[:1] != ["pyro_blora"]:
                    continue
                path = parts[1:]
            else:
                path = [*package[: len(package) - node.level + 1], *parts]
            for name in node.names:  # a module of that name, or something that the package has
                whole = ".".join([*path, name.name])
                yield whole if whole in modules else ".".join(path) or "__init__"


IMPORTED = {name: sorted(set(imported(name, path.read_text(encoding="utf-8")))) for name, path in MODULES.items()}


def circle(graph):
    """The names of one circle, none if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_package_has_one_row():
    assert len(ROWS) > 20 and set(ROWS) == {room(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_its_own_row_and_earlier_ones_only(module):
    own = ROWS[room(module)]
    for other in IMPORTED[module]:
        assert ROWS[room(other)] <= own, f"{module} (row {own}) imports {other} (row {ROWS[room(other)]})"


def test_packages_import_each_other_in_no_circle():
    rooms = {name: set() for name in ROWS}
    for module, others in IMPORTED.items():
        rooms[room(module)] |= {room(other) for other in others} - {room(module)}
    assert not circle(rooms)


def test_modules_import_each_other_in_no_circle():
    assert not circle(IMPORTED)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_explained_and_fits_on_a_few_screens(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), f"{module} has no docstring"
    assert len(source.splitlines()) <= LONGEST, f"{module} has more than {LONGEST} lines: cut it"


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("build", "from .program import loss", ["program"]),
        ("training.loop", "from ..program import loss\nfrom . import resuming", ["program", "training.resuming"]),
        ("training.loop", "def f():\n    from .. import program, fit", ["program", "__init__"]),
        ("training.loop", "import pyro_blora.gates\nimport pyro_blora\nimport torch", ["gates", "__init__"]),
        ("training.loop", "from pyro_blora.gates import NestedBernoulli", ["gates"]),
        ("training", "from .loop import fit\nfrom . import loop", ["training.loop", "training.loop"]),
        ("report.sections.gates", "from ...bops import savings\nfrom .. import charts", ["bops", "report.charts"]),
        ("__init__", "from .lazily import lazily", ["lazily"]),
    ],
)
def test_every_way_to_import_is_seen(module, source, found):
    assert list(imported(module, source)) == found


def test_the_test_sees_a_circle():
    assert circle({"a": ["b"], "b": ["a"]}) and not circle({"a": ["b"], "b": []})
