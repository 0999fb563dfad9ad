"""What an export says about itself: the labels of its outputs, its tokenizer, its backbone without a local path."""

import json
import re

import pandas as pd
import peft
import pytest
import torch
import transformers
from models import tiny_bert, weighted_net, weighted_program
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import load
from pyro_blora.checkpoint import read_tensors
from pyro_blora.deploy import export
from pyro_blora.deploy.verify import copied
from pyro_blora.models import backbone_path, load_backbone, public_name
from pyro_blora.run import train_run
from pyro_blora.tasks import get_task
from pyro_blora.tasks.categorical import Categorical

pytestmark = pytest.mark.usefixtures("eager")
LABELS = ("unacceptable", "acceptable")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Fine-tuned for the task before, with its labels the other way round."""
    folder = save_tiny_backbone(tmp_path_factory.mktemp("secret place") / "tiny")
    names = {"id2label": {0: "Acceptable", 1: "UNACCEPTABLE"}, "label2id": {"Acceptable": 0, "UNACCEPTABLE": 1}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **names).eval()
    texts = get_task("acceptability").load()["eval"]["sentence"]
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():  # both answers are given, and no row is close to the border between them
        margins = model(**inputs).logits.diff().squeeze(-1).sort().values[36:84]
        widest = margins.diff().argmax()
        model.classifier.bias[1] -= margins[widest : widest + 2].mean()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(backbone, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("runs"))
    settings = {"output_dir": output, "lr": 1e-7}  # as good as not trained: the answers are known to be of both kinds
    return {method: train_run(tiny_config(backbone, method=method, **settings)) for method in ("lora", "full")}


def test_a_head_with_the_tasks_labels_in_another_order_is_put_into_theirs(backbone):
    before = transformers.AutoModelForSequenceClassification.from_pretrained(backbone)
    after = load_backbone(str(backbone), Categorical(LABELS))
    assert after.config.id2label == dict(enumerate(LABELS)) and after.config.label2id["acceptable"] == 1
    inputs = {"input_ids": torch.arange(4, 24).view(2, 10)}
    with torch.no_grad():
        assert torch.equal(after.eval()(**inputs).logits, before.eval()(**inputs).logits.flip(-1))
    other = load_backbone(str(backbone), Categorical(("no", "yes")))  # another question: a start like any other
    assert torch.equal(other.classifier.weight, before.classifier.weight) and other.config.label2id == {
        "no": 0,
        "yes": 1,
    }


def test_an_order_of_three_labels_is_not_taken_for_its_inverse(tmp_path):
    before = tiny_bert(num_labels=3).eval()
    before.config.id2label = {0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"}
    before.save_pretrained(tmp_path)
    after = load_backbone(str(tmp_path), get_task("mnli").likelihood).eval()
    assert after.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    inputs = {"input_ids": torch.arange(4, 24).view(2, 10)}
    with torch.no_grad():
        assert torch.equal(after(**inputs).logits, before(**inputs).logits[:, [1, 2, 0]])


def decisions(table):
    return [LABELS[index] for index in table["deployed_decision"]]


def test_a_pipeline_of_the_exported_model_agrees_on_all_rows(runs):
    table = pd.read_parquet(runs["full"] / "predictions.parquet")
    folder = str(runs["full"] / "adapter")
    answer = transformers.pipeline("text-classification", model=folder)
    found = [one["label"] for one in answer(list(table["sentence"]), truncation=True, batch_size=50)]
    assert len(found) == 120 and 24 < found.count("acceptable") < 96 and found == decisions(table)
    assert answer.tokenizer.model_max_length == 32 and len(answer.tokenizer) > 200


def test_the_code_of_the_adapters_card_agrees_on_all_rows(runs, backbone):
    folder = runs["lora"] / "adapter"
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    names = {}
    exec(code.replace('"tiny"', repr(str(backbone))).replace('"this folder"', repr(str(folder))), names)
    table = pd.read_parquet(runs["lora"] / "predictions.parquet")
    inputs = names["tokenizer"](list(table["sentence"]), truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = names["model"](**inputs).logits.argmax(-1).tolist()
    found = [names["model"].config.id2label[index] for index in outputs]
    assert 24 < found.count("acceptable") < 96 and found == decisions(table)
    labels = read_tensors(folder / "gates.safetensors")[1]["labels"]
    assert json.loads(labels) == {"0": "unacceptable", "1": "acceptable"}


def test_no_file_of_an_export_holds_a_local_path(runs, backbone):
    for method, run in runs.items():
        for file in (run / "adapter").iterdir():
            content = file.read_bytes()
            assert b"secret place" not in content and str(run.parent).encode() not in content, file
        assert "of tiny" in (run / "adapter" / "README.md").read_text() or method == "full"
    saved = peft.PeftConfig.from_pretrained(runs["lora"] / "adapter")
    assert saved.base_model_name_or_path == "tiny" and saved.revision is None


def test_a_backbone_in_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert backbone_path("~/models/bert") == str(tmp_path / "models" / "bert")


def test_names_without_a_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    model = torch.nn.Linear(1, 1)
    for path, name in {
        backbone_path("demo"): "sentence-transformers/all-MiniLM-L6-v2", f"{tmp_path}/models/mine/": "mine",
        "models/mine": "mine", "./models/gone": "gone", "microsoft/deberta-v3-base": "microsoft/deberta-v3-base",
        f"{tmp_path}/deberta_from_bert/0123": "demo-deberta", "": "",
    }.items():  # fmt: skip
        model.name_or_path = path
        assert public_name(model) == name


@pytest.mark.parametrize("method", ["full"])
def test_the_folder_of_full_fine_tuning_is_a_backbone(runs, tmp_path, method):
    folder = train_run(tiny_config(runs[method] / "adapter", epochs=1, output_dir=str(tmp_path)))
    assert load(folder).n_train == 64


def test_an_export_without_its_run_needs_neither_tokenizer_nor_configuration(runs, backbone, tmp_path):
    folder = export(load(runs["lora"]), tmp_path / "again")
    assert not (folder / "tokenizer.json").exists() and "tokenizer" not in (folder / "adapter_config.json").read_text()
    base = load_backbone(str(backbone), Categorical(LABELS))
    assert peft.PeftModel.from_pretrained(base, folder).peft_config["default"].r == 4


def test_a_copy_for_export_shares_what_is_frozen_and_nothing_that_learns():
    net = weighted_net("lora")
    shared = dict(copied(net.peft_model).named_parameters())
    for name, p in net.peft_model.named_parameters():
        assert (shared[name] is p) == (not p.requires_grad), name


def test_an_export_leaves_its_program_as_it_was(tmp_path):
    program = weighted_program(weighted_net("lora"), weights="point")
    before = {name: x.clone() for name, x in program.state_dict().items()}
    learning = {name for name, p in program.named_parameters() if p.requires_grad}
    export(program, tmp_path / "adapter")
    assert all(torch.equal(x, before[name]) for name, x in program.state_dict().items())
    assert learning == {name for name, p in program.named_parameters() if p.requires_grad}
