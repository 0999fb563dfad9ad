"""A part of a text that answers a question: one distribution over all spans of the text, however many windows it has.

Such a task is `Task(kind=Spans(), text_columns=("question", "text"), ...)`. Its column `label` has a list of numbers:
that of the text, by which a metric finds it (`SpanScores`), how many words it has, and of each reference the first
character and the one after the last. The first reference is learned; all of them score. The likelihood is that of
span_distribution.py.
Shapes: S draws, E examples, B batch, W windows, T tokens of a window, M tokens of a text (of the longest).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import Head
from .likelihoods import IGNORED, Collate, Likelihood, Rows, register_likelihood
from .span_distribution import ENDS, HEAD, NEVER, OWN, STARTS, SpanOfText, log_total, marginals
from .span_scores import SameSpan, SpanScores
from .windows import padded, stacked, windows_of

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

_SAME = 8  # spans of tokens that are looked at for each of characters: more may have its characters, with little
_TEXT_TO = 64  # lengths of texts in steps of 64 tokens: few shapes of labels, as each is a CUDA graph of its own


@register_likelihood("spans")
@dataclasses.dataclass(frozen=True)
class Spans(Likelihood):
    """A part of a text; the log-probability of an example is that of its span among all of the text.

    stride: tokens that neighbouring windows share. longest: tokens of an answer that is given (of any length is what is
    learned). best: spans that are kept, the most probable ones of every draw.
    """

    stride: int = 128
    longest: int = 30
    best: int = 20
    outputs = 2
    head = Head(
        auto_class="AutoModelForQuestionAnswering", task_type="QUESTION_ANS", peft_heads=("qa_outputs",),
        pipeline="question-answering", windows=True,
        read=lambda found: torch.stack([found.start_logits, found.end_logits], -1),
    )  # fmt: skip
    one_row = False
    averages = "the spans' probabilities"
    constant = "the whole text, and of the NLL any span of words"
    no_confidence = "a probability of every span: no classes"
    left_out = ("Calibration",)
    dims: ClassVar = {
        "label": ("example", "field"), "span": ("example", "edge"), "probability": ("example",),
        "entropy": ("example",),
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in (("stride", 0), ("longest", 1), ("best", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def title(self) -> str:
        return "a span"

    def __call__(self, logits: Tensor, *, scale: Tensor | None = None) -> SpanOfText:
        self.require_outputs(logits)
        return SpanOfText(logits.float())

    def card(self, labels: Sequence[str]) -> str:
        return "Its outputs are the logits of an answer's first and last token. It was trained without token types."

    # --- labels ---

    def allows(self, labels: np.ndarray) -> np.ndarray:
        def is_one(x: Any) -> bool:
            whole = np.ndim(x) == 1 and len(x) >= 4 and len(x) % 2 == 0 and np.asarray(x).dtype.kind in "iu"
            return whole and min(x) >= 0 and all(start < end for start, end in zip(x[2::2], x[3::2], strict=True))

        return np.array([is_one(x) for x in labels])

    @property
    def allowed_labels(self) -> str:
        return "allowed are lists [number of the text, words in it, first character, the one after the last, ...]"

    @property
    def feature(self) -> datasets.Features:
        import datasets

        return datasets.Sequence(datasets.Value("int64"))

    @property
    def examples(self) -> list[list[int]]:
        return [[0, 2, 0, 1], [0, 2, 0, 3]]

    def laid_out(self, labels: Sequence[Any]) -> np.ndarray:
        return padded(labels, IGNORED).numpy()

    def placeholder(self, texts: Sequence[Any]) -> list[int]:
        """A label without an answer, whatever the text begins with."""
        return [0, 2]

    # --- batches ---

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, columns: tuple[str, ...], max_length: int) -> Rows:
        """The inputs of all windows, and as `label` the head, each token's window, place there and characters.

        A label without an answer has the text's first token in the head, whose probability nobody asks for.
        Errors: ValueError for what has no windows (`windows_of`), and for an answer outside its text.
        """
        found: dict[str, list[Any]] = {"label": []}
        questions, texts = (rows[column] for column in columns)
        every = windows_of(tokenizer, questions, texts, max_length, self.stride)
        for windows, text, label in zip(every, texts, rows["label"], strict=True):
            number, words, *edges = label
            own = windows.tokens_of(*edges[:2]) if edges else (0, 0)
            if own is None or max(edges, default=0) > len(text):
                raise ValueError(f"an answer at {edges[:2]} is outside its text ({text[:60]!r}): correct its place")
            for name, row in windows.inputs.items():
                found.setdefault(name, []).append(row)
            parts = ([number, words, *own, *edges], *(x.tolist() for x in windows[1:]))
            found["label"].append([list(part) for part in parts])
        return found

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate:
        together = super().collator(tokenizer)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            windows = [
                {name: x[w] for name, x in row.items() if name != "label"}
                for row in rows for w in range(len(row["input_ids"]))
            ]  # fmt: skip
            inputs = stacked(together(windows), [len(row["input_ids"]) for row in rows])
            T = inputs["input_ids"].shape[-1]
            heads, windows_, tokens, *edges = zip(*(row["label"] for row in rows), strict=True)
            places = [[w * T + t for w, t in zip(*each, strict=True)] for each in zip(windows_, tokens, strict=True)]
            parts = [padded(x, IGNORED) for x in (heads, places, *edges)]
            most = -(-max(x.shape[1] for x in parts) // _TEXT_TO) * _TEXT_TO
            labels = torch.stack([F.pad(x, (0, most - x.shape[1]), value=IGNORED) for x in parts], 1)
            return {**inputs, "labels": labels}

        return collate

    # --- predictions ---

    def averaged(self, distribution: SpanOfText, labels: Tensor) -> Tensor:
        """(..., B, 1 + best, 3): the entropy of all spans, number and words; then spans of characters with their
        probabilities, the most probable first, 0 where there are no more.

        Tokens may share a character (bytes of an emoji): the probabilities of spans of the same characters are added.
        """
        a, b = distribution.edges(labels)
        total, (first, last) = log_total(a, b), marginals(a, b)
        entropy = total - (first * a).sum(-1) - (last * b).sum(-1)
        each = a[..., None] + F.pad(b, (0, self.longest - 1), value=NEVER).unfold(-1, self.longest, 1)  # (..., D, L)
        flat = each.flatten(-2)
        score, place = flat.topk(min(_SAME * self.best, flat.shape[-1]), dim=-1)
        start, width = place // self.longest, place % self.longest
        characters = (
            labels[..., row, :].expand(a.shape).gather(-1, at.clamp(max=a.shape[-1] - 1))
            for row, at in ((STARTS, start), (ENDS, start + width))
        )
        p = (score - total[..., None]).exp().clamp(min=torch.finfo(score.dtype).tiny)  # 0 is where no span is
        spans = self._most_probable(torch.stack([*characters, p], -1) * (score > NEVER / 2)[..., None])
        head = torch.stack([entropy, *labels[..., HEAD, :2].expand(*entropy.shape, 2).unbind(-1)], -1)
        return torch.cat([head[..., None, :], F.pad(spans, (0, 0, 0, self.best - spans.shape[-2]))], -2)

    def _most_probable(self, spans: Tensor) -> Tensor:
        """The `best` of spans (..., N, 3) of characters and probabilities, after those of equal ones are added."""
        edges, p = spans[..., :2].double(), spans[..., 2:].double()
        order = (edges[..., 0] * (edges.max() + 1) + edges[..., 1]).argsort(-1)[..., None]
        edges, p = edges.take_along_dim(order, -2), p.take_along_dim(order, -2)
        group = F.pad((edges.diff(dim=-2) != 0).any(-1), (1, 0)).cumsum(-1)[..., None]  # one number for equal spans
        found = torch.zeros_like(edges).scatter(-2, group.expand_as(edges), edges)
        p, best = torch.zeros_like(p).scatter_add(-2, group, p).topk(min(self.best, p.shape[-2]), dim=-2)
        return torch.cat([found.take_along_dim(best, -2), p], -1).to(spans.dtype)

    def scored(self, labels: Tensor) -> Tensor:
        head = torch.cat([labels[:, HEAD, : OWN.start], labels[:, HEAD, OWN.stop :]], -1)
        return head[:, (head != IGNORED).any(0)]

    def mean(self, outputs: Tensor) -> Tensor:
        """Of every span that is among the best of a draw; under draws where it is not, its probability counts as 0."""
        if len(outputs) == 1:
            return outputs[0]
        head = torch.cat([outputs[:, :, :1, :1].mean(0), outputs[0, :, :1, 1:]], -1)
        each = outputs[:, :, 1:].transpose(0, 1).flatten(1, 2)  # (E, S best, 3)
        shares = torch.tensor([1.0, 1.0, 1.0 / len(outputs)], dtype=torch.float64, device=each.device)
        return torch.cat([head, self._most_probable(each.double() * shares).to(outputs.dtype)], 1)

    def decision(self, mean: Tensor) -> Tensor:
        return torch.cat([mean[:, 0, 1:], mean[:, 1, :2]], -1).round().long()

    def columns(self, outputs: Tensor) -> dict[str, Any]:
        """spans: of characters, the most probable first; probabilities: theirs. entropy: of all spans, nats, averaged
        over draws."""
        mean = self.mean(outputs)
        kept = [each[each[:, 2] > 0] for each in mean[:, 1:]]
        return {
            "spans": [each[:, :2].round().long().tolist() for each in kept],
            "probabilities": [each[:, 2].tolist() for each in kept], "entropy": mean[:, 0, 0].tolist(),
        }  # fmt: skip

    def read(self, table: pd.DataFrame) -> Tensor:
        found = torch.zeros(len(table), 1 + self.best, 3, dtype=torch.float64)
        columns = (table[name] for name in ("spans", "probabilities", "entropy", "label"))
        for own, spans, probabilities, entropy, label in zip(found, *columns, strict=True):
            own[0] = torch.tensor([entropy, *label[:2]])
            own[1 : len(spans) + 1] = torch.tensor([[*span, p] for span, p in zip(spans, probabilities, strict=True)])
        return found

    def answers(self, outputs: Tensor, scale: Tensor) -> dict[str, Any]:
        return self.columns(outputs)

    def in_words(self, found: dict[str, Any], texts: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        """answer and probability: of the first of `n_best`, the texts of all spans."""
        each = zip(texts, found["spans"], strict=True)
        cut = [[text[start:end] for start, end in spans] for (*_, text), spans in each]
        return {
            "answer": [each[0] for each in cut], "probability": [each[0] for each in found["probabilities"]],
            "entropy": found["entropy"], "n_best": cut, **found,
        }  # fmt: skip

    # --- ArviZ ---

    def predicted(self, outputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Of the most probable span under every draw; the entropy is that of all spans."""
        span = outputs[:, :, 1]
        return {"span": span[..., :2].round().int(), "probability": span[..., 2], "entropy": outputs[:, :, 0, 0]}

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"edge": ["first", "after the last"]}

    # --- scores ---

    def metric(self) -> SameSpan:
        return SameSpan()

    def metric_on(self, rows: pd.DataFrame, columns: tuple[str, ...]) -> SpanScores:
        texts = zip(rows["label"], rows[columns[-1]], strict=True)
        return SpanScores({int(label[0]): text for label, text in texts})

    def constants(self, labels: np.ndarray) -> list[np.ndarray]:
        whole = np.full_like(labels, IGNORED)
        whole[:, :2], whole[:, OWN] = labels[:, :2], (0, np.iinfo(np.int32).max)  # beyond any text
        return [whole]

    def constant_log_scores(self, labels: np.ndarray) -> np.ndarray:
        words = np.maximum(labels[:, 1], 1).astype(float)
        return np.asarray(-np.log(words * (words + 1) / 2))

    def right(self, decision: Tensor, labels: Tensor) -> float:
        """Share of the answers whose characters are those of a reference."""
        same = (labels[:, 2:].unflatten(1, (-1, 2)) == decision[:, None, OWN]).all(-1)
        return float(same.any(-1).double().mean())

    # --- report ---

    def worst(self, table: pd.DataFrame, count: int) -> tuple[str, pd.DataFrame]:
        """The answers that are at none of the references, the most probable first."""
        question, text = [name for name in table if isinstance(table[name].iloc[0], str)][:2]
        true = [
            [each[start:end] for start, end in zip(label[2::2], label[3::2], strict=True)]
            for each, label in zip(table[text], table["label"], strict=True)
        ]  # fmt: skip
        shown = table[[question, "answer", "probability"]].assign(references=[" | ".join(set(x)) for x in true])
        wrong = shown[[answer not in own for answer, own in zip(table["answer"], true, strict=True)]]
        shown = wrong.sort_values("probability", ascending=False).head(count)
        sentence = f"{len(wrong)} of {len(table)} answers are not a reference's text; these are the most probable."
        return sentence, shown.assign(probability=shown["probability"].map("{:.3f}".format))

    # --- gates, distillation ---

    def fisher_directions(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        with torch.enable_grad():
            here = logits.detach().clone().requires_grad_()
            distribution = self(here)
            (slope,) = torch.autograd.grad(distribution.log_prob(distribution.drawn(labels)).sum(), here)
        return slope

    def divergence(self, teacher: Any, student: Any, labels: Tensor) -> Tensor:
        (a, b), (c, d) = teacher.edges(labels), student.edges(labels)
        first, last = marginals(a, b)
        apart: Tensor = (first * (a - c)).sum(-1) + (last * (b - d)).sum(-1)
        return apart - log_total(a, b) + log_total(c, d)
