"""An exported adapter or ONNX model that is damaged ends in one sentence or predicts the same: never something else.

Packed folders: test_packed_safety.py. What only transformers or PEFT reads has the hashes of its files beside it.
"""

import shutil

import pytest
import torch
from damage import damage_and_read
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import export, fit
from pyro_blora.deploy.onnx_file import MANIFEST, MODEL, export_onnx
from pyro_blora.deploy.opening import load_to_predict
from pyro_blora.deploy.peft import GATES_FILE

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
