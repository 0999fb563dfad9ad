"""A packed model predicts what the deployed allocation predicts, to the bit, in as many bits as were learned."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from models import batch, tiny_bert, tiny_deberta, tiny_distilbert, tiny_llama, tiny_roberta
from packed_models import allocated
from safetensors.torch import load_file
from tiny import save_tiny_backbone

from pyro_blora import load
from pyro_blora.adapters import use_gates
from pyro_blora.bops import expected_bits
from pyro_blora.deploy import pack
from pyro_blora.deploy.packed import MANIFEST, WEIGHTS
from pyro_blora.gates import Gates
from pyro_blora.posterior import deployed

pytestmark = pytest.mark.usefixtures("eager")


def logits(program, inputs):
    with torch.no_grad(), use_gates(program.net, *deployed(program), exact=True):
        return program.net.logits(**inputs)


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (tiny_bert, {"scope": "encoder"}),
        (tiny_bert, {"scope": "encoder", "share_inputs": True}),
        (tiny_bert, {"scope": "encoder", "granularity": "channel", "ladder": (2, 3, 4, 6, 8, 16, 32)}),
        (tiny_bert, {"scope": "encoder", "smoothing": True, "share_inputs": True}),
        (tiny_bert, {"scope": "encoder", "smoothing": True, "granularity": "channel"}),
        (tiny_bert, {"adapter": "xs"}),
        (tiny_bert, {"adapter": "none", "scope": "encoder"}),
        (lambda dropout: tiny_deberta(dropout=dropout), {"scope": "encoder", "smoothing": True}),
        (lambda dropout: tiny_roberta(), {"scope": "encoder"}),
        (lambda dropout: tiny_distilbert(), {}),
        (lambda dropout: tiny_llama(), {"target_modules": ["q_proj", "v_proj"], "scope": "encoder"}),
    ],
    ids=[
        "bert",
        "shared-inputs",
        "channels",
        "smoothed-shared-inputs",
        "smoothed-channels",
        "xs",
        "full",
        "deberta",
        "roberta",
        "distilbert",
        "llama",
    ],
)
def test_logits_are_those_of_the_deployed_allocation(build, settings, tmp_path):
    program = allocated(build, **settings)
    model = load(pack(program, tmp_path / "packed"))
    inputs = batch(3, 9)[0]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits(program, inputs))
    assert type(model) is type(program.net.backbone) and not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_tensors_are_where_torch_puts_its_own(tmp_path):
    """In a file they are not; a product in float32 with one row may then differ in its last bit."""
    model = load(pack(allocated(tiny_bert, scope="encoder"), tmp_path / "packed"))
    assert all(x.data_ptr() % 64 == 0 for x in model.state_dict().values())


def test_what_smooths_is_stored_and_needs_a_reader_that_knows_it(tmp_path):
    program = allocated(tiny_bert, scope="encoder", smoothing=True)
    folder, plain = pack(program, tmp_path / "packed"), pack(allocated(tiny_bert), tmp_path / "plain")
    assert [json.loads((each / MANIFEST).read_text())["version"] for each in (folder, plain)] == [2, 1]
    tensors = load_file(folder / WEIGHTS)
    for projection, scale in zip(program.layout.projections, program.net.smoothing.scales(), strict=True):
        assert torch.equal(tensors[f"{projection.name}.smoothing"], scale)


def test_nothing_is_smoothed_where_nothing_is_rounded(tmp_path):
    program = allocated(tiny_bert, scope="encoder", smoothing=True)
    gates = Gates(*(torch.ones_like(each) for each in deployed(program)))
    program.gate_guide.deployed = lambda: gates
    folder, inputs = pack(program, tmp_path / "packed"), batch(3, 9)[0]
    assert not any(name.endswith(".smoothing") for name in load_file(folder / WEIGHTS))
    with torch.no_grad():
        assert torch.equal(load(folder)(**inputs).logits, logits(program, inputs))


def test_what_smooths_is_in_a_merged_base(tmp_path):
    program = allocated(tiny_bert, smoothing=True)
    z, g = deployed(program)
    gates = Gates(torch.ones_like(z), g)
    gates.z[..., -1] = 0  # 16 bit: a merged sum is rounded at little error
    program.gate_guide.deployed = lambda: gates
    model, inputs = load(pack(program, tmp_path / "packed", merged=True)), batch(3, 9)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits(program, inputs), rtol=0, atol=1e-3)


def test_every_width_takes_its_bits_on_the_disk(tmp_path):
    program = allocated(lambda dropout: tiny_bert(num_hidden_layers=4), scope="encoder")
    folder = pack(program, tmp_path / "packed")
    tensors, content = load_file(folder / WEIGHTS), json.loads((folder / MANIFEST).read_text())
    bits = expected_bits(program.layout, deployed(program).z)
    seen = set()
    for projection, widths in zip(program.layout.projections, bits, strict=True):
        entry = content["projections"][projection.name]
        of_tensors = dict(zip(program.layout.tensors, widths.tolist(), strict=True))
        assert entry["bits"] == {name: of_tensors[name] for name in entry["bits"]}
        numbers = projection.in_features * projection.out_features
        stored = tensors[f"{projection.name}.base"]
        assert stored.numel() * stored.element_size() * 8 == numbers * entry["bits"]["base"]
        seen.add(entry["bits"]["base"])
        if projection.adapted:
            up = tensors[f"{projection.name}.lora_B"]
            assert (
                up.numel() * up.element_size() * 8 == entry["open"] * projection.out_features * entry["bits"]["lora_B"]
            )
    assert seen == {2, 4, 8, 16, 32}
    assert content["files"][WEIGHTS]["bytes"] == (folder / WEIGHTS).stat().st_size


def test_a_folder_that_refers_to_its_base_has_only_what_that_lacks(tmp_path):
    backbone = save_tiny_backbone(tmp_path / "tiny")
    program = allocated(
        lambda dropout: transformers.AutoModelForSequenceClassification.from_pretrained(backbone),
        scope="encoder",
        smoothing=True,
    )
    whole, folder = pack(program, tmp_path / "whole"), pack(program, tmp_path / "packed", reference=True)
    content = json.loads((folder / MANIFEST).read_text())
    assert content["base"]["name"] == "tiny" and str(tmp_path) not in (folder / MANIFEST).read_text()
    assert (folder / WEIGHTS).stat().st_size < 0.5 * (whole / WEIGHTS).stat().st_size
    inputs = batch(3, 9)[0]
    with torch.no_grad():
        assert torch.equal(load(folder, backbone=backbone)(**inputs).logits, load(whole)(**inputs).logits)
    with pytest.raises(ValueError, match=r"the base 'tiny' could not be read .*load\(FOLDER, backbone=PATH\)"):
        load(folder)
    tiny_bert(seed=1, vocab_size=program.net.backbone.config.vocab_size).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other' is not the base that was exported, its weights differ"):
        load(folder, backbone=tmp_path / "other")


CODE = """
import sys, torch
from pyro_blora import load
model = load(sys.argv[1])
rows = torch.arange(2, 22).view(2, 10)
torch.save(model(input_ids=rows).logits, sys.argv[2])
print([name for name in ("pyro", "peft") if name in sys.modules])
"""


def test_a_fresh_process_needs_neither_pyro_nor_peft(tmp_path):
    program = allocated(tiny_bert, scope="encoder")
    folder = pack(program, tmp_path / "packed")
    command = [sys.executable, "-c", CODE, str(folder), str(tmp_path / "found.pt")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.strip() == "[]", done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert torch.equal(found, logits(program, {"input_ids": torch.arange(2, 22).view(2, 10)}))


def test_what_cannot_be_packed_is_refused_and_leaves_nothing(tmp_path):
    program = allocated(tiny_bert)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists already: give another folder"):
        pack(program, tmp_path / "there")
    with pytest.raises(ValueError, match="no name to refer to"):
        pack(program, tmp_path / "packed", reference=True)
    program.net.backbone.__class__ = type("Own", (type(program.net.backbone),), {})
    with pytest.raises(ValueError, match="Own is no model of transformers"):
        pack(program, tmp_path / "packed")
    program = allocated(tiny_bert, adapter="adalora")
    with pytest.raises(ValueError, match="quantizes nothing"):
        pack(program, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
