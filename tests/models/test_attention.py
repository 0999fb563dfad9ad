"""softmax1: its values, in which models it is put, and that what was trained with it comes back with it."""

import pytest
import torch
import transformers
from models import batch, tiny_bert, tiny_deberta, tiny_distilbert, tiny_llama, tiny_roberta
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import export, load
from pyro_blora.__main__ import main
from pyro_blora.deploy.draw_tree import export_draws
from pyro_blora.deploy.merged import merge
from pyro_blora.models import layout_of, load_backbone, set_attention
from pyro_blora.models.attention import attention_of, softmax1
from pyro_blora.posterior.draws import deployed
from pyro_blora.training import fit

pytestmark = pytest.mark.usefixtures("eager")


def test_it_is_a_softmax_with_one_more_score_of_zero_and_stays_finite():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(softmax1(x), x.exp() / (1 + x.exp().sum(-1, keepdim=True)))
    assert torch.autograd.gradcheck(softmax1, (x,))
    far = torch.tensor([[1e4, 0.0], [-1e4, -1e4], [torch.finfo(torch.float32).min] * 2])
    torch.testing.assert_close(softmax1(far), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("build", [tiny_bert, tiny_roberta, tiny_distilbert, tiny_llama])
def test_it_is_put_into_models_that_follow_transformers_interface(build):
    model, (inputs, _) = build().eval(), batch()
    with torch.no_grad():
        before = model(**inputs).logits
        set_attention(model, "softmax")
        assert torch.equal(model(**inputs).logits, before) and attention_of(model) == "softmax"
        set_attention(model)
        after = model(**inputs).logits
        assert attention_of(model) == "softmax1" and not torch.allclose(after, before, atol=1e-3)


def test_a_layer_attends_to_one_more_key_of_zero():
    """Score and value zero: the ordinary softmax over the keys and that one."""
    model = tiny_bert(num_hidden_layers=1).eval()
    layer, hidden = model.bert.encoder.layer[0].attention.self, torch.randn(2, 5, 32)
    set_attention(model)
    with torch.no_grad():
        found = layer(hidden)[0]
        q, k, v = (f(hidden).view(2, 5, 4, 8).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 32)
    torch.testing.assert_close(found, expected)


def test_bit_operations_are_counted_as_before():
    one, other = tiny_bert(), tiny_bert()
    set_attention(other)
    assert layout_of(one, sequence_length=10) == layout_of(other, sequence_length=10)


def test_a_model_with_an_attention_of_its_own_is_refused(tmp_path, capsys):
    model = tiny_deberta()
    with pytest.raises(ValueError, match="DebertaV2ForSequenceClassification computes its attention by itself"):
        set_attention(model)
    backbone = save_tiny_backbone(tmp_path / "backbone")
    model = tiny_deberta(vocab_size=len(transformers.AutoTokenizer.from_pretrained(backbone)))
    model.save_pretrained(backbone)
    assert main(["train", "--backbone", str(backbone), "--attention", "softmax1", "--output_dir", str(tmp_path)]) == 2
    assert "drop --attention, or choose a backbone like BERT" in capsys.readouterr().err
    assert main(["train", "--attention", "softmax2"]) == 2
    assert "unknown attention 'softmax2'" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["bayesian_lora", "full"])
def test_it_goes_out_and_in_with_what_was_trained(tmp_path, method):
    backbone = save_tiny_backbone(tmp_path / "backbone")
    config = tiny_config(backbone, attention="softmax1", method=method, max_train=16, epochs=1)
    trained = fit(config, quiet=True)
    folder = export(trained.program, tmp_path / "out", config=config, tokenizer=trained.parts.tokenizer)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pyro_blora.models.set_attention(" in card and "pipeline(" not in card
    assert "computes **another function**" in card
    if method != "full":
        with pytest.raises(ValueError, match="without the attention softmax1 that was trained"):
            merge(trained.program, tmp_path / "merged")
        card = (export_draws(trained.program, tmp_path / "draws", 1) / "README.md").read_text(encoding="utf-8")
        assert "pyro_blora.models.set_attention(backbone)" in card and "computes **another function**" in card
    loaded, inputs = load(folder, backbone=backbone), {"input_ids": torch.arange(4, 24).view(2, 10)}
    assert attention_of(loaded.net.backbone) == "softmax1"
    with torch.no_grad():
        answers = [program.cpu().eval().logits(inputs, deployed(program)) for program in (trained.program, loaded)]
    assert torch.equal(*answers)
    assert attention_of(load_backbone(str(backbone), 2)) == "softmax"
