"""A run is of the files and folders that it read: a hash of each tells when they have changed."""

import json

import datasets
import pytest

from pyro_blora.config import RunConfig
from pyro_blora.config.data_files import KEY, data_hashes, require_same_data
from pyro_blora.config.naming import OUR_BACKBONES, is_local
from pyro_blora.models import names
from pyro_blora.tasks.glue import RELEASES


def finished(folder, config):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({KEY: data_hashes(config)}))
    return folder


def changed(folder, config):
    with pytest.raises(ValueError, match="as it was before it changed: give another --output_dir"):
        require_same_data(folder, config)


def test_a_folder_of_datasets_is_known_by_what_is_in_it(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    rows.save_to_disk(tmp_path / "data")
    config = RunConfig(task="files", task_settings={"data": str(tmp_path / "data")})
    run = finished(tmp_path / "run", config)
    (tmp_path / "data" / "cache-1.arrow").write_bytes(b"0")
    (tmp_path / "data" / ".DS_Store").write_bytes(b"0")
    require_same_data(run, config)
    rows.map(lambda row: {"label": 1 - row["label"]}).save_to_disk(tmp_path / "other")
    (tmp_path / "data").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "data")
    changed(run, config)


def test_the_files_of_pairs_are_known_by_what_is_in_them(tmp_path):
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text("first,second,label\na,b,yes\nc,d,no\n")
    config = RunConfig(task="pairs", glue_dir=str(tmp_path))
    run = finished(tmp_path / "run", config)
    require_same_data(run, config)
    (tmp_path / "dev.csv").write_text("first,second,label\na,b,no\nc,d,no\n")
    changed(run, config)


def test_a_release_of_glue_is_known_by_the_folder_of_its_task(tmp_path):
    for name in ("SST-2", "CoLA", "RTE"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.tsv").write_text("sentence\tlabel\na\t0\n")
    config = RunConfig(task="sst2", ood_task="cola", glue_dir=str(tmp_path))
    run = finished(tmp_path / "run", config)
    (tmp_path / "RTE" / "train.tsv").write_text("another task's")
    require_same_data(run, config)
    for name in ("SST-2", "CoLA"):
        before = (tmp_path / name / "train.tsv").read_text()
        (tmp_path / name / "train.tsv").write_text("sentence\tlabel\na\t1\n")
        changed(run, config)
        (tmp_path / name / "train.tsv").write_text(before)
        require_same_data(run, config)


def test_folders_of_the_release_are_named_as_their_tasks():
    """By which rule their files are found."""
    assert {name: release.folder.lower().replace("-", "") for name, release in RELEASES.items()} == {
        name: name for name in RELEASES
    }


def test_a_backbone_in_a_folder_is_known_by_what_is_in_it(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"1")
    config = RunConfig(backbone=str(tmp_path / "bert"))
    run = finished(tmp_path / "run", config)
    require_same_data(run, config)
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"2")
    changed(run, config)


def test_what_is_no_flag_for_data_is_a_word(tmp_path, monkeypatch):
    """`--text text` names a column, whatever folder of that name there is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "file").write_text("1")
    (tmp_path / "data.csv").write_text("text,label\na,0\n")
    found = data_hashes(RunConfig(task="files", task_settings={"data": "data.csv", "text": "text"}))
    assert list(found) == ["data"]


def test_runs_from_before_folders_had_a_hash_are_still_theirs(tmp_path):
    config = RunConfig(task="pairs", glue_dir=str(tmp_path))
    (tmp_path / "dev.csv").write_text("first,second,label\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    require_same_data(tmp_path / "run", config)


def test_a_folder_of_the_users_that_is_called_demo_is_no_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    assert OUR_BACKBONES == (names.DEMO, names.DEMO_DEBERTA, names.DEMO_DECODER)
    assert data_hashes(RunConfig(backbone="demo")) == {} and not is_local("demo")
    assert "backbone" in data_hashes(RunConfig(backbone="./demo"))
