"""`pyro-blora doctor`, `tasks` and `--version`."""

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import pytest

from pyro_blora import __version__, doctor
from pyro_blora.__main__ import main
from pyro_blora.quantizer import cpu, fake_quantize
from pyro_blora.tasks import task_names


def test_it_says_what_there_is_and_how_to_get_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(doctor._EXTRAS, "no-such-package", ("nothing", "pip install no-such-package"))
    monkeypatch.setattr(doctor, "_quantizer", lambda: doctor.Finding("quantizer", True, "compiled"))  # by other tests
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    found = {finding.what: finding for finding in doctor.examine()}
    assert found["pyro-blora"].found == __version__ and __version__ in told
    missing = found["no-such-package (nothing)"]
    assert not missing.fine and missing.remedy == "pip install no-such-package" and "not installed" in told
    assert all(f"-> {finding.remedy}" in told for finding in found.values() if finding.remedy)
    assert not found["hub"].fine and "HF_HUB_OFFLINE" in found["hub"].found  # as the tests set it
    assert f"of {os.cpu_count()} processors" in found["threads"].found
    assert all(finding.fine or finding.remedy or finding.what == "GPU" for finding in found.values())


def test_what_a_training_needs_and_lacks_is_said_in_the_end(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "A training can begin: pyro-blora train --preset demo"
    required = ["torch>=9999", "no-such-package>=2", 'wandb; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    found = {finding.what: finding for finding in doctor.examine()}
    assert found["torch"].found.endswith(", does not fit") and found["torch"].remedy == "pip install -U 'torch>=9999'"
    assert found["no-such-package"].remedy == "pip install 'no-such-package>=2'" and "wandb" not in found
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Missing for a training: torch, no-such-package"


def test_it_goes_on_where_torch_cannot_be_imported(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pyro_blora.quantizer")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = {finding.what: finding for finding in doctor.examine()}
    unknown = {what for what, finding in found.items() if finding.found.startswith("not known: ")}
    assert unknown == {"devices", "compiler", "quantizer", "threads"} and "cache" in found


def test_the_compiler_is_named(monkeypatch):
    found = doctor._compiler()
    assert found.fine and shutil.which(found.found.split()[0])
    monkeypatch.setattr(cpu, "_COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CC", raising=False)
    found = doctor._compiler()
    assert not found.fine and "no-such-compiler" in found.found and "gcc" in found.remedy


def test_a_cache_that_cannot_be_written_is_one(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYRO_BLORA_CACHE", str(tmp_path / "file" / "cache"))
    found = doctor._cache()
    assert not found.fine and "PYRO_BLORA_CACHE" in found.remedy
    monkeypatch.setenv("PYRO_BLORA_CACHE", str(tmp_path / "new" / "cache"))
    assert doctor._cache().fine and not (tmp_path / "new").exists()


def test_a_user_without_a_home_is_told_where_a_cache_can_be(monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    for name in ("PYRO_BLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(doctor, "_hub", doctor._threads)
    found = {one.what: one for one in doctor.examine()}
    assert not found["cache"].fine and "set PYRO_BLORA_CACHE" in found["cache"].found


@pytest.mark.parametrize("kernels", ["compiled", "eager", "chosen"])
def test_the_quantizer_is_compiled_or_slow(monkeypatch, kernels):
    monkeypatch.setenv("PYRO_BLORA_COMPILE", "0" if kernels == "chosen" else "1")
    held = ("C",) if kernels == "compiled" else fake_quantize._EAGER
    monkeypatch.setattr(fake_quantize, "_kernels", lambda *_: held)
    found = doctor._quantizer()
    assert found.fine == (kernels == "compiled")
    assert {"compiled": "", "eager": "gcc", "chosen": "unset"}[kernels] in found.remedy


def test_a_hub_out_of_reach_costs_seconds_and_names_a_way_without(monkeypatch):
    import huggingface_hub

    class Silent:
        def head(self, address, timeout):
            raise TimeoutError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    found = doctor._hub()
    assert not found.fine and "TimeoutError" in found.found and "demo" in found.remedy


def test_tasks_are_listed_with_texts_labels_and_metrics(capsys):
    assert main(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(task_names())
    details = lines[next(i for i, line in enumerate(lines) if line.startswith("stsb")) + 1]
    assert details.split("; ") == [f"{'':17s}sentence1 and sentence2", "pearson", "allowed are numbers from 0 to 5"]


def test_the_version_stands_once(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"pyro-blora {__version__}\n"
