"""Kinds of outcome as a user would add them, each by its own class and nothing else: a span, a choice, the next tokens.

As small as they can be: they show what the seam takes, not how these tasks are done well.
"""

import dataclasses
from typing import ClassVar

import datasets
import numpy as np
import pyro.distributions as dist
import torch

from pyro_blora.tasks import Task, get_task, register_task
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.heads import Head
from pyro_blora.tasks.likelihoods import IGNORED, Likelihood, register_likelihood


class Agreement:
    """Share of the answers that are right, IGNORED left out."""

    def compute(self, *, predictions, references):
        answers, truth = np.array(predictions), np.array(references)
        return {"agreement": float((answers == truth)[truth != IGNORED].mean())}


class _Common(Likelihood):
    one_row = False
    feature = datasets.Sequence(datasets.Value("int64"))
    allowed_labels = "allowed are lists of two places"

    def allows(self, labels):
        return np.array([np.shape(x) == (2,) for x in labels])

    def metric(self):
        return Agreement()


@register_likelihood("span")
@dataclasses.dataclass(frozen=True)
class Span(_Common):
    """The first and the last token of an answer: two categoricals over the tokens.  logits (B, T, 2), labels (B, 2)"""

    outputs = 2
    head = Head(
        auto_class="AutoModelForQuestionAnswering", task_type="QUESTION_ANS", peft_heads=("qa_outputs",),
        pipeline="question-answering", read=lambda out: torch.stack([out.start_logits, out.end_logits], -1),
    )  # fmt: skip
    dims: ClassVar = {"label": ("example", "end"), "probability": ("example", "end", "token")}
    examples = ((0, 1), (2, 2))

    def __call__(self, logits, *, scale=None):
        return dist.Categorical(logits=logits.mT.float()).to_event(1)

    def averaged(self, distribution, labels):
        return distribution.base_dist.probs

    def decision(self, mean):
        return mean.argmax(-1)

    def columns(self, outputs):
        mean = outputs.mean(0)
        return {name: mean[:, i].tolist() for i, name in enumerate(("start", "end"))}

    def read(self, table):
        return torch.tensor(np.stack([np.stack(table[name]) for name in ("start", "end")], 1))

    def predicted(self, outputs, generator):
        drawn = torch.multinomial(outputs.flatten(0, -2), 1, generator=generator)
        return {"label": drawn.view(outputs.shape[:-1]), "probability": outputs}

    def constants(self, labels):
        return [np.tile(pair, (len(labels), 1)) for pair in np.unique(labels, axis=0)]

    def constant_log_scores(self, labels):
        _, place, counts = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
        return np.log(counts / len(labels))[place.ravel()]


@register_likelihood("next_tokens")
@dataclasses.dataclass(frozen=True)
class NextTokens(_Common):
    """Every next token.  logits (B, T, vocabulary), labels (B, T): the tokens one to the right.

    Kept of every token: the probability of the label, and whether it is the most probable one.
    """

    outputs = 0  # the vocabulary's, which the model knows
    head_settings: ClassVar = {}
    head = Head(
        auto_class="AutoModelForCausalLM", task_type="CAUSAL_LM", peft_heads=(), pipeline="text-generation",
        is_new=False,
    )  # fmt: skip
    dims: ClassVar = {"label": ("example", "token"), "probability": ("example", "token")}
    examples = ((0, 1), (2, IGNORED))

    def collator(self, tokenizer):
        padded = super().collator(tokenizer)

        def collate(rows):
            batch = padded(rows)
            tokens = torch.where(batch["attention_mask"] > 0, batch["input_ids"], IGNORED)
            return {**batch, "labels": torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)}

        return collate

    def __call__(self, logits, *, scale=None):
        return _OfNext(dist.Categorical(logits=logits.float()), 1)

    def averaged(self, distribution, labels):
        asked = labels != IGNORED
        probs, label = distribution.base_dist.probs, torch.where(asked, labels, 0)[..., None]
        kept = torch.cat([probs.gather(-1, label), (probs.argmax(-1, keepdim=True) == label).to(probs)], -1)
        return kept * asked[..., None]

    def decision(self, mean):
        return torch.where(mean[..., 1] > 0.5, 1, 0)

    def scored(self, labels):
        return torch.where(labels == IGNORED, IGNORED, 1)

    def columns(self, outputs):
        return {"probability": outputs.mean(0)[..., 0].tolist(), "hit": outputs.mean(0)[..., 1].tolist()}

    def read(self, table):
        return torch.tensor(np.stack([np.stack(table[name]) for name in ("probability", "hit")], -1))

    def predicted(self, outputs, generator):
        return {"probability": outputs[..., 0]}

    def constants(self, labels):
        return [np.zeros_like(labels)]

    def constant_log_scores(self, labels):
        return np.zeros(len(labels))


class _OfNext(dist.Independent):
    def log_prob(self, value):
        asked = value != IGNORED
        return torch.where(asked, self.base_dist.log_prob(torch.where(asked, value, 0)), 0.0).sum(-1)


@register_likelihood("choice")
@dataclasses.dataclass(frozen=True)
class Choice(Categorical):
    """One of several texts: a class whose logits come from a row of tokens each.  inputs (B, C, T), logits (B, C)"""

    problem_type = None
    head_settings: ClassVar = {}

    @property
    def head(self):
        def example(rows):
            return {name: x[:, None].expand(-1, self.outputs, -1).contiguous() for name, x in rows.items()}

        return Head(auto_class="AutoModelForMultipleChoice", task_type=None, pipeline=None, example=example)

    def is_text(self, cell):
        return all(map(super().is_text, [cell] if isinstance(cell, str) else cell))

    def encode(self, tokenizer, rows, columns, max_length):
        pairs = zip(*(rows[column] for column in columns), strict=True)
        each = [tokenizer([text] * len(texts), texts, truncation=True, max_length=max_length) for text, texts in pairs]
        return {name: [found[name] for found in each] for name in each[0]}

    def collator(self, tokenizer):
        padded = super().collator(tokenizer)

        def collate(rows):
            inputs = [{k: x[i] for k, x in row.items() if k != "label"} for row in rows for i in range(self.outputs)]
            batch = {k: x.view(len(rows), self.outputs, -1) for k, x in padded(inputs).items()}
            return {**batch, "labels": torch.tensor([row["label"] for row in rows])}

        return collate


def _rows(make):
    def load(*, glue_dir=None, seed=0, n_train=None):
        splits = get_task("acceptability").load(seed=seed, n_train=n_train or 64)
        return {
            split: datasets.Dataset.from_list([make(text, i) for i, text in enumerate(table["sentence"][:96])])
            for split, table in splits.items()
        }

    return load


def _span(text, i):
    return {"sentence": text, "label": [1, min(3, len(text.split()))]}


def _choice(text, i):
    texts = [text, " ".join(reversed(text.split()))]
    return {"question": "the", "choices": texts[:: 1 if i % 2 else -1], "label": 1 - i % 2}


TASKS = (
    Task(name="spans", text_columns=("sentence",), kind=Span(), metric_name="agreement", load=_rows(_span)),
    Task(name="choices", text_columns=("question", "choices"), kind=Choice(("first", "second")),
         metric_name="accuracy", load=_rows(_choice)),
    Task(name="next", text_columns=("sentence",), kind=NextTokens(), metric_name="agreement",
         load=_rows(lambda text, i: {"sentence": text, "label": [0, 0]})),
)  # fmt: skip


def register():
    for task in TASKS:
        register_task(task)
