"""Spans of a text: one normalized distribution over all windows, what is kept of it, and windows that cover a text."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import save_tiny_backbone, tiny_config
from torch.distributions import Categorical, kl_divergence

from pyro_blora.adapters import calibrate
from pyro_blora.build import build_program
from pyro_blora.models import load_backbone, load_tokenizer
from pyro_blora.tasks import Spans, heads
from pyro_blora.tasks.batching import split_labels
from pyro_blora.tasks.heads import Head
from pyro_blora.tasks.likelihoods import IGNORED
from pyro_blora.tasks.outcomes import Form
from pyro_blora.tasks.windows import windows_of
from pyro_blora.training.gate_init import sensitivity
from pyro_blora.training.range_calibration import range_errors

pytestmark = pytest.mark.usefixtures("eager")
KIND = Spans(stride=3, longest=4, best=5)
TEXTS = ("the old teacher sings  and a dog sees every boy in the garden while it rains", "a dog sings")
QUESTIONS = ("sings", "a dog")
SCALE = torch.ones(())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(save_tiny_backbone(tmp_path_factory.mktemp("words"), letters=True)))


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Two questions, of several windows and of one."""
    rows = {"question": QUESTIONS, "context": TEXTS, "label": [[7, 15, 4, 15, 0, 15], [9, 3, 6, 11]]}
    encoded = KIND.encode(tokenizer, rows, ("question", "context"), 16)
    return KIND.collator(tokenizer)([{name: x[i] for name, x in encoded.items()} for i in range(2)])


def spans_of(logits, labels):
    """Every span of the first example's text, in tokens, and its unnormalized log-probability, one by one."""
    places = [place for place in labels[0, 1].tolist() if place >= 0]
    a, b = logits[0].flatten(0, 1)[places].T.tolist()
    spans = [(i, j) for i, j in itertools.product(range(len(places)), repeat=2) if i <= j]
    return spans, Categorical(logits=torch.tensor([a[i] + b[j] for i, j in spans], dtype=torch.double))


def with_span(labels, span):
    found = labels.clone()
    found[0, 0, 2:4] = torch.tensor(span)
    return found


@pytest.mark.parametrize(("length", "stride"), [(14, 3), (14, 0), (40, 3)])
def test_every_token_of_a_text_has_one_place_where_it_has_most_context(tokenizer, length, stride):
    for question, text, found in zip(QUESTIONS, TEXTS, windows_of(tokenizer, QUESTIONS, TEXTS, length, stride),
                                     strict=True):  # fmt: skip
        rows = found.inputs["input_ids"]
        read = [rows[w][t] for w, t in zip(found.window, found.token, strict=True)]
        assert read == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [text[s:e] for s, e in zip(found.starts, found.ends, strict=True) if text[s - 1 : s] in ("", " ")]
        first = len(tokenizer(question)["input_ids"])
        room = length - first - 1
        begins = [w * (room - stride) for w in range(len(rows))]
        for i, (w, t) in enumerate(zip(found.window, found.token, strict=True)):
            depths = {
                v: min(i - begin, min(begin + room, len(read)) - 1 - i)
                for v, begin in enumerate(begins) if begin <= i < begin + room
            }  # fmt: skip
            assert depths[w] == max(depths.values()) and t == first + i - begins[w]
    assert all(len(row) <= length for row in rows)


def test_token_types_are_not_given_as_peft_drops_them(tokenizer, monkeypatch):
    names = ["input_ids", "attention_mask", "token_type_ids"]
    monkeypatch.setattr(tokenizer, "model_input_names", names)
    assert set(tokenizer("a dog", "sings")) == set(names)
    assert set(next(windows_of(tokenizer, QUESTIONS, TEXTS, 40, 3)).inputs) == set(names[:2])


def test_an_answer_is_the_tokens_that_have_its_characters(tokenizer):
    found = next(windows_of(tokenizer, QUESTIONS[:1], TEXTS[:1], 40, 3))
    for start, end in ((4, 15), (5, 14), (0, 3), (21, 26)):
        first, last = found.tokens_of(start, end)
        text = TEXTS[0][found.starts[first] : found.ends[last]]
        assert TEXTS[0][start:end].strip() in text and len(text) <= len(TEXTS[0][start:end]) + 2
    assert found.tokens_of(500, 510) is None


@pytest.mark.parametrize("text", [" the cat", "\n\tthe cat", "\u200b the cat", "the cat"])
def test_a_text_without_a_label_may_begin_with_anything(tokenizer, text):
    rows = {"question": ["who"], "context": [text], "label": [KIND.placeholder(("who", text))]}
    encoded = KIND.encode(tokenizer, rows, ("question", "context"), 40)
    labels = KIND.collator(tokenizer)([{name: x[0] for name, x in encoded.items()}])["labels"]
    assert labels[0, 0, 2:4].tolist() == [0, 0] and KIND.scored(labels).tolist() == [[0, 2]]
    known = KIND.encode(tokenizer, {**rows, "label": [[0, 2, text.index("cat"), len(text)]]}, tuple(rows)[:2], 40)
    assert known["input_ids"] == encoded["input_ids"] and known["label"][0][1:] == encoded["label"][0][1:]


def test_the_probabilities_of_all_spans_of_all_windows_sum_to_one(batch):
    labels = batch["labels"]
    logits = torch.randn(2, *batch["input_ids"].shape[1:], 2)
    assert logits.shape[1] > 2 and KIND.scored(labels).tolist() == [[7, 15, 4, 15, 0, 15], [9, 3, 6, 11, -100, -100]]
    spans, expected = spans_of(logits, labels)
    for span, value in zip(spans, expected.logits, strict=True):
        assert KIND(logits).log_prob(with_span(labels, span))[0].item() == pytest.approx(value.item(), abs=1e-4)
    assert torch.allclose(KIND(logits.expand(3, *logits.shape)).log_prob(labels), KIND(logits).log_prob(labels))


def test_what_no_window_of_a_text_has_changes_nothing(batch):
    """Questions, padding, and the copies of a token in other windows."""
    labels, logits = batch["labels"], torch.randn(2, *batch["input_ids"].shape[1:], 2)
    own = torch.zeros(2, logits.shape[1] * logits.shape[2], dtype=torch.bool)
    for row, places in zip(own, labels[:, 1], strict=True):
        row[places[places >= 0]] = True
    mixed = torch.where(own.view(logits.shape[:-1])[..., None], logits, torch.randn_like(logits))
    assert torch.equal(KIND(mixed).log_prob(labels), KIND(logits).log_prob(labels))


def test_the_best_spans_and_the_entropy_are_those_of_all_spans(batch):
    labels, logits = batch["labels"], 3 * torch.randn(2, *batch["input_ids"].shape[1:], 2)
    found = KIND.averaged(KIND(logits.expand(2, *logits.shape)), labels)[1]
    spans, every = spans_of(logits, labels)
    assert found[0, 0].tolist() == pytest.approx([every.entropy().item(), 7, 15], rel=1e-4)
    short = [(p, span) for p, span in zip(every.probs.tolist(), spans, strict=True) if span[1] - span[0] < 4]
    for (p, (first, last)), row in zip(sorted(short, reverse=True), found[0, 1:].tolist(), strict=False):
        assert row == pytest.approx([*labels[0, [2, 3], [first, last]].tolist(), p], rel=1e-4)
    table = KIND.in_words(KIND.columns(found[None]), list(zip(QUESTIONS, TEXTS, strict=True)))
    start, end = found[0, 1, :2].int().tolist()
    assert table["answer"][0] == TEXTS[0][start:end] == table["n_best"][0][0]
    read = KIND.read(pd.DataFrame({**table, "label": [[7, 15, 4, 15], [9, 3, 6, 11]]}))
    torch.testing.assert_close(read.float(), found)
    assert KIND.decision(read).tolist()[0] == [7, 15, start, end]


def test_spans_of_tokens_that_share_their_characters_are_one(batch):
    """As the bytes of an emoji: one draw says what several would."""
    generator = torch.Generator().manual_seed(0)
    labels, logits = batch["labels"].clone(), 3 * torch.randn(2, *batch["input_ids"].shape[1:], 2, generator=generator)
    labels[0, 2:, 1:3] = labels[0, 2:, :1]  # the first three tokens have the first one's characters
    found = KIND.averaged(KIND(logits), labels)[0]
    spans, every = spans_of(logits, labels)
    expected = {}
    for (first, last), p in zip(spans, every.probs.tolist(), strict=True):
        if last - first < KIND.longest:
            edges = int(labels[0, 2, first]), int(labels[0, 3, last])
            expected[edges] = expected.get(edges, 0.0) + p
    rows = {(int(start), int(end)): p for start, end, p in found[1:].tolist() if p > 0}
    most = sorted(expected.items(), key=lambda pair: -pair[1])[: KIND.best]
    assert len(rows) == len(most) and rows == pytest.approx(dict(most), rel=1e-4)


def test_spans_of_draws_are_merged():
    draws = [{(0, 3): 0.5, (4, 9): 0.3}, {(4, 9): 0.6, (1, 3): 0.1}, {(4, 9): 0.3}]
    outputs = torch.zeros(3, 1, 6, 3)
    for own, (entropy, spans) in zip(outputs, zip((1.0, 2.0, 3.0), draws, strict=True), strict=True):
        own[0, 0] = torch.tensor([entropy, 7, 15])
        for row, (span, p) in zip(own[0, 1:], spans.items(), strict=False):
            row[:] = torch.tensor([*span, p])
    mean = KIND.mean(outputs)[0]
    assert mean[0].tolist() == [2.0, 7, 15]
    assert mean[1:4].flatten().tolist() == pytest.approx([4, 9, 0.4, 0, 3, 0.5 / 3, 1, 3, 0.1 / 3])
    assert not mean[4:, 2].any() and KIND.columns(outputs)["spans"] == [[[4, 9], [0, 3], [1, 3]]]


def test_directions_have_the_fisher_information_and_divergence_is_that_of_all_spans(batch):
    torch.manual_seed(0)
    labels, logits = batch["labels"][:1], torch.randn(1, *batch["input_ids"].shape[1:], 2)
    spans, every = spans_of(logits, labels)
    places = labels[0, 1][labels[0, 1] >= 0]
    slopes = torch.zeros(len(spans), len(places), 2, dtype=torch.double)
    for row, (first, last) in zip(slopes, spans, strict=True):
        row[first, 0] = row[last, 1] = 1.0
    slopes = (slopes - (every.probs[:, None, None] * slopes).sum(0)).flatten(1)
    many = [x.expand(20_000, *x.shape[1:]) for x in (logits, labels)]
    v = KIND.fisher_directions(*many, SCALE).flatten(1, 2)
    assert not v.sum((0, 2))[np.setdiff1d(range(v.shape[1]), places.tolist())].any()
    v = v[:, places].flatten(1).double()
    torch.testing.assert_close(v.T @ v / len(v), (every.probs[:, None] * slopes).T @ slopes, atol=0.01, rtol=0.0)
    other = torch.randn_like(logits)
    expected = kl_divergence(every, spans_of(other, labels)[1])
    found = KIND.divergence(KIND(logits), KIND(other), labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_padding_windows_are_not_run_and_evaluation_takes_few_at_a_time(batch, tokenizer, tmp_path):
    model = load_backbone(str(save_tiny_backbone(tmp_path / "words", letters=True)), KIND).eval()
    inputs, seen = {name: x for name, x in batch.items() if name != "labels"}, []

    def call(rows):
        seen.append(len(rows["input_ids"]))
        return model(**rows)

    windows = inputs["attention_mask"].any(-1)
    found = KIND.head.logits(call, inputs)
    assert seen == [int(windows.sum())] and found.requires_grad and not found[~windows].any()
    alone = KIND.head.read(model(**{name: x[0, 1:2] for name, x in inputs.items()}))
    torch.testing.assert_close(found[0, 1:2], alone, rtol=1e-4, atol=1e-5)
    long = {name: x[:1].repeat(1, 15, 1) for name, x in inputs.items()}
    with torch.no_grad():
        seen.clear()
        torch.testing.assert_close(KIND.head.logits(call, long)[:, : windows.shape[1]], found[:1], rtol=1e-4, atol=1e-5)
    assert max(seen) <= 16 and sum(seen) == long["attention_mask"].shape[1]
    assert Head().rows(inputs) is inputs


def test_a_step_on_a_gpu_runs_padding_windows_which_change_nothing(batch, tokenizer, tmp_path, monkeypatch):
    """And reads no value on the host, for which the meta device has none."""
    model = load_backbone(str(save_tiny_backbone(tmp_path / "words", letters=True)), KIND).eval()
    inputs = {name: x for name, x in batch.items() if name != "labels"}

    def slopes(inputs, labels):
        model.zero_grad()
        found = KIND(KIND.head.logits(lambda rows: model(**rows), inputs)).log_prob(labels)
        found.sum().backward()
        return [found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = slopes(inputs, batch["labels"])
    with monkeypatch.context() as patch:
        patch.setattr(heads, "_is_recorded", lambda x, in_step: True)
        for x, y in zip(slopes(inputs, batch["labels"]), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    model.to("meta")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers reads masks else
    assert slopes({name: x.to("meta") for name, x in inputs.items()}, batch["labels"].to("meta"))[0].shape == (2,)


class AtLabels(Spans):
    """The slope at the labels themselves, in which nothing is drawn."""

    def fisher_directions(self, logits, labels, scale):
        with torch.enable_grad():
            here = logits.detach().requires_grad_()
            return torch.autograd.grad(self(here).log_prob(labels).sum(), here)[0]


def test_slopes_of_gates_are_those_of_each_question_alone(tokenizer, tmp_path):
    """Whatever stands beside it in a batch, and in how many windows its text is."""
    config = tiny_config(save_tiny_backbone(tmp_path / "words", letters=True), task="squad", max_length=16)
    kind = AtLabels(stride=3)
    program = build_program(config, Form(("question", "context"), kind), 4).eval()
    texts = ["the old teacher", TEXTS[0], "the old", TEXTS[0][:40]]
    rows = {"question": ["who"] * 4, "context": texts, "label": [[0, 9, 0, 3]] * 4}
    encoded = kind.encode(tokenizer, rows, ("question", "context"), 16)
    each = [{name: x[i] for name, x in encoded.items()} for i in range(4)]
    collate, cpu = kind.collator(tokenizer), torch.device("cpu")
    whole, *single = (split_labels(collate(rows), cpu) for rows in (each, *([row] for row in each)))
    assert whole[0]["attention_mask"].any(-1).sum(-1).tolist()[::2] == [1, 1] and whole[1].shape[0] == 4
    assert {labels.shape[-1] for _, labels in (whole, *single)} == {64}  # of texts of any length: few shapes
    calibrate(program.net, [whole[0]])
    ranges = range_errors(program, [whole]).best_by_width()
    one, other = (sensitivity(program, batches, ranges).alone for batches in ([whole], single))
    groups = program.net.head.groups(whole[0])
    assert len(groups) == 3 and one.z.any()
    assert sorted(int(i) for _, at in groups for i in torch.arange(4)[at]) == [0, 1, 2, 3]  # each once, and whole
    assert sum(x["attention_mask"].sum() for x, _ in groups) == whole[0]["attention_mask"].sum()
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_labels_and_settings_are_checked():
    good, *wrong = [3, 5, 0, 4], [3, 5], [3, 5, 4, 4], [3, 5, 0, 4, 6], [3, 5, -1, 4], 7
    assert KIND.allows(np.array([good, *wrong], dtype=object)).tolist() == [True, *[False] * len(wrong)]
    assert KIND.laid_out([good, [1, 2, 0, 1, 5, 6]]).tolist() == [[3, 5, 0, 4, IGNORED, IGNORED], [1, 2, 0, 1, 5, 6]]
    assert KIND.constant_log_scores(np.array([[0, 4, 0, 1]]))[0] == pytest.approx(-math.log(10))
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        Spans(longest=0)


@pytest.mark.parametrize(("question", "text", "label", "length", "message"), [
    ("the " * 18, "a cat", [0, 2, 0, 1], 16, r"has 18 tokens, which leaves no room .* --max_length 16: raise it"),
    ("the " * 10, "a cat", [0, 2, 0, 1], 16, r"stride 3 is too large: .* has 3 tokens of the text: lower --task.stri"),
    ("who", "a cat", [0, 2, 6, 9], 16, r"an answer at \[6, 9\] is outside its text"),
    ("who", "a cat", [0, 2, 0, 1, 2, 9], 16, "is outside its text"),
])  # fmt: skip
def test_what_has_no_windows_is_refused(tokenizer, question, text, label, length, message):
    rows = {"question": [question], "context": [text], "label": [label]}
    with pytest.raises(ValueError, match=message):
        KIND.encode(tokenizer, rows, ("question", "context"), length)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow does not tell where its tokens stand in a text: spans need a fast"):
        next(windows_of(Slow(), QUESTIONS, TEXTS, 16, 3))


def test_a_tokenizer_that_leaves_the_end_of_a_text_out_is_refused(tokenizer):
    """As tokenizers 0.23.1 and 0.23.2 do: what follows the first window is cut off."""

    class Losing:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, pairs=None, **settings):
            if pairs is not None:
                pairs = [" ".join(pair.split()[:13]) for pair in pairs]
            return tokenizer(texts, pairs, **settings)

    long = " ".join(["a cat sleeps"] * 6)
    with pytest.raises(ValueError, match=r"end at character \d+, its tokens at 77: .* leaves the others out"):
        next(windows_of(Losing(), ["who"], [long], 16, 3))
    assert next(windows_of(tokenizer, ["who"], [long], 16, 3)).ends[-1] == 77
