"""Multiple choice: the letter that a language model writes next, among those of a question's options."""

import json
import re

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import save_tiny_decoder, tiny_config
from torch.distributions import Categorical, kl_divergence

from pyro_blora import load
from pyro_blora.__main__ import main
from pyro_blora.config import RunConfig, load_preset
from pyro_blora.models import load_backbone, load_tokenizer
from pyro_blora.posterior.arviz_compat import group, read
from pyro_blora.run import train_run
from pyro_blora.tasks import MultipleChoice, get_task
from pyro_blora.tasks.likelihoods import IGNORED
from pyro_blora.training import fit

pytestmark = pytest.mark.usefixtures("eager", "drawn")
KIND = MultipleChoice(("A", "B", "C"))
SINGERS = ("the old teacher", "a dog", "the teacher", "the dog")


def question(i):
    """The right option is the one that has the singer's own words."""
    options = [f"{SINGERS[i % 4]} sings", f"{SINGERS[(i + 1) % 4]} sings", "it rains"][: 3 - i % 2]
    shift = i % len(options)
    turned = options[shift:] + options[:shift]
    return {"question": f"who sings {SINGERS[i % 4]}", "options": turned, "answer": turned.index(options[0])}


def write_folder(folder, rows=None):
    folder.mkdir(exist_ok=True)
    rows = [question(i) for i in range(48)] if rows is None else rows
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "dev.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:24]))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "singers")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_tiny_decoder(tmp_path_factory.mktemp("qwen3"), "qwen3", head_dim=8)


def batch_of(decoder, rows):
    tokenizer = load_tokenizer(str(decoder))
    columns = {name: [row[name] for row in rows] for name in ("question", "options")}
    encoded = KIND.encode(tokenizer, {**columns, "label": [row["answer"] for row in rows]}, tuple(columns), 96)
    batch = KIND.collator(tokenizer)([{name: x[i] for name, x in encoded.items()} for i in range(len(rows))])
    return tokenizer, batch, batch.pop("labels")


@torch.no_grad()
def test_probabilities_are_those_of_the_letters_after_the_whole_question(decoder):
    rows = [question(0), question(1), question(2)]
    tokenizer, batch, labels = batch_of(decoder, rows)
    model = load_backbone(str(decoder), KIND).eval()
    distribution = KIND(model(**batch).logits)
    probs = KIND.averaged(distribution, labels)
    for row, found, score in zip(rows, probs, distribution.log_prob(labels), strict=True):
        listed = "".join(f"\n{letter}. {text}" for letter, text in zip("ABC", row["options"], strict=False))
        text = f"{row['question']}{listed}\nAnswer:"
        ids = tokenizer(row["question"])["input_ids"] + tokenizer(f"{listed}\nAnswer:")["input_ids"]
        assert tokenizer.decode(ids) == text
        tokens = [tokenizer(f" {letter}")["input_ids"][-1] for letter in "ABC"[: len(row["options"])]]
        expected = model(torch.tensor([ids])).logits[0, -1, tokens].softmax(-1)
        torch.testing.assert_close(found[: len(tokens)], expected, rtol=1e-4, atol=1e-6)
        assert not found[len(tokens) :].any()
        assert score.exp().item() == pytest.approx(expected[row["answer"]].item(), rel=1e-4)
    assert KIND.scored(labels).tolist() == [row["answer"] for row in rows]


def test_draws_lead_and_directions_have_the_fisher_information():
    torch.manual_seed(0)
    labels = torch.tensor([[1, 2, 5, 3, 4], [0, 1, 5, 3, IGNORED]])
    logits = torch.randn(2, 4, 6)
    p = KIND(logits).letters(labels).probs
    assert torch.equal(KIND.averaged(KIND(logits.expand(7, -1, -1, -1)), labels), p.expand(7, -1, -1))
    torch.testing.assert_close(p[0], logits[0, 2, [5, 3, 4]].softmax(-1))
    many = [x[:1].expand(20_000, *x.shape[1:]) for x in (logits, labels)]
    directions = KIND.fisher_directions(*many, torch.ones(()))
    assert not directions[:, [0, 1, 3]].any() and not directions[:, 2, :3].any()
    v, expected = directions[:, 2, [5, 3, 4]], p[0].diag() - torch.outer(p[0], p[0])
    torch.testing.assert_close(v.T @ v / len(v), expected, atol=0.01, rtol=0.0)
    other = torch.randn(2, 4, 6)
    found = KIND.divergence(KIND(logits), KIND(other), labels)
    each = (Categorical(logits=x[0, 2, [5, 3, 4]]) for x in (logits, other))
    torch.testing.assert_close(found[0], kl_divergence(*each))


def test_it_trains_resumes_to_the_same_bits_predicts_and_reports(decoder, folder, tmp_path):
    config = tiny_config(
        decoder, task="choice", task_settings={"choice_dir": str(folder)}, output_dir=str(tmp_path), max_train=None,
        epochs=3, lr=2e-2, max_length=64, validation=0.25, scope="encoder+head",
    )  # fmt: skip
    whole = fit(config, folder=tmp_path / "whole", quiet=True)
    for until in (4, None):
        again = fit(config, folder=tmp_path / "cut", quiet=True, until=until)
    assert [line["loss"] for line in whole.metrics] == [line["loss"] for line in again.metrics]
    run = train_run(config)
    summary = json.loads((run / "summary.json").read_text())
    assert run.name.startswith("singers-") and summary["metric"]["name"] == "accuracy"
    assert 0 <= summary["ece"]["value"] <= 1 and summary["nll"] > 0 and summary["calibration"]["averaged"]
    table = pd.read_parquet(run / "predictions.parquet")
    probs = table[["p_A", "p_B", "p_C"]].to_numpy()
    np.testing.assert_allclose(probs.sum(1), 1.0, rtol=1e-5)
    assert all(not row[len(options) :].any() for row, options in zip(probs, table["options"], strict=True))
    data = group(read(run), "predictions")
    assert data["probability"].dims[-2:] == ("example", "class") and data["probability"].shape[-1] == 3
    page = (run / "report.html").read_text()
    assert "Calibration" in page and "Gate map" in page
    model = load(run)
    found = model.predict([(row["question"], row["options"]) for row in (question(0), question(1))])
    assert list(found)[:2] == ["label", "confidence"] and found["p_C"][1] == 0.0
    with pytest.raises(ValueError, match=r"row 0 \(from 0\), 'options': .* is no text"):
        model.predict([("who sings", [])])
    card = (run / "adapter" / "README.md").read_text()
    assert "the letter of an option" in card and "id2label" not in card


def of_adapters(number):
    text = "What is red?\n\nAnswer1: a leaf Answer2: blood, the Answer3: water"
    instruction = f"Please choose the correct answer to the question: {text}\n\nAnswer format: answer1/answer2/answer3"
    return {"instruction": instruction, "answer": f"answer{number}"}


@pytest.mark.parametrize("given", [
    {"answer": "B"}, {"answer": 1}, {"answer": "blood, the"}, {"options": None, **of_adapters(2)},
])  # fmt: skip
def test_forms_of_a_row(given, tmp_path):
    usual = {"question": "What is red?", "options": ["a leaf", "blood, the", "water"]}
    row = given if "instruction" in given else {**usual, **given}
    rows = get_task("choice", {"choice_dir": str(write_folder(tmp_path / "x", [row]))}).load()["train"].to_list()
    assert rows == [{"question": usual["question"], "options": usual["options"], "label": 1}]


@pytest.mark.parametrize(("name", "labels"), [("question", "1 2 3"), ("question_stem", "A B C")])
def test_data_sets_of_the_hub(name, labels, tmp_path):
    """ARC's and OpenBookQA's columns; a folder of `datasets` is read as the hub is."""
    texts = ["a leaf", "blood, the", "water"]
    row = {name: "What is red?", "choices": {"text": texts, "label": labels.split()}, "answerKey": labels.split()[1]}
    table = datasets.Dataset.from_list([row])
    datasets.DatasetDict({"train": table, "validation": table, "test": table}).save_to_disk(str(tmp_path / "arc"))
    found = get_task("choice", {"choice_dir": str(tmp_path / "arc")}).load()
    assert found["eval"].to_list() == [{"question": "What is red?", "options": texts, "label": 1}]
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "no-dev"))
    with pytest.raises(ValueError, match="has no split dev or validation or test, but train: choose another"):
        get_task("choice", {"choice_dir": str(tmp_path / "no-dev")})
    with pytest.raises(ValueError, match="no such data set came from the hub"):
        get_task("choice", {"choice_dir": "nobody/nothing"})


@pytest.mark.parametrize(("row", "message"), [
    ({"question": "Is it?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": ""},
     "answer '' is none of the options"),
    ({"question": "Is it?", "choices": {"label": ["A", "B"]}, "answerKey": "A"}, "has no options"),
    ({"question": "Is it?", "answer": "A"}, r"train\.json, row 1: the question 'Is it\?' has no options"),
    ({"question": "Is it?", "options": [], "answer": "A"}, "has no options"),
    ({"instruction": "Please choose: is it?", "answer": "answer1"}, "has no options"),
    ({"question": "Is it?", "options": ["yes"], "answer": "A"}, "options must be 2 to 26 texts"),
    ({"question": "Is it?", "options": ["yes", " "], "answer": "A"}, "options must be 2 to 26 texts"),
    ({"question": "Is it?", "options": ["yes", "no"], "answer": "C"}, "answer 'C' is none of the options: give A, B"),
    ({"question": "Is it?", "options": ["yes", "no"], "answer": True}, "answer 'True' is none of the options"),
    (of_adapters(4), "answer '3' is none of the options"),
    ({"question": " ", "options": ["yes", "no"], "answer": "A"}, "there is no question"),
    ("Is it?", "a question must be an object, got str"),
])  # fmt: skip
def test_bad_rows_are_one_sentence(row, message, tmp_path, capsys):
    line = ["train", "--choice_dir", str(write_folder(tmp_path / "x", [row])), "--output_dir", str(tmp_path / "runs")]
    assert main(line) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, told), told


def test_ends_of_lines_within_texts_are_no_ends_of_rows(tmp_path):
    """JSON allows U+2028 and U+0085 in strings, which `str.splitlines` cuts at."""
    row = {"question": "who\u2028sings\u0085here", "options": ["a", "b\u2029"], "answer": "A"}
    folder = write_folder(tmp_path / "x", [question(0)])
    lines = [json.dumps(row, ensure_ascii=False), json.dumps(question(1))]
    (folder / "dev.jsonl").write_bytes("\r\n".join(lines).encode())
    rows = get_task("choice", {"choice_dir": str(folder)}).load()["eval"]
    assert rows["question"][:] == [row["question"], question(1)["question"]]
    (folder / "dev.jsonl").write_text(lines[0] + "\n\n{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"dev\.jsonl, line 3: there is no question"):
        get_task("choice", {"choice_dir": str(folder)})


def test_what_cannot_be_read_is_refused(decoder, tmp_path):
    with pytest.raises(ValueError, match=r"there is no train\.json in .*: point --choice_dir"):
        get_task("choice", {"choice_dir": str(tmp_path)})
    tokenizer = load_tokenizer(str(decoder))
    rows = {"question": ["who"], "options": [["a dog sings " * 9, "it"]], "label": [0]}
    with pytest.raises(ValueError, match="more than --max_length 16 lets in"):
        KIND.encode(tokenizer, rows, ("question", "options"), 16)
    rows["options"] = ["yes or no"]
    with pytest.raises(ValueError, match=r"the question 'who' has no options"):
        KIND.encode(tokenizer, rows, ("question", "options"), 16)
    rows = {"question": [["who", "what"]], "options": [["it", "a dog"]], "label": [0]}
    with pytest.raises(ValueError, match=r"\['who', 'what'\]\" is a list: give a text"):
        KIND.encode(tokenizer, rows, ("question", "options"), 16)
    rows = {"question": ["who"], "options": [["it", "a dog"]], "label": [2]}
    with pytest.raises(ValueError, match="the question 'who' has 2 options, and the answer C, which is none of them"):
        KIND.encode(tokenizer, rows, ("question", "options"), 16)
    assert KIND.is_text(["it", "a dog"]) and not KIND.is_text(["it", "a \ud83d"])


def test_the_preset_is_of_a_decoder():
    config = RunConfig(**{**load_preset("choice"), "task_settings": {"choice_dir": "x"}})
    assert config.task == "choice" and config.target_modules == ("q_proj", "v_proj") and config.precision == "bf16"


def test_public_data_is_read_whole(data_dir):
    folder = data_dir / "choice"
    if not folder.is_dir():
        pytest.skip(f"no questions at {folder}")
    for name, sizes, letters in (("openbookqa", (4957, 500), 4), ("arc_challenge", (1119, 1172), 5)):
        task = get_task("choice", {"choice_dir": str(folder / name)})
        rows = task.load()
        assert (len(rows["train"]), len(rows["eval"])) == sizes and len(task.likelihood.names) <= letters
        task.validate(rows)
