"""Backbones and tokenizers: what is loaded is the pretrained encoder that was meant, or it is refused in a sentence."""

import json
import shutil

import pytest
import torch
import transformers
from models import tiny_bert, tiny_distilbert
from safetensors.torch import load_file, save_file
from tiny import hub, save_tiny_backbone, tiny_config

from pyro_blora import fit
from pyro_blora.__main__ import main
from pyro_blora.build import build
from pyro_blora.models import commit_of, load_backbone, load_tokenizer
from pyro_blora.run import train_run
from pyro_blora.tasks.categorical import Categorical

pytestmark = pytest.mark.usefixtures("eager")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "backbone")


def weights_as(change):
    """Rewrite the weights by a function of the dictionary of tensors."""

    def damage(folder):
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def config_as(**changes):
    def damage(folder):
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def number(value):
    def change(tensors):
        tensors["bert.encoder.layer.1.output.dense.weight"][3, 4] = value
        return tensors

    return change


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_words(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def other_language(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word if i < 4 else f"{word}ski": i for word, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def longer(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["a_word_more"])
    tokenizer.save_pretrained(folder)


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def with_code(folder):
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    config_as(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})(folder)


DAMAGE = {
    "renamed": (
        weights_as(
            lambda tensors: {key.replace("encoder.layer.1", "encoder.strata.1"): x for key, x in tensors.items()}
        ),
        r"bert\.encoder\.layer\.1\S+, \S+, \S+ and 13 more are missing; bert\.encoder\.strata",
    ),
    "renamed above": (
        weights_as(lambda tensors: {key.replace("bert.encoder", "bert.stack"): x for key, x in tensors.items()}),
        r"bert\.encoder\.layer\.0\S+, \S+, \S+ and 29 more are missing; the file has bert\.stack",
    ),
    "missing": (
        weights_as(lambda tensors: {key: x for key, x in tensors.items() if not key.endswith("0.output.dense.bias")}),
        r"config\.json: bert\.encoder\.layer\.0\.output\.dense\.bias is missing\. Only",
    ),
    "fewer layers": (config_as(num_hidden_layers=1), r"layer\.1\S+, \S+, \S+ and 13 more are of no layer"),
    "another size": (config_as(intermediate_size=128), "are of another shape"),
    "truncated": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:9000]), "are damaged"),
    "nan": (weights_as(number(float("nan"))), r"no finite numbers \(bert\.encoder\.layer\.1\.output\.dense\.weight\)"),
    "inf": (weights_as(number(float("inf"))), "no finite numbers"),
    "pickle": (pickled, "weights in a pickle, pytorch_model.bin.* save_pretrained"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "could not be loaded"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{ not"), "could not be loaded"),
    "wrong types": (config_as(hidden_size="many"), "could not be loaded"),
    "no tokenizer": (without_tokenizer, r"has no tokenizer \(tokenizer.json or vocab.txt\): save that of its model"),
    "no words": (without_words, "has no words, only its 4 special tokens"),
    "other language": (other_language, "of the words of the training texts are unknown"),
    "longer tokenizer": (longer, r"has ids up to (\d+), its embedding \1 rows"),
    "code": (with_code, "needs code of its own, which is not run"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_folder_that_is_not_what_was_meant_is_refused_in_a_sentence(folder, tmp_path, capsys, case):
    damage, message = DAMAGE[case]
    damage(folder)
    output = tmp_path / "runs"
    code = main(
        ["train", "--backbone", str(folder), "--output_dir", str(output), "--max_train", "64", "--max_length", "32"]
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("pyro-blora: error:") and not output.exists()
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("saved", ["base", "masked", "pretraining", "other head", "fewer outputs"])
def test_the_head_and_the_pooler_may_be_new(tmp_path, saved):
    config = tiny_bert().config
    kinds = {
        "base": lambda: transformers.BertModel(config, add_pooling_layer=False),
        "masked": lambda: transformers.BertForMaskedLM(config), "fewer outputs": tiny_bert,
        "pretraining": lambda: transformers.BertForPreTraining(config),
        "other head": lambda: transformers.BertForTokenClassification(config),
    }  # fmt: skip
    model = kinds[saved]()
    model.save_pretrained(tmp_path)
    encoder = model.state_dict() if saved == "base" else model.bert.state_dict()
    loaded = load_backbone(str(tmp_path), Categorical(("a", "b", "c")))
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"} and loaded.classifier.out_features == 3
    found = loaded.bert.state_dict()
    assert len(encoder) > 30 and all(torch.equal(found[key], x) for key, x in encoder.items())


def test_an_adapter_or_a_run_is_answered_with_its_backbone(whole, tmp_path, capsys):
    run = train_run(tiny_config(whole, output_dir=str(tmp_path / "runs")))
    alone = shutil.copytree(run / "adapter", tmp_path / "adapter")  # PEFT's folder, without the run around it
    values = json.loads((alone / "adapter_config.json").read_text()) | {"base_model_name_or_path": "bert-base"}
    (alone / "adapter_config.json").write_text(json.dumps(values))
    remedy = "give --backbone the model that it adapts,"
    for backbone, message in (
        (alone, f"is an adapter, not a model: {remedy} bert-base"),
        (run / "adapter", f"is an adapter, not a model: {remedy} {whole}; pyro_blora.load({str(run)!r})"),
        (run, f"is a run's folder, not a model: {remedy} {whole}; pyro_blora.load({str(run)!r})"),
    ):
        assert main(["train", "--backbone", str(backbone)]) == 2
        assert message in capsys.readouterr().err


def test_the_commit_of_a_hub_name_is_recorded_and_can_be_pinned(whole, tmp_path, monkeypatch):
    old, new = "a" * 40, "b" * 40
    other = save_tiny_backbone(tmp_path / "other", seed=1)
    hub(tmp_path, monkeypatch, [("main", new, whole), ("v1", old, other)])
    model = load_backbone("someone/tiny", 2)
    assert commit_of(model) == new and torch.equal(
        model.classifier.weight, load_backbone(str(whole), 2).classifier.weight
    )
    assert commit_of(load_backbone(str(whole), 2)) is None
    newest, pinned = (
        tiny_config("someone/tiny", backbone_revision=one, output_dir=str(tmp_path)) for one in (None, "v1")
    )
    assert newest.folder_name != pinned.folder_name
    run = train_run(pinned)
    assert json.loads((run / "config.json").read_text())["versions"]["backbone"] == old
    assert len(load_tokenizer("someone/tiny", revision=old)) == len(load_tokenizer(str(whole)))
    with pytest.raises(ValueError, match="could not be loaded"):
        load_backbone("someone/tiny", 2, revision="v2")
    with pytest.raises(ValueError, match="not read from the hub: drop --backbone_revision v1"):
        load_tokenizer(str(whole), revision="v1")


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_of_the_hubs_is_read_for_its_tensors_only(folder, tmp_path, monkeypatch):
    pickled(folder)
    hub(tmp_path, monkeypatch, [("main", "c" * 40, folder)])
    assert load_backbone("someone/tiny", 2).classifier.out_features == 2
    (weights,) = (tmp_path / "hub").rglob("pytorch_model.bin")
    torch.save({"classifier.bias": Touch(tmp_path / "ran")}, weights)
    with pytest.raises(ValueError, match="a pickle that is damaged or holds code"):
        load_backbone("someone/tiny", 2)
    assert not (tmp_path / "ran").exists()


def with_token_types(folder, model):
    """The model beside a tokenizer that tells the texts of a pair apart."""
    save_tiny_backbone(folder, letters=True)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(str(folder))
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["one type", "distilbert", "bert"])
def test_token_types_are_left_out_where_the_model_has_one(tmp_path, data_dir, name):
    kinds = {"one type": lambda: tiny_bert(type_vocab_size=1), "distilbert": tiny_distilbert, "bert": tiny_bert}
    folder = with_token_types(tmp_path / "backbone", kinds[name]())
    config = tiny_config(folder, task="rte", glue_dir=str(data_dir / "glue"), max_train=32, epochs=1)
    columns = build(config).tokens["train"].column_names
    assert ("token_type_ids" in columns) == (name == "bert")
    assert fit(config, quiet=True).metrics[-1]["loss"] > 0


def test_a_token_type_without_an_embedding_is_refused(tmp_path, data_dir):
    folder = with_token_types(tmp_path / "backbone", tiny_bert(type_vocab_size=2))
    text = (folder / "tokenizer.json").read_text()
    assert '"type_id": 1' in text
    (folder / "tokenizer.json").write_text(text.replace('"type_id": 1', '"type_id": 2'))
    with pytest.raises(ValueError, match="gives token type 2, its model has 2"):
        build(tiny_config(folder, task="rte", glue_dir=str(data_dir / "glue")))


def test_a_functions_model_is_of_no_commit_of_the_hub(tmp_path):
    """Or `load` would look for it there."""
    (tmp_path / "own.py").write_text(
        "from models import tiny_bert\nfrom tiny import save_tiny_backbone\nimport transformers\n"
        "def own(num_labels):\n"
        "    model = tiny_bert(num_labels=num_labels)\n"
        "    model.config._commit_hash = 'abc'\n"
        f"    folder = save_tiny_backbone({str(tmp_path / 'tokenizer')!r})\n"
        "    return model, transformers.AutoTokenizer.from_pretrained(folder)\n"
    )
    assert commit_of(load_backbone(f"{tmp_path}/own.py:own", 2)) is None
