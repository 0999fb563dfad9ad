"""The public table: every name is importable, and is the thing itself rather than a module of the same name."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import pyro_blora
import pyro_blora.run  # imports every module, as a session does sooner or later


def test_every_public_name_is_a_function_or_a_class():
    for name in pyro_blora.__all__:
        assert callable(getattr(pyro_blora, name)), name
        assert inspect.getdoc(getattr(pyro_blora, name)), name


def test_the_table_is_what_the_house_promises():
    assert set(pyro_blora.__all__) == {
        "attach", "fit", "draw", "predict", "expected_bops", "to_arviz", "export", "load", "RunConfig", "use_gates",
        "Gates", "NestedBernoulli", "register_prior", "register_guide", "register_adapter", "register_weights",
        "register_elbo", "register_task", "register_section", "Task", "train_run",
    }  # fmt: skip


def test_an_unknown_name_lists_the_known_ones():
    try:
        pyro_blora.atach  # noqa: B018 (the access is the test)
    except AttributeError as error:
        assert "attach" in str(error)
    else:
        raise AssertionError("an unknown name was found")


HEAVY = ("peft", "transformers", "datasets", "evaluate", "pandas", "scipy.stats", "sklearn", "torchmetrics", "arviz",
         "matplotlib", "altair")  # fmt: skip


def test_names_are_imported_without_what_their_calls_need_later():
    """Within two seconds where torch and pyro take one; with all of these it is nine."""
    found = f"print([name for name in {HEAVY} if name in sys.modules])"
    code = f"""
import sys
from pyro_blora import RunConfig, attach, draw, expected_bops, export, fit, load, predict
{found}
from pyro_blora import to_arviz
{found}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    first, second = map(eval, done.stdout.splitlines())
    assert first == [] and set(second) <= {"pandas"}  # of xarray


PACKAGES = [module.name for module in pkgutil.walk_packages(pyro_blora.__path__, "pyro_blora.") if module.ispkg]


@pytest.mark.parametrize("package", ["pyro_blora", *PACKAGES])
def test_what_a_package_offers_is_not_hidden_by_a_module_of_its_name(package):
    found = importlib.import_module(package)
    modules = {module.name for module in pkgutil.iter_modules(found.__path__)}
    offered = set(getattr(found, "__all__", ()))
    assert not offered & modules
    assert all(hasattr(found, name) for name in offered)
