"""Moved modules are found under the names that README and docs gave them, with a warning that names the new one."""

import importlib
import re
import subprocess
import sys

import pytest

from pyro_blora.old_names import OLD_NAMES

ONCE = {  # what README, docs and CONTRIBUTING imported from them
    "pyro_blora.arviz_data": "read held_out_elpd held_out held_out_scores group pareto_weights",
    "pyro_blora.backbone": "load_backbone",
    "pyro_blora.diagnostics": "Posterior",
    "pyro_blora.host": "spin_briefly keep_freed_memory",
    "pyro_blora.processes": "leave",
    "pyro_blora.tasks.metric": "GlueScore",
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_is_the_new_module_and_warns_where_it_is_imported(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=re.escape(f"{old} has moved: import {OLD_NAMES[old]}")) as caught:
        exec(compile(f"import {old}", "a_user's.py", "exec"), {})
    assert [warning.filename for warning in caught] == ["a_user's.py"]
    assert sys.modules[old] is importlib.import_module(OLD_NAMES[old])
    assert all(hasattr(sys.modules[old], name) for name in ONCE[old].split())


def test_both_ways_to_import_find_the_same_object():
    code = (
        "from pyro_blora import diagnostics\nfrom pyro_blora.diagnostics import Posterior\n"
        "import pyro_blora.posterior as new\nassert diagnostics.Posterior is Posterior is new.Posterior"
    )
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], check=True)


def test_a_name_that_never_was_is_an_import_error():
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module("pyro_blora.nothing")
