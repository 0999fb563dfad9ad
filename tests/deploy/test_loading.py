"""What is loaded is what was meant: no code of a folder's, no file of another run, no cache that was damaged."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import sys

import pandas as pd
import pytest
import torch
from models import weighted_net, weighted_program
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import hub, save_tiny_backbone, tiny_config

from pyro_blora import fit, load
from pyro_blora.__main__ import main
from pyro_blora.build import build
from pyro_blora.checkpoint import read_tensors, write_tensors
from pyro_blora.config import RunConfig
from pyro_blora.deploy import export, export_draws, merge, pack
from pyro_blora.posterior import marginals
from pyro_blora.provenance import frozen_hash
from pyro_blora.registry import Registry
from pyro_blora.run import train_run
from pyro_blora.user_code import only_code

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
def pair(tmp_path_factory):
    """Two runs of two seeds, and their backbone; tests change copies of them."""
    folder = tmp_path_factory.mktemp("pair")
    config = tiny_config(save_tiny_backbone(folder / "backbone"), output_dir=str(folder), max_train=32, epochs=1)
    return *(train_run(dataclasses.replace(config, seed=seed)) for seed in (0, 1)), folder / "backbone"


@pytest.fixture
def run(pair, tmp_path):
    """A finished run that a test may change."""
    return shutil.copytree(pair[0], tmp_path / "run")


def edit(path, **changes):
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("field", ["guide", "weights", "backbone"])
def test_no_code_runs_because_a_folder_names_it(run, tmp_path, capsys, field):
    (tmp_path / "mine.py").write_text(MARKING)
    name = f"{tmp_path}/mine.py:late"
    rename(run, {field: name})
    with pytest.raises(ValueError, match=rf"names code, {field} .*mine.py:late.*allow_code=\[.*--allow_code .*late"):
        load(run)
    with pytest.raises(ValueError, match="names code"):
        load(run, allow_code=[f"{tmp_path}/other.py:late", f"{tmp_path}/mine.py:early"])
    commands = (["show", run], ["report", run], ["what-if", run, "0.value.base.8", "closed"])
    for command in commands if field == "guide" else commands[:1]:
        assert main([str(word) for word in command]) == 0, capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("field", ["task", "ood_task", "prior", "prior.z", "prior.g"])
def test_what_is_loaded_without_its_code_is_not_run_either(run, tmp_path, field):
    (tmp_path / "mine.py").write_text(MARKING)
    name = f"{tmp_path}/mine.py:late"
    before, (_, _, site) = load(run), field.partition(".")
    rename(run, {"prior_settings": {site: name}} if site else {field: name})
    model = load(run)
    for mine, theirs in zip(model.prior(), before.prior(), strict=True):
        assert torch.equal(mine.log_probs, theirs.log_probs)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(RuntimeError, match="code of a folder ran") if "prior" in field else contextlib.nullcontext():
        load(run, allow_code=[name])


def rename(run, fields):
    """Name other parts in config.json, and write its hash: whoever writes the one can write the other."""
    edit(run / "config.json", **fields)
    gates = run / "adapter" / "gates.safetensors"
    tensors, notes = read_tensors(gates)
    write_tensors(gates, tensors, notes | {"config": RunConfig.from_json(run / "config.json").digest})


def test_code_that_is_named_again_runs(backbone, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN_PRIOR)
    folder = train_run(tiny_config(backbone, prior=f"{tmp_path}/mine.py:late", output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="was edited or moved"):
        (tmp_path / "mine.py").write_text(f"{OWN_PRIOR}\n")
        load(folder, allow_code=[f"{tmp_path}/mine.py:late"])
    (tmp_path / "mine.py").write_text(OWN_PRIOR)
    monkeypatch.chdir(tmp_path)
    for allowed in (["mine.py:late"], f"{tmp_path}/mine.py:late"):  # however its path is written
        assert load(folder, allow_code=allowed).prior().z.log_probs.exp().mean() == pytest.approx(0.6065, abs=1e-3)


def test_the_hash_of_code_is_of_what_ran_not_of_what_it_became(backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, settings = tmp_path / "mine.py", {"allow_code": ["mine.py:late"], "backbone": backbone}
    file.write_text(OWN_PRIOR)
    config = tiny_config(backbone, prior="mine.py:late", max_train=16, epochs=1)
    program = fit(config, quiet=True).program
    file.write_text(f"{OWN_PRIOR}\n")  # while it trains
    export(program, tmp_path / "adapter", config=config)
    with pytest.raises(ValueError, match="names code that was edited"):
        load(tmp_path / "adapter", **settings)
    file.write_text(OWN_PRIOR)
    assert load(tmp_path / "adapter", **settings).prior().z.log_probs.exp().mean() == pytest.approx(0.6065, abs=1e-3)


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


def flipped(path, place=-3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def of_other(name):
    """Put a file of a run that differs in nothing but its seed in the place of this run's."""
    return lambda run, other, backbone: shutil.copy(other / name, run / name)


def other_backbone(run, other, backbone):
    weights = load_file(backbone / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][3, 4] += 1e-3
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})


def other_notes(run, other, backbone):
    path = run / "adapter" / "gates.safetensors"
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()["notes"]
    assert '"n_train": "32"' in notes
    save_file(load_file(path), path, metadata={"notes": notes.replace('"n_train": "32"', '"n_train": "64"')})


MIXED = {
    "gates": (of_other("adapter/gates.safetensors"), "config.json is not that of .*gates.safetensors"),
    "config": (of_other("config.json"), "config.json is not that of .*gates.safetensors"),
    "adapter": (of_other("adapter/adapter_model.safetensors"), "the adapter in .* is not that of gates.safetensors"),
    "flipped gates": (
        lambda run, *_: flipped(run / "adapter/gates.safetensors"),
        "is damaged .*restore the run folder",
    ),
    "flipped vocabulary": (
        lambda run, *_: flipped(run / "adapter/tokenizer.json", place=200),
        "the adapter in .* is not",
    ),
    "flipped adapter": (lambda run, *_: flipped(run / "adapter/adapter_model.safetensors"), "the adapter in .* is not"),
    "edited ranks": (
        lambda run, *_: edit(run / "adapter/adapter_config.json", rank_pattern={}),
        "the adapter in .* is not",
    ),
    "edited config": (lambda run, *_: edit(run / "config.json", alpha=4.0), "config.json is not that of"),
    "edited notes": (other_notes, "is damaged"),
    "backbone": (other_backbone, "is not the one that the run was trained on, its weights differ: restore it"),
}


@pytest.mark.parametrize("case", MIXED)
def test_files_that_do_not_belong_together_are_refused(pair, run, case):
    _, other, backbone = pair
    kept = (backbone / "model.safetensors").read_bytes()
    change, message = MIXED[case]
    assert load(run).n_train == 32
    try:
        change(run, other, backbone)
        with pytest.raises(ValueError, match=message):
            load(run)
    finally:
        (backbone / "model.safetensors").write_bytes(kept)


def test_where_the_backbone_is_kept_is_the_users_to_change(run):
    edit(run / "adapter" / "adapter_config.json", base_model_name_or_path="elsewhere", revision="v1")
    (run / "adapter" / "README.md").write_text("mine")
    assert load(run).n_train == 32


def test_an_older_export_is_loaded_with_a_warning(run):
    path = run / "adapter" / "gates.safetensors"
    tensors, notes = read_tensors(path)
    save_file(tensors, path, metadata={key: notes[key] for key in ("layout", "n_train")})
    with pytest.warns(UserWarning, match="older than the hashes"):
        assert load(run).n_train == 32


def test_a_run_is_loaded_from_the_commit_that_it_was_trained_on(backbone, tmp_path, monkeypatch):
    hub(tmp_path, monkeypatch, [("main", "a" * 40, backbone)])
    folder = train_run(tiny_config("someone/tiny", output_dir=str(tmp_path)))
    hub(tmp_path, monkeypatch, [("main", "b" * 40, save_tiny_backbone(tmp_path / "other", seed=1))])
    assert load(folder).net.backbone.config._commit_hash == "a" * 40
    edit(folder / "config.json", versions={"backbone": "b" * 40})
    with pytest.raises(ValueError, match="its weights differ"):
        load(folder)


def test_the_hash_of_frozen_weights_is_of_those_that_are_read():
    """Not of PEFT's copy of the untrained head, which is drawn, and not alike on every processor."""
    program = weighted_program(weighted_net("lora"))
    before, named = frozen_hash(program), dict(program.net.named_parameters())
    copies = [p for name, p in named.items() if ".original_module." in name]
    assert copies
    with torch.no_grad():
        for p in copies:
            p.add_(1e-3)
        assert frozen_hash(program) == before
        next(p for name, p in named.items() if "intermediate.dense.weight" in name)[0, 0] += 1e-6
    assert frozen_hash(program) != before


@pytest.fixture(scope="module")
def without_pooler(backbone, tmp_path_factory):
    """As training on masked words leaves a BERT."""
    folder = shutil.copytree(backbone, tmp_path_factory.mktemp("masked") / "backbone")
    weights = load_file(folder / "model.safetensors")
    kept = {key: x for key, x in weights.items() if ".pooler." not in key}
    assert len(kept) == len(weights) - 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_on_another_processor(monkeypatch):
    """Random numbers of one seed differ between processors: from here on by those of another seed."""
    seeded = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeded(seed + 1))


@pytest.mark.parametrize("frozen", [False, True], ids=["learns", "of an older run"])
def test_a_new_pooler_learns_and_is_read_from_the_run(without_pooler, tmp_path, monkeypatch, frozen):
    before = "pyro_blora.adapters.lora.freeze_pooler"
    with monkeypatch.context() as patch:
        if frozen:  # as it was: whether the checkpoint has it or not
            patch.setattr(before, lambda model: model.base_model.model.bert.pooler.requires_grad_(False) and model)
        config = tiny_config(without_pooler, output_dir=str(tmp_path), max_train=32, epochs=1)
        start = build(config).program.state_dict()
        folder = train_run(config)
    as_on_another_processor(monkeypatch)
    program = load(folder)
    pooler = {name: p for name, p in program.named_parameters() if ".pooler.modules_to_save." in name}
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(pooler) == 2
    for name, p in pooler.items():
        assert p.requires_grad is not frozen
        assert torch.equal(p, saved[f"base_model.model.bert.pooler.dense.{name.rpartition('.')[2]}"])
        assert torch.equal(p, start[name]) is frozen
    tensors = read_tensors(folder / "adapter" / "gates.safetensors")[0]
    assert any(".pooler." in name for name in tensors) is not frozen


def test_a_new_pooler_is_resumed_on_another_processor(without_pooler, tmp_path, monkeypatch):
    config = tiny_config(without_pooler)
    fit(config, folder=tmp_path, quiet=True)
    checkpoints = tmp_path / "checkpoints"
    shutil.copy(checkpoints / "state.safetensors", tmp_path / "state.safetensors")
    as_on_another_processor(monkeypatch)
    resumed = fit(config, folder=tmp_path, quiet=True)
    state = read_tensors(tmp_path / "state.safetensors")[0]
    assert sum(".pooler." in key for key in state) == 3 * 2 + 2  # weight, bias: value, 2 moments, steps
    found = dict(resumed.program.named_parameters())
    for name, p in found.items():
        if p.requires_grad:
            assert torch.equal(p.detach(), state[f"parameter/{name}"])


REGISTERED = """
import torch
from pyro_blora.gates import Gates, NestedBernoulli
from pyro_blora.registries import register_prior

@register_prior
def late71(layout):
    return Gates(*(NestedBernoulli.from_rate(torch.full(shape, 0.5)) for shape in (layout.z_shape, layout.g_shape)))
"""


@pytest.fixture
def cell(tmp_path, monkeypatch, forget):
    """Runs a text as a notebook's cell does, whose source `inspect` finds; the former one's functions are replaced."""

    def ran(text):
        path = tmp_path / f"cell-{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"
        path.write_text(text)
        exec(compile(text, str(path), "exec"), vars(sys.modules["__main__"]))

    return ran


def test_a_registered_prior_that_was_edited_is_replaced_by_what_it_was(backbone, tmp_path, cell):
    cell(REGISTERED)
    config = tiny_config(backbone, prior="late71", max_train=32, epochs=1, output_dir=str(tmp_path / "runs"))
    folder = train_run(config)
    whole = load(folder)
    cell(REGISTERED.replace("0.5", "5.0"))
    with pytest.warns(UserWarning, match="prior 'late71' is not the one of the training any more, its code was edited"):
        edited = load(folder)
    for one, other in zip(marginals(edited), marginals(whole), strict=True):
        torch.testing.assert_close(one, other)
    pd.testing.assert_frame_equal(edited.predict(["the dog"]), whole.predict(["the dog"]))


def test_a_training_is_not_resumed_under_an_edited_part(backbone, tmp_path, cell):
    cell(REGISTERED)
    config = tiny_config(backbone, prior="late71", max_train=32)
    fit(config, folder=tmp_path / "run", until=2)
    cell(REGISTERED.replace("0.5", "5.0"))
    with pytest.raises(ValueError, match="is of other code: a part that is registered has been edited since"):
        fit(config, folder=str(tmp_path / "run"))
    cell(REGISTERED)
    assert len(fit(config, folder=tmp_path / "run").metrics) == 4


@pytest.mark.parametrize("writer", [export, merge, functools.partial(export_draws, draws=1), pack])
def test_the_home_folder_is_where_it_is(run, tmp_path, monkeypatch, writer):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    model = load(run)
    assert writer(model, "~/out") == tmp_path / "home" / "out" and not (tmp_path / "~").exists()
    shutil.copytree(run, tmp_path / "home" / "run")
    assert load("~/run").n_train == model.n_train
