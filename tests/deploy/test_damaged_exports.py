"""An exported adapter or ONNX model that is damaged ends in one sentence or predicts the same: never something else.

Packed folders: test_packed_safety.py. What only transformers or PEFT reads has the hashes of its files beside it.
"""

import shutil

import pytest
import torch
from damage import damage_and_read
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import export, fit
from pyro_blora.__main__ import main
from pyro_blora.deploy.loaded_model import PREDICTIONS
from pyro_blora.deploy.onnx_file import MANIFEST, MODEL, export_onnx
from pyro_blora.deploy.opening import load_to_predict
from pyro_blora.deploy.peft import GATES_FILE
from pyro_blora.run import train_run

pytestmark = pytest.mark.usefixtures("eager")
FILES = {
    "peft": [GATES_FILE, "adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"],
    "onnx": [MANIFEST, MODEL, "README.md", "tokenizer.json"],
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def folders(backbone, tmp_path_factory):
    """By format."""
    place = tmp_path_factory.mktemp("exports")
    trained = fit(tiny_config(backbone, max_train=32, epochs=1), quiet=True)
    given = {"config": trained.parts.config, "tokenizer": trained.parts.tokenizer}
    export(trained.program, place / "peft", **given)
    pytest.importorskip("onnxscript", reason="ONNX: pip install 'pyro-blora[onnx]'")
    export_onnx(trained.program, place / "onnx", **given)
    return {name: place / name for name in FILES}


@pytest.mark.parametrize(("form", "name"), [(form, name) for form, names in FILES.items() for name in names])
def test_damaged_bytes_end_in_a_sentence_or_change_nothing(folders, backbone, form, name, tmp_path):
    def answers(folder):
        model = load_to_predict(folder, backbone=backbone if form == "peft" else None)
        return torch.tensor(model.predict(["the dog sees", "a cat"])["p_acceptable"].to_numpy())

    damage_and_read(shutil.copytree(folders[form], tmp_path / "copy"), name, answers, examples=12)


def test_a_run_whose_held_out_rows_are_damaged_is_not_exported_and_one_without_is_not_measured(
    backbone, tmp_path, capsys
):
    run = train_run(tiny_config(backbone, max_train=32, epochs=1, output_dir=str(tmp_path / "runs")))
    content = (run / PREDICTIONS).read_bytes()
    (run / PREDICTIONS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["export", str(run), "--to", str(tmp_path / "model"), "--quiet"]) == 2
    assert f"{PREDICTIONS} is not what the run wrote" in capsys.readouterr().err and not (tmp_path / "model").exists()
    (run / PREDICTIONS).unlink()
    assert main(["export", str(run), "--to", str(tmp_path / "model"), "--quiet"]) == 0
    assert "**Measured**" not in (tmp_path / "model" / "README.md").read_text()
