"""What is loaded is what was meant: no code of a folder's, no file of another run, no cache that was damaged."""

import json
import shutil

import pytest
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import load
from pyro_blora.__main__ import main
from pyro_blora.registry import Registry, only_code
from pyro_blora.run import train_run

pytestmark = pytest.mark.usefixtures("eager")
MARKING = """
from pathlib import Path
Path(__file__).with_name("ran").touch()

def late(*arguments, **settings):
    raise RuntimeError("code of a folder ran")
"""
OWN_PRIOR = """
import torch
from pyro_blora.gates import Gates, NestedBernoulli

def late(layout):
    return Gates(*(NestedBernoulli.from_rate(torch.full(shape, 0.5)) for shape in (layout.z_shape, layout.g_shape)))
"""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory):
    """A finished run; tests change copies of it."""
    return train_run(tiny_config(backbone, output_dir=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def edit(path, **changes):
    """Change fields of a JSON file; None takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize("field", ["prior", "guide", "weights", "backbone", "prior.z", "prior.g"])
def test_no_code_runs_because_a_folder_names_it(run, tmp_path, capsys, field):
    (tmp_path / "mine.py").write_text(MARKING)
    name = f"{tmp_path}/mine.py:late"
    kind, _, site = field.partition(".")
    edit(run / "config.json", **({f"{kind}_settings": {site: name}} if site else {field: name}))
    with pytest.raises(ValueError, match=rf"config.json names code, {kind} .*mine.py:late.*allow_code=\["):
        load(run)
    with pytest.raises(ValueError, match="names code"):
        load(run, allow_code=[f"{tmp_path}/other.py:late", f"{tmp_path}/mine.py:early"])
    for command in (["show", run], ["report", run], ["what-if", run, "0.value.base.8", "closed"]):
        assert main([str(word) for word in command]) == 0, capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_code_that_is_named_again_runs(backbone, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN_PRIOR)
    folder = train_run(tiny_config(backbone, prior=f"{tmp_path}/mine.py:late", output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="names code"):
        load(folder)
    monkeypatch.chdir(tmp_path)
    for allowed in (["mine.py:late"], f"{tmp_path}/mine.py:late"):  # however its path is written
        assert load(folder, allow_code=allowed).prior().z.log_probs.exp().mean() == pytest.approx(0.6065, abs=1e-3)


def test_the_refusal_ends_with_its_block(tmp_path):
    (tmp_path / "mine.py").write_text("def late(): ...")
    registry, name = Registry("prior"), f"{tmp_path}/mine.py:late"
    with only_code([], tmp_path), pytest.raises(ValueError, match="names code"):
        registry.resolve(name)
    with only_code([name], tmp_path):
        assert registry.resolve(name) is registry.resolve(name)
    with only_code([], tmp_path), pytest.raises(ValueError, match="names code"):  # imported or not
        registry.resolve(name)
    assert callable(registry.resolve(name))
