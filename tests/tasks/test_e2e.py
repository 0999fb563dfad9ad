"""Language modelling: the next tokens of a text that continues another, and the texts that a network writes."""

import csv
import json
import math
import re

import pandas as pd
import pytest
import torch
import transformers
from tiny import save_tiny_decoder, tiny_config

from pyro_blora import RunConfig, load
from pyro_blora.__main__ import main
from pyro_blora.adapters import use_gates
from pyro_blora.deploy import onnx_file, pack
from pyro_blora.deploy.deployed_model import DeployedModel
from pyro_blora.deploy.manifest import write_manifest
from pyro_blora.models import load_backbone, load_tokenizer
from pyro_blora.posterior import deployed
from pyro_blora.posterior.arviz_compat import group, read
from pyro_blora.run import train_run
from pyro_blora.tasks import get_task
from pyro_blora.tasks.causal_lm import CausalLM, NextTokens
from pyro_blora.tasks.likelihoods import IGNORED
from pyro_blora.tasks.writing import TextScores, greedy

pytestmark = pytest.mark.usefixtures("eager", "drawn")
pytest.importorskip("sacrebleu", reason="texts are scored by packages of the extra `decoder`")
NAMES, KINDS = ("Aromi", "Zizzi", "Cotto", "Fitzbillies"), ("pub", "restaurant", "coffee shop")
ROWS = [(f"name[{name}], eatType[{kind}]", f"{name} is a {kind}.") for name in NAMES for kind in KINDS]


def write_folder(folder, rows=ROWS):
    folder.mkdir(exist_ok=True)
    for file, taken in (
        ("trainset.csv", rows * 4),
        ("devset.csv", rows + [(mr, f"Try {ref}") for mr, ref in rows[:2]]),
    ):
        pd.DataFrame(taken, columns=["mr", "ref"]).to_csv(folder / file, index=False)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "e2e")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def decoder(request, tmp_path_factory):
    return save_tiny_decoder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    decoder = save_tiny_decoder(tmp_path_factory.mktemp("trained"))
    config = tiny_config(
        decoder, task="e2e", task_settings={"e2e_dir": str(folder), "longest": 12, "drawn": 2}, scope="encoder+head",
        output_dir=str(tmp_path_factory.mktemp("runs")), max_train=None, epochs=6, lr=2e-2, max_length=96, batch_size=8,
    )  # fmt: skip
    return train_run(config)


# --- the likelihood ---------------------------------------------------------------------------------------------------


def test_the_log_probability_is_that_of_transformers_own_loss(decoder):
    """Of the text's tokens alone, its end among them, and whatever stands beside it in a batch."""
    kind, tokenizer = CausalLM(), load_tokenizer(str(decoder))
    model = load_backbone(str(decoder), kind).eval()
    rows = {"mr": ["a dog", "the old teacher"], "label": ["sings", "a dog sees the teacher"]}
    encoded = kind.encode(tokenizer, rows, ("mr",), 64)
    batch = kind.collator(tokenizer)([{name: x[i] for name, x in encoded.items()} for i in range(2)])
    labels = batch.pop("labels")
    with torch.no_grad():
        found = kind(model(**batch).logits).log_prob(labels)
        for i in range(2):
            prompt = tokenizer(f"{rows['mr'][i]} ||")["input_ids"]
            whole = torch.tensor([prompt + tokenizer(f" {rows['label'][i]}")["input_ids"] + [tokenizer.eos_token_id]])
            asked = whole.clone()
            asked[:, : len(prompt)] = IGNORED
            tokens = whole.shape[1] - len(prompt)
            assert found[i].item() == pytest.approx(-tokens * model(whole, labels=asked).loss.item(), rel=1e-5)


def test_what_is_kept_averaged_and_decided():
    kind, labels = CausalLM(), torch.tensor([[IGNORED, 2, 0, IGNORED], [1, IGNORED, IGNORED, IGNORED]])
    logits = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))  # three draws
    kept, p = kind.averaged(kind(logits), labels), logits.softmax(-1)
    assert kept.shape == (3, 2, 2, 3)
    torch.testing.assert_close(kept[:, 0, :, 0], torch.stack([p[:, 0, 1, 2], p[:, 0, 2, 0]], -1))
    assert (kept[:, 0, :, 2] == torch.tensor([3, 1])).all() and (kept[:, 1, 1] == 0).all()
    assert (kept[:, 1, 0, 1] == (logits[:, 1, 0].argmax(-1) == 1)).all()
    assert kind.scored(labels).tolist() == [[2, 0], [1, IGNORED]]
    outputs = torch.tensor([[[[0.6, 1.0, 3.0], [0.2, 0.0, 1.0]], [[0.5, 1.0, 2.0], [0.0, 0.0, 0.0]]]])
    assert kind.decision(outputs[0]).tolist() == [[2, -1], [1, IGNORED]]
    table = pd.DataFrame(kind.columns(outputs))
    torch.testing.assert_close(kind.read(table), outputs[0].double())
    found = kind.details(outputs[0], kind.scored(labels))
    assert found["perplexity"] == pytest.approx((0.6 * 0.2 * 0.5) ** (-1 / 3))


def test_directions_have_the_fisher_information():
    torch.manual_seed(0)
    kind, logits, labels = CausalLM(), torch.randn(1, 2, 4), torch.tensor([[1, IGNORED]])
    each = kind.fisher_directions(logits.expand(20_000, -1, -1), labels, torch.ones(()))
    p = logits[0, 0].softmax(-1)
    torch.testing.assert_close(each[:, 0].T @ each[:, 0] / len(each), p.diag() - torch.outer(p, p), atol=0.01, rtol=0.0)
    assert not each[:, 1].any()


def test_the_divergence_is_that_of_the_tokens_that_are_asked():
    kind, labels = CausalLM(), torch.tensor([[1, IGNORED]])
    one, other = torch.randn(2, 1, 2, 4, generator=torch.Generator().manual_seed(1))
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x[:, 0]) for x in (one, other))
    )
    torch.testing.assert_close(kind.divergence(NextTokens(one), NextTokens(other), labels), expected)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_what_transformers_writes_one_by_one(decoder):
    """Padding on the left changes nothing."""
    tokenizer = load_tokenizer(str(decoder))
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder).eval()
    prompts = [tokenizer(text)["input_ids"] for text in ("a dog", "the old teacher sings to a dog", "the teacher")]
    together = greedy(model, tokenizer, prompts, longest=8, batch_size=3)
    for prompt, text in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(alone[0, len(prompt) :], skip_special_tokens=True).strip() == text


def test_scores_are_the_packages_own():
    import sacrebleu

    texts, references = (
        ["The Eagle is a pub.", "Aromi is cheap food"],
        [["The Eagle is a pub."], ["Aromi is cheap.", "x"]],
    )
    found = TextScores().compute(predictions=texts, references=references)
    streams = [[each[0] for each in references], [None, "x"]]
    assert found["bleu"] == pytest.approx(sacrebleu.BLEU().corpus_score(texts, streams).score / 100)
    assert found["rougeL"] == pytest.approx((1 + 2 * 3 / (4 + 3)) / 2)  # three words of four, of three
    same = TextScores().compute(predictions=["a b c d e"], references=[["a b c d e"]])
    assert same["bleu"] == pytest.approx(1.0) and same["rougeL"] == 1.0 and same["nist"] == pytest.approx(math.log2(5))
    short = TextScores().compute(
        predictions=["The red house .", "A car ."], references=[["The red house ."], ["A car ."]]
    )
    assert short["nist"] > 1  # NLTK has no sequence of five words to divide by
    assert TextScores().compute(predictions=[""], references=[["a pub"]]) == {"bleu": 0.0, "nist": 0.0, "rougeL": 0.0}
    with pytest.raises(ValueError, match="give each text one or more"):
        TextScores().compute(predictions=["a"], references=[[]])


# --- the task ---------------------------------------------------------------------------------------------------------


def test_it_trains_predicts_reports_and_packs(run, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    first, *_, last = (json.loads(line)["nll"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert last < 0.7 * first and summary["n_eval"] == 14
    assert summary["metric"]["value"] > summary["beside"]["accuracy"]["constant"]
    table = pd.read_parquet(run / "predictions.parquet")
    tokens = sum(map(len, table["token"]))
    assert summary["perplexity"] < math.exp(summary["nll"] * 14 / tokens) * 1.05
    assert summary["written"]["texts"] == 12 and summary["written"]["draws"] == 2
    data = group(read(run), "predictions")
    assert data["log_likelihood"].sizes["example"] == 14 and data["probability"].dims[-2:] == ("example", "token")
    page = (run / "report.html").read_text()
    assert "Scores of 12 texts that were written" in page and "Gate map" in page and "perplexity" in page
    model = load(run)
    trained = {name for name, p in model.net.named_parameters() if p.requires_grad}
    assert trained and not any("lm_head" in name or "wte" in name or "embed" in name for name in trained)
    assert model.net.layout.names[-1] == "0.lm_head" and not model.net.layout.projections[-1].adapted
    assert "lm_head" in page
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    packed = load(pack(model, tmp_path / "packed"))
    with torch.no_grad(), use_gates(model.net, *deployed(model), exact=True):
        assert torch.equal(packed(**inputs).logits, model.net.logits(**inputs))


def test_a_packed_model_writes_the_deployed_texts(run, tmp_path, capsys):
    folder, rows = str(tmp_path / "packed"), tmp_path / "new.jsonl"
    assert main(["export", str(run), "--to", folder, "--format", "packed"]) == 0
    rows.write_text("".join(json.dumps({"mr": mr}) + "\n" for mr, _ in ROWS[:3]))
    assert main(["predict", folder, str(rows), "--out", str(tmp_path / "out.jsonl")]) == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = load(run).predict([mr for mr, _ in ROWS[:3]], deployed=True)
    assert [row["text"] for row in written] == expected["text"].tolist() and "drawn" not in written[0]
    assert main(["serve", str(run)]) == 2
    assert "is a language model, whose texts are not served: use pyro-blora predict" in capsys.readouterr().err


def test_an_onnx_model_writes_no_texts(run, tmp_path):
    """Which its manifest says; to export the file itself would take fifteen seconds."""
    content = {
        "schema": onnx_file.SCHEMA, "version": onnx_file.VERSION, "made_by": "x", "inputs": ["input_ids"],
        "output": "logits", "labels": [], "products": {"integer": 0, "all": 1},
        "task": json.loads((pack(load(run), tmp_path / "packed") / "packed.json").read_text())["task"],
    }  # fmt: skip
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / onnx_file.MODEL).touch()
    write_manifest(tmp_path / "onnx" / onnx_file.MANIFEST, content)
    with pytest.raises(ValueError, match="writes no texts: give the run's folder, or a packed one"):
        DeployedModel(tmp_path / "onnx")


def test_new_texts_are_written(run, tmp_path):
    texts = [mr for mr, _ in ROWS[:3]]
    model = load(run)
    found = model.predict(texts, draws=2)
    assert list(found) == ["text", "drawn"] and all(len(drawn) == 2 for drawn in found["drawn"])
    assert model.predict(texts, deployed=True)["text"].tolist() == found["text"].tolist()
    pd.DataFrame({"mr": texts}).to_csv(tmp_path / "new.csv", index=False)
    assert main(["predict", str(run), str(tmp_path / "new.csv"), "--out", str(tmp_path / "out.jsonl")]) == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in written] == found["text"].tolist() and len(written[0]["drawn"]) == 3
    with pytest.raises(ValueError, match="no prediction sets"):
        model.predict(texts, coverage=0.9)
    rows = pd.read_parquet(run / "predictions.parquet").groupby("mr", sort=False)["label"].agg(list)
    own = model.predict(list(rows.index), deployed=True)["text"]
    found = TextScores().compute(predictions=own.tolist(), references=rows.tolist())
    assert found == pytest.approx(json.loads((run / "summary.json").read_text())["written"]["scores"])


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: (f / "devset.csv").unlink(), r"there is no file .*devset\.csv: point --e2e_dir"),
    (lambda f: (f / "devset.csv").write_text("mr,ref\na,b\nname[x],\n"), r"devset\.csv, line 3: an empty reference"),
    (lambda f: (f / "devset.csv").write_text("mr,ref\na,b\nname[x],A pub, by the river.\n"),
     r"devset\.csv, line 3: 3 fields, but the header has 2: put texts that have commas in them into double quotes"),
    (lambda f: (f / "devset.csv").write_text("mr,ref\nname[x]\n"), r"line 2: 1 field, but the header has 2: put texts"),
    (lambda f: (f / "devset.csv").write_text("mr,ref\n ,b\n"), r"line 2: an empty meaning representation"),
    (lambda f: (f / "trainset.csv").write_text("MR,ref\na,b\n"), r"lacks the columns \['mr'\]"),
    (lambda f: (f / "trainset.csv").write_text("mr,ref\n"), "has no rows"),
    (lambda f: write_folder(f, [("a very " * 30, "b")]), r"leaves no room .* within 32: raise --max_length"),
])  # fmt: skip
def test_bad_files_are_one_sentence(change, message, decoder, tmp_path, capsys):
    folder = write_folder(tmp_path / "e2e")
    change(folder)
    line = ["train", "--task", "e2e", "--e2e_dir", str(folder), "--backbone", str(decoder), "--max_length", "32",
            "--output_dir", str(tmp_path / "runs")]  # fmt: skip
    assert main(line) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, told), told
    assert not (tmp_path / "runs").exists() or not [*(tmp_path / "runs").glob("[!.]*")]


def test_long_texts_are_read_whole(tmp_path):
    csv.field_size_limit(131_072)  # of Python's csv module, before anything has raised it
    long = " ".join(["a pub"] * 40_000)
    rows = get_task("e2e", {"e2e_dir": str(write_folder(tmp_path / "e2e", [("name[x]", long)]))}).load()
    assert rows["eval"]["label"][0] == long


def test_meanings_to_validate_on_have_all_their_texts(folder):
    rows = get_task("e2e", {"e2e_dir": str(folder), "meanings": 3}).load(n_train=5)
    assert len(rows["train"]) == 5 and len(set(rows["eval"]["mr"])) == 3 and len(rows["eval"]) == 4
    assert RunConfig(task="e2e", task_settings={"e2e_dir": "x"}).task_settings == {"e2e_dir": "x"}
    with pytest.raises(ValueError, match=r"--task\.longest must be at least 1, got 0"):
        get_task("e2e", {"e2e_dir": str(folder), "longest": 0})
