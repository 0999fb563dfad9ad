"""`pyro-blora export`: each format is read back by what it is for, and its card says what it computes."""

import json
import re

import datasets
import huggingface_hub
import pandas as pd
import pytest
import torch
import transformers
from hub_server import hub_server
from models import tiny_language_model
from packed_models import allocated, randomize_biases
from safetensors.torch import load_file
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import Task, load, register_task
from pyro_blora.__main__ import main
from pyro_blora.build import build
from pyro_blora.deploy.draw_tree import export_draws
from pyro_blora.deploy.hub_names import folder_of
from pyro_blora.deploy.packed import MANIFEST, WEIGHTS
from pyro_blora.deploy.peft import plain_backbone
from pyro_blora.files import require_whole
from pyro_blora.posterior import deployed, draw, predict
from pyro_blora.run import train_run
from pyro_blora.tasks import MultiLabel, TokenLabels
from pyro_blora.tasks.batching import split_labels
from pyro_blora.tasks.causal_lm import CausalLM
from pyro_blora.tasks.multiple_choice import MultipleChoice

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("secret place") / "tiny")
    output = str(tmp_path_factory.mktemp("secret runs"))
    guide = {"open_logit": 0.0}  # gates are as good as drawn: several widths and ranks
    return train_run(tiny_config(backbone, scope="encoder", guide_settings=guide, lr=0.01, output_dir=output))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """What `pyro-blora export` prints, and its folder, each made once."""
    made = {}

    def export(capsys, *flags):
        if flags not in made:
            folder = tmp_path_factory.mktemp("exports") / "model"
            capsys.readouterr()
            assert main(["export", str(run), "--to", str(folder), *flags]) == 0
            made[flags] = capsys.readouterr().out, folder
        return made[flags]

    return export


def inputs_of(run, folder):
    table = pd.read_parquet(run / "predictions.parquet")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return table, tokenizer(list(table["sentence"]), truncation=True, padding=True, return_tensors="pt")


def code_of(folder):
    """The program of a card, with the folder in its place."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    return code.replace('"this folder', f'"{folder}')


def card_of(folder):
    return huggingface_hub.ModelCard.load(folder / "README.md")


def test_the_packed_model_gives_the_runs_deployed_predictions(run, exported, capsys):
    out, folder = exported(capsys)
    summary = json.loads((run / "summary.json").read_text())
    value, nll = summary["deployed"]["metric"]["value"], summary["deployed"]["nll"]
    measured = (
        f"accuracy {value:.4f}, where the run's deployed allocation has {value:.4f}; NLL {nll:.4f} nats per example"
    )
    assert out == f"120 held-out rows: {measured}, there {nll:.4f}; 0 decisions differ.\n{folder}\n"
    table, inputs = inputs_of(run, folder)
    with torch.no_grad():
        logits = load(folder)(**inputs).logits
    assert logits.argmax(-1).tolist() == table["deployed_decision"].tolist()
    names = {}
    exec(code_of(folder), names)
    assert names["logits"].shape == (1, 2)


def test_cards_say_what_they_are_of(run, exported, capsys):
    of_run = load(run)
    ratio = json.loads((run / "summary.json").read_text())["bops"]["deployed"]["model_ratio"]
    for flags, library, relation in (
        ((), "pyro_blora", "quantized"), (("--format", "peft"), "peft", "adapter"),
        (("--format", "merged"), "transformers", "merge"),
    ):  # fmt: skip
        folder = exported(capsys, *flags)[1]
        data, text = card_of(folder).data, card_of(folder).text
        assert (data.library_name, data.base_model, data.base_model_relation) == (library, "tiny", relation)
        assert data.pipeline_tag == "text-classification" and data.metrics == ["accuracy"]
        (result,) = data.eval_results
        assert result.metric_type == "accuracy" and f"accuracy {result.metric_value:.4f}" in text
        assert "logits of `unacceptable`, `acceptable`" in text and "64 examples of the task acceptability" in text
        assert "pyro-blora train --task acceptability" in text and "which no file here states" in text
        assert ("**not** the low-bit model" in text) == (relation != "quantized")
        for file in folder.rglob("*"):
            assert b"secret" not in file.read_bytes(), file
    text = card_of(exported(capsys)[1]).text
    assert f"{100 * ratio:.1f} % of those of the model at 32 bit" in text and "**Simulated**" in text
    bits = of_run.layout.ladder[int(deployed(of_run).z[0, 0].sum())]
    assert re.search(rf"\| query \| 2 \| .*{bits}", text)


def test_the_adapter_of_a_run_says_the_same_without_scores(run):
    text = card_of(run / "adapter").text
    assert "**not** the low-bit model" in text and "**Measured**" not in text and "deployed" not in text.lower()


def test_a_merged_model_is_the_adapter_on_its_base(run, exported, capsys):
    out, folder = exported(capsys, "--format", "merged")
    assert "120 held-out rows: accuracy" in out
    table, inputs = inputs_of(run, folder)
    with torch.no_grad():
        found = transformers.AutoModelForSequenceClassification.from_pretrained(folder)(**inputs).logits
        names = {}
        adapter = exported(capsys, "--format", "peft")[1]
        exec(code_of(adapter).replace('"tiny"', repr(load(run).config.backbone)), names)
        expected = names["model"](**inputs).logits
    assert torch.allclose(found, expected, atol=1e-5) and not torch.equal(expected[0], expected[1])
    differ = (found.argmax(-1) != torch.tensor(table["deployed_decision"].tolist())).sum()
    assert f"; {differ} decisions differ." in out
    answer = transformers.pipeline("text-classification", model=str(folder))
    assert answer("she sings")[0]["label"] in ("unacceptable", "acceptable")
    assert "`sha256sum -c SHA256SUMS`" in card_of(folder).text
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in folder.iterdir()} - {"SHA256SUMS", "README.md"}  # a card may be edited
    require_whole(folder)


def test_a_low_bit_merge_stays_on_the_bases_grid(run, exported, capsys):
    out, folder = exported(capsys, "--merge")
    assert "decisions differ." in out and "is not those" not in out
    entries = json.loads((folder / MANIFEST).read_text())["projections"]
    whole = json.loads((exported(capsys)[1] / MANIFEST).read_text())["projections"]
    assert all("rank" not in entry for entry in entries.values())
    program = load(run)
    merged, plain = load(folder), dict(plain_backbone(program.net).named_parameters())
    for name, entry in entries.items():
        assert entry["bits"] == {key: whole[name]["bits"][key] for key in ("base", "input")}
        weight = merged.get_submodule(name).weight
        if entry["bits"]["base"] < 8:
            assert len(weight.unique()) < 2 ** entry["bits"]["base"]
        elif "rank" in whole[name]:  # a fine grid: the update is in it
            assert not torch.allclose(weight, plain[f"{name}.weight"], atol=1e-3)
    assert "so its logits are not those of the run's deployed allocation" in card_of(folder).text.replace("\n", " ")


def test_embeddings_in_8_bit_take_a_quarter(exported, capsys):
    whole, small = exported(capsys)[1], exported(capsys, "--embeddings", "8")[1]
    name = "bert.embeddings.word_embeddings.weight"
    before, codes = load_file(whole / WEIGHTS)[name], load_file(small / WEIGHTS)[f"{name}.codes"]
    assert codes.numel() == before.numel()
    after = dict(load(small).named_parameters())[name]
    assert not torch.equal(after, before) and (after - before).abs().max() <= before.abs().max() / 254 * 1.01
    assert "its embeddings have 8 bit, row by row, which the run's have not" in card_of(small).text


def test_draws_are_an_ensemble_of_adapters(run, exported, capsys):
    _, folder = exported(capsys, "--format", "peft", "--draws", "2")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["draw-0", "draw-1"]
    names = {}
    program = load(run)
    exec(code_of(folder).replace('"tiny"', repr(program.config.backbone)), names)
    _, inputs = inputs_of(run, folder)
    gates = draw(program, 2, seed=program.config.seed)
    z = gates.z.clone()
    z[:, :, [0, 1, 4]] = 1.0  # inputs, base and hidden, which PEFT has at 32 bit
    batches = [({name: x[:8] for name, x in inputs.items()}, torch.zeros(8, dtype=torch.long))]
    expected = predict(program, batches, gates=gates._replace(z=z)).mean
    texts = pd.read_parquet(run / "predictions.parquet")["sentence"][:8]
    assert torch.allclose(names["average"](list(texts)), expected, atol=1e-5)


OUTCOMES = {
    "number": {"label_range": (1.0, 5.0), "metric_name": "pearson"},
    "several": {"kind": MultiLabel(("a", "b", "c")), "metric_name": "micro_f1"},
    "words": {"kind": TokenLabels(("O", "B-X", "I-X")), "metric_name": "f1"},
}


def drawn(run, folder, outcome):
    """(an untrained program of this outcome, exported as two draws, and its data; the card's program, with its base)"""
    labels = {"number": [1.0, 4.5], "several": [[1, 0, 1], [0, 0, 1]], "words": [[0, 1], [2, 0, 1]]}
    texts = {"number": ("The soldier", "The lawyer lost"), "words": (["The", "soldier"], ["The", "lawyer", "lost"])}
    rows = datasets.Dataset.from_dict({"sentence": texts.get(outcome, texts["number"]), "label": labels[outcome]})
    task = Task(name=f"drawn_{outcome}", text_columns=("sentence",), load=lambda **_: {"train": rows, "eval": rows},
                **OUTCOMES[outcome])  # fmt: skip
    register_task(task)
    settings = {"scope": "encoder", "guide_settings": {"open_logit": 0.0}, "max_train": None, "task": task.name}
    config = tiny_config(load(run).config.backbone, **settings)
    parts = build(config)
    with torch.no_grad():
        for number, parameter in enumerate(parts.program.net.adapter_parameters()):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    export_draws(parts.program, folder, 2, seed=3, config=config, tokenizer=parts.tokenizer)
    return parts, code_of(folder).replace('"tiny"', repr(config.backbone))


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_card_of_draws_averages_what_the_outcome_averages(run, tmp_path, outcome, forget):
    parts, code = drawn(run, tmp_path / "draws", outcome)
    names = {}
    exec(code, names)
    gates = draw(parts.program, 2, seed=3)
    z = gates.z.clone()
    z[:, :, [0, 1, 4]] = 1.0
    rows = parts.tokens["eval"]
    batch = split_labels(parts.collate([rows[i] for i in range(2)]), torch.device("cpu"))
    outputs = predict(parts.program, [batch], gates=gates._replace(z=z)).outputs
    expected, found = outputs.mean(0), names["average"](["The soldier", "The lawyer lost"])
    if outcome == "words":
        found = found[:, 1:4] * (expected.sum(-1, keepdim=True) > 0)  # between [CLS] and [SEP], a token a word
    assert torch.allclose(found.view_as(expected), expected, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


@pytest.mark.parametrize("kind", [CausalLM(), MultipleChoice(("A", "B"))], ids=["text", "letters"])
def test_the_card_of_draws_loads_them_alone_where_logits_give_no_average(tmp_path, kind):
    base, folder = tmp_path / "base", tmp_path / "draws"
    randomize_biases(tiny_language_model()).save_pretrained(base)
    program = allocated(lambda dropout: transformers.AutoModelForCausalLM.from_pretrained(base), kind=kind)
    words = transformers.AutoTokenizer.from_pretrained(save_tiny_backbone(tmp_path / "words"))
    export_draws(program, folder, 2, tokenizer=words)
    names = {}
    exec(code_of(folder).replace('"base"', repr(str(base))), names)
    assert "average" not in names and [*names["model"].peft_config] == names["names"] == ["draw-0", "draw-1"]
    assert f"The mean of their {kind.averages} is the prediction" in card_of(folder).text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--format", "peft", "--merge"], "--merge is of --format packed, not of peft: drop one of them"),
        (["--draws", "2"], "--draws is of --format peft, not of packed: drop one of them"),
        (["--small"], "--small is of --format onnx, not of packed: drop one of them"),
        (["--seed", "1"], "--seed is of --draws: give both, or none"),
        (["--merge", "--base", "reference"], "--merge changes the base"),
        (["--embeddings", "1"], "embeddings have 2 to 16 bit, or 32 as they are, got 1"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(run, tmp_path, capsys, flags, sentence):
    assert main(["export", str(run), "--to", str(tmp_path / "model"), *flags, "--quiet"]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_never_overwritten(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", str(tmp_path)]) == 2
    assert f"{tmp_path} exists already: give another --to" in capsys.readouterr().err


def test_a_run_is_pushed_as_its_adapter_with_what_it_scored(run, tmp_path, capsys):
    with hub_server(tmp_path) as hub:
        assert main(["push", str(run), "someone/run", "--quiet"]) == 0
        sent, backbone = hub.files("someone/run"), load(run).config.backbone
        assert b"**Measured** on 120 held-out rows" in sent["README.md"] and "gates.safetensors" in sent
        assert all(b"secret" not in content for content in sent.values())
        texts = ["she sings", "the dog barks"]
        assert load("someone/run", backbone=backbone).predict(texts).equals(load(run).predict(texts))


@pytest.mark.parametrize(
    "flags",
    [
        [], ["--merge"], ["--embeddings", "8"], ["--base", "reference"], ["--format", "peft"],
        ["--format", "peft", "--draws", "2"], ["--format", "merged"], ["--format", "onnx"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_export_goes_to_the_hub_and_comes_back_with_all_files(exported, tmp_path, capsys, flags):
    if "onnx" in flags:
        pytest.importorskip("onnxscript", reason="ONNX: pip install 'pyro-blora[onnx]'")
    _, folder = exported(capsys, *flags)
    with hub_server(tmp_path) as hub:
        hub.models["someone/model"] = {}
        hub.commit("someone/model", "main", {"SHA256SUMS": b"of another", "chat_template.jinja": b"of another"})
        assert main(["push", str(folder), "someone/model", "--quiet"]) == 0
        fetched = folder_of("someone/model")
    assert files_in(fetched) == files_in(folder)
    require_whole(fetched)


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
