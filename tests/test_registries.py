"""Parts of every kind are listed without imports, as they are; what they may have stands in a class."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from pyro_blora.__main__ import main
from pyro_blora.adapters import GatedModel
from pyro_blora.build import check_names
from pyro_blora.config import METHODS, RunConfig
from pyro_blora.guides import Guide
from pyro_blora.priors import Prior
from pyro_blora.registries import CHOSEN, LISTED, PRIORS
from pyro_blora.registry import Registry
from pyro_blora.weights import Weights

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_blora"
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
NAMES = [(kind, name) for kind, registry in LISTED.items() for name in registry._own]


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=[f"{kind}-{name}" for kind, name in NAMES])
def test_what_the_text_says_of_a_part_is_what_it_is(kind, name):
    registry = LISTED[kind]
    read = registry._own[name]
    function = registry.resolve(name)
    assert registry.entry(name) == read and read.module == function.__module__
    assert read.line and read.line == inspect.getdoc(function).partition("\n")[0]


def test_every_decorator_of_the_package_is_found():
    """Of modules outside the folders that a registry reads, too."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            for decorator in getattr(node, "decorator_list", ()):
                named = decorator.func if isinstance(decorator, ast.Call) else decorator
                if isinstance(named, ast.Name) and named.id.startswith("register_") and named.id != "register_kl":
                    found.add((named.id, node.name))
    listed = {(registry._decorator, registry.resolve(name).__name__) for registry in LISTED.values()
              for name in registry._own}  # fmt: skip
    assert len(found) > 40 and found == listed


def test_lists_and_names_need_no_torch():
    code = (
        "import sys\nfrom pyro_blora.__main__ import main\nfrom pyro_blora import register_prior, register_elbo\n"
        f"codes = [main([name]) for name in {sorted(set(LISTED) - {'tasks'})}]\n"
        "codes += [main(['train', '--estimator', 'relax']), main(['train', '--weights', 'ensembl'])]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"{[0] * 7 + [2] * 2} False"
    assert "unknown estimator 'relax': did you mean 'relaxed'?" in done.stderr
    assert "unknown weights 'ensembl': did you mean 'ensemble'?" in done.stderr


@pytest.mark.parametrize("kind", LISTED)
def test_every_kind_is_listed_with_its_settings(kind, capsys):
    assert main([kind]) == 0
    printed = capsys.readouterr().out
    for entry in LISTED[kind].entries():
        assert f"\n{entry.name} " in f"\n{printed}"
        assert all(f"--{LISTED[kind].kind}.{setting} VALUE" in printed for setting in entry.settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_consists_of_parts_that_are_registered_with_their_settings(method):
    check_names(RunConfig(method=method))


TABLES = (
    "METHODS",
    "_LORA",
    "CHOICES",
    "_ADDED",
    "_USUAL",
)  # of config/: data that names parts, and choices of two words


def _assigned(node):
    """The name that a statement gives a value, annotated or not; else nothing."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return ast.unparse(target) if target else ""


def test_the_configuration_asks_the_registries():
    """No name of a part stands in config/ but as a default, and in the table of methods."""
    names = {name for registry in CHOSEN.values() for name in registry.names()} - {"none"}  # the word for no value
    for file, tree in TREES.items():
        if not file.startswith("config/"):
            continue
        data = [
            node for node in ast.walk(tree) if getattr(getattr(node, "func", None), "id", "") in ("_field", "Method")
        ]
        data += [node for node in tree.body if _assigned(node) in TABLES]
        known = {id(inner) for node in data for inner in ast.walk(node)}
        said = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in known]
        assert not names & {text for text in said if isinstance(text, str)}, file


HOOKS = {name for base in (Prior, Guide, Weights, GatedModel) for name in vars(base)} - set(dir(nn.Module))


def test_no_part_is_asked_whether_it_has_a_method():
    assert {"adapt", "components", "collect", "allocate"} <= HOOKS
    asked = [
        (file, node.lineno, node.args[1].value)
        for file, tree in TREES.items() for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("hasattr", "getattr")
        and len(node.args) > (1 if node.func.id == "hasattr" else 2) and isinstance(node.args[1], ast.Constant)
        and node.args[1].value in HOOKS
    ]  # fmt: skip
    assert asked == []


@pytest.mark.parametrize("words", ["did you mean", "get_close_matches"])
def test_names_are_guessed_in_one_place(words):
    assert [file for file in TREES if words in (PACKAGE / file).read_text(encoding="utf-8")] == ["user_values.py"]


# --- a part in a file -------------------------------------------------------------------------------------------------

DECORATED = '''
from pyro_blora import register_weights

raise RuntimeError("its text is read, it does not run")

@register_weights("mine", sets={"average_over": "dropout"}, proposes={"lr": 0.25}, excludes={"restarts": "no restarts"})
def law(weights, head, *, scale: float = 2.0):
    """Mine."""
'''


def test_what_a_file_says_of_its_part_is_heeded_and_does_not_run(tmp_path):
    (tmp_path / "own.py").write_text(DECORATED, encoding="utf-8")
    name = f"{tmp_path}/own.py:law"
    config = RunConfig(weights=name)
    assert (config.average_over, config.lr) == ("dropout", 0.25) and RunConfig(weights=name, lr=1.0).lr == 1.0
    with pytest.raises(ValueError, match="no restarts"):
        RunConfig(weights=name, restarts=2)
    assert RunConfig(weights=f"{tmp_path}/own.py:other").average_over == "gates"
    (tmp_path / "own.py").write_text("def law(:", encoding="utf-8")
    assert RunConfig(weights=name).average_over == "gates"  # what is wrong with it is said where it is built


def test_the_package_keeps_its_names_whether_its_modules_are_imported_or_not():
    fresh = Registry("prior", "priors")
    with pytest.raises(ValueError, match=r"prior 'bops' is registered already by pyro_blora.priors.static"):
        fresh.register("bops")(lambda layout: None)
    assert fresh.names() == sorted(PRIORS._own)


def test_a_word_that_a_decorator_does_not_know_is_refused():
    with pytest.raises(TypeError, match="propose"):
        Registry("prior").register("mine", propose={"lr": 1.0})(lambda layout: None)
