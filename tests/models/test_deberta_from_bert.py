"""A BERT in DeBERTaV3's architecture computes what the BERT did, with disentangled attention switched on."""

import pytest
import torch
import transformers
from models import tiny_bert

from pyro_blora.models import backbone_path, load_backbone, load_tokenizer
from pyro_blora.models.deberta_from_bert import converted_folder, deberta_from_bert


@pytest.fixture(scope="module")
def minilm():
    return transformers.BertModel.from_pretrained(backbone_path("demo"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sentences():
    texts = ["a good film , and a long one", "no", "which of the two reads worse is hard to say " * 12]
    return load_tokenizer("demo")(texts, ["so it is"] * 3, padding=True, return_tensors="pt")


def hidden_states(model, inputs):
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states


def test_hidden_states_are_minilms(minilm, sentences):
    real = sentences["attention_mask"].bool()  # DeBERTa sets padding to zero, which nothing reads
    pairs = zip(hidden_states(deberta_from_bert(minilm), sentences), hidden_states(minilm, sentences), strict=True)
    for ours, theirs in pairs:
        assert (ours[real] - theirs[real]).abs().max() < 1e-5


def test_hidden_states_are_those_of_any_bert():
    bert = tiny_bert().bert.eval()
    inputs = {"input_ids": torch.randint(2, 100, (3, 40)), "attention_mask": torch.ones(3, 40, dtype=torch.long)}
    for ours, theirs in zip(hidden_states(deberta_from_bert(bert), inputs), hidden_states(bert, inputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_positions_pass_query_and_key_a_second_time(minilm, sentences):
    deberta, calls = deberta_from_bert(minilm), []
    for kind in ("query_proj", "key_proj", "value_proj"):
        projection = deberta.encoder.layer[0].attention.self.get_submodule(kind)
        projection.register_forward_hook(lambda module, args, output, kind=kind: calls.append((kind, *args[0].shape)))
    hidden_states(deberta, sentences)
    rows, tokens = sentences["input_ids"].shape
    content = [(kind, rows, tokens, 384) for kind in ("query_proj", "key_proj", "value_proj")]
    assert sorted(calls) == sorted([*content, ("query_proj", 1, 512, 384), ("key_proj", 1, 512, 384)])


def test_relative_positions_matter_once_the_gain_of_their_norm_does(minilm, sentences):
    deberta = deberta_from_bert(minilm)
    before = hidden_states(deberta, sentences)[-1]
    torch.nn.init.ones_(deberta.encoder.LayerNorm.weight)
    assert (hidden_states(deberta, sentences)[-1] - before).abs().max() > 1e-3


def test_it_is_made_once_and_loads_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRO_BLORA_CACHE", str(tmp_path))
    model, tokenizer = load_backbone("demo-deberta", 3), load_tokenizer("demo-deberta")
    assert model.config.model_type == "deberta-v2" and model.classifier.out_features == 3
    assert tokenizer("a good film")["input_ids"] == load_tokenizer("demo")("a good film")["input_ids"]
    (folder,) = (tmp_path / "deberta_from_bert").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert backbone_path("demo-deberta") == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    kept = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(kept[:-8] + b"12345678")  # damaged: it is made anew
    assert backbone_path("demo-deberta") == str(folder) and (folder / "model.safetensors").read_bytes() == kept


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYRO_BLORA_CACHE", str(tmp_path / "file"))
    folder = tmp_path / "bert"
    tiny_bert().bert.save_pretrained(folder)
    with pytest.raises(ValueError, match="PYRO_BLORA_CACHE"):
        converted_folder(folder)
