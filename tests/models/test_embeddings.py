"""Tables of embeddings at few bits: the same in training, deployed and packed."""

import json

import pytest
import torch
from models import batch, tiny_bert, tiny_language_model
from packed_models import allocated
from safetensors.torch import load_file
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import export, load
from pyro_blora.__main__ import main
from pyro_blora.adapters import use_gates
from pyro_blora.deploy import pack
from pyro_blora.deploy.onnx_modules import in_onnx_operators
from pyro_blora.deploy.onnx_tables import CodedTable, put_codes
from pyro_blora.models.embeddings import bits_of, range_of, round_tables, tables
from pyro_blora.posterior import deployed
from pyro_blora.run import train_run
from pyro_blora.tasks.causal_lm import LANGUAGE_MODEL

pytestmark = pytest.mark.usefixtures("eager")


def rounded(bits):
    def build(dropout=0.1):
        model = tiny_bert(dropout=dropout)
        round_tables(model, bits)
        return model

    return build


@pytest.mark.parametrize("bits", [2, 8])
def test_every_row_is_on_a_grid_of_its_own(bits):
    model, before = tiny_bert(), tiny_bert()
    round_tables(model, bits)
    assert bits_of(model) == bits and bits_of(before) == 32
    for (name, table), (_, as_it_was) in zip(tables(model), tables(before), strict=True):
        x, own = table.weight, as_it_was.weight
        step = 2 * range_of(own) / (2**bits - 1)
        torch.testing.assert_close(x / step, (x / step).round(), atol=1e-3, rtol=0)
        assert max(len(row.unique()) for row in x) <= 2**bits - 1, name
        assert bool(((x - own).abs() <= step / 2 + 1e-7).all()), name


def test_a_head_that_shares_a_table_is_rounded_with_it():
    model = tiny_language_model(tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    round_tables(model, 4)
    assert model.lm_head.weight is model.get_input_embeddings().weight and len([*tables(model)]) == 1
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("build", [rounded(8), rounded(3)])
def test_a_packed_model_has_the_tables_that_were_trained_on(build, tmp_path):
    program, inputs = allocated(build, scope="encoder"), batch(3, 9)[0]
    folder = pack(program, tmp_path / "packed")
    with torch.no_grad(), use_gates(program.net, *deployed(program), exact=True):
        assert torch.equal(load(folder)(**inputs).logits, program.net.logits(**inputs))
    bits, content = bits_of(program.net), json.loads((folder / "packed.json").read_text())
    codes = {name: x for name, x in load_file(folder / "packed.safetensors").items() if name.endswith("weight.codes")}
    assert {f"{name}.codes" for name in content["embeddings"]} == {*codes} and len(codes) == 3
    for name, entry in content["embeddings"].items():
        rows, columns = entry["shape"]
        assert entry["bits"] == bits and codes[f"{name}.codes"].numel() == -(-rows * columns * bits // 8)
    assert f"**Embeddings** have {bits} bit in the run" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("scope", "coded"), [("encoder", False), ("encoder+head", True)])
def test_an_onnx_file_has_codes_of_a_table_that_its_head_does_not_share(scope, coded, tmp_path):
    model = tiny_language_model(tie_word_embeddings=True)
    round_tables(model, 8)
    program = allocated(lambda dropout: model, target_modules=["q_proj"], scope=scope, head=LANGUAGE_MODEL)
    packed = load(pack(program, tmp_path / "packed"))
    ids, table = batch(2, 5)[0]["input_ids"], packed.get_input_embeddings()
    in_onnx_operators(packed)
    put_codes(packed, program.net.backbone)
    found = packed.get_input_embeddings()
    assert (type(found) is CodedTable) == coded and torch.equal(found(ids), table(ids))


def test_fewer_bits_than_in_the_run_give_up_the_equality(tmp_path):
    program = allocated(rounded(8), scope="encoder")
    card = (pack(program, tmp_path / "packed", embeddings=4) / "README.md").read_text()
    assert "its embeddings have 4 bit, row by row, which the run's have not" in card
    same, asked = (load(pack(program, tmp_path / str(bits), embeddings=bits)) for bits in (32, 8))
    inputs = batch(2, 7)[0]
    assert torch.equal(same(**inputs).logits, asked(**inputs).logits)


def test_a_run_keeps_them(tmp_path, capsys):
    backbone = save_tiny_backbone(tmp_path / "tiny")
    config = tiny_config(backbone, embedding_bits=4, max_train=32, epochs=1, draws=1, output_dir=str(tmp_path / "runs"))
    assert config.digest != tiny_config(backbone, max_train=32, epochs=1, draws=1).digest
    run = train_run(config)
    table = load(run).net.backbone.get_input_embeddings().weight
    assert max(len(row.unique()) for row in table) <= 15
    adapter = export(load(run), tmp_path / "adapter", config=config)
    assert "PEFT leaves them at 32 bit" in (adapter / "README.md").read_text()
    assert torch.equal(load(adapter, backbone=backbone).net.backbone.get_input_embeddings().weight, table)
    line = ["train", "--task", "acceptability", "--backbone", str(backbone), "--output_dir", str(tmp_path / "others"),
            "--max_length", "16", "--embedding_bits"]  # fmt: skip
    assert main([*line, "8", "--method", "full"]) == 2
    assert "which would not stay rounded: drop --embedding_bits" in capsys.readouterr().err
    assert main([*line, "1"]) == 2
    assert "embedding_bits must be 2 to 16, or 32, got 1" in capsys.readouterr().err


def test_a_model_without_a_table_is_refused():
    with pytest.raises(ValueError, match="no table of embeddings to round: drop --embedding_bits"):
        round_tables(torch.nn.Linear(2, 2), 8)
