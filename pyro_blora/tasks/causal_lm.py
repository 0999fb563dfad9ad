"""A text that continues another: independent categoricals over the vocabulary, one a token, given all that went before.

Such a task is `Task(kind=CausalLM(), text_columns=("question",), metric_name="accuracy", ...)`: its column `label` has
the text that the network should write. It reads `question + separator` and then that text with its end; only tokens of
the text are scored. What the network writes by itself is `write`, token by token.
Shapes: S draws, E examples, B batch, T tokens, W tokens that are asked (of the longest example), V the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import Head
from .likelihoods import IGNORED, PAD_TO, Collate, Likelihood, Rows, register_likelihood
from .prompts import end_of, prompt_ids, text_ids
from .token_labels import asked_first
from .writing import Network, TextScores, Writer, greedy

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

OTHER = -1  # the answer at a token where another one than the text's is the most probable
LANGUAGE_MODEL = Head(
    auto_class="AutoModelForCausalLM", task_type="CAUSAL_LM", peft_heads=(), pipeline="text-generation", is_new=False
)
"""A pretrained language model: its `lm_head` stays frozen, and at 32 bit but in scope `encoder+head`."""


class NextTokens(dist.TorchDistribution):
    """Of the next token at every place of a text.  logits (..., B, T, V)

    `log_prob` takes tokens (B, T), IGNORED where nothing is asked, and sums over an example.
    """

    arg_constraints: ClassVar = {"logits": dist.constraints.real_vector}

    def __init__(self, logits: Tensor):
        self.logits = logits
        super().__init__(logits.shape[:-2], logits.shape[-2:-1], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NextTokens:
        return NextTokens(self.logits.expand(*batch_shape, *self.logits.shape[-2:]))

    def log_prob(self, value: Tensor) -> Tensor:
        labels = value.expand(self.logits.shape[:-1]).flatten()
        each = F.cross_entropy(self.logits.flatten(0, -2), labels, ignore_index=IGNORED, reduction="none")
        return -each.view(self.logits.shape[:-1]).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        drawn: Tensor = dist.Categorical(logits=self.logits).sample(sample_shape)
        return drawn


@register_likelihood("causal_lm")
@dataclasses.dataclass(frozen=True)
class CausalLM(Writer, Likelihood):
    """The text that continues another; the log-probability of an example is the sum over its tokens.

    separator: between what is read and what is written. longest: tokens of a text that is written. drawn: draws of the
    posterior each of which writes a text to score, beside the deployed allocation.
    """

    separator: str = " ||"
    longest: int = 64
    drawn: int = 3
    outputs = 0  # the vocabulary's, which the model knows
    head = LANGUAGE_MODEL
    one_row = False
    averages = "next tokens' probabilities"
    constant = "token frequencies"
    no_confidence = "a text of many tokens: no single confidence"
    left_out = ("Calibration",)
    dims: ClassVar = {"label": ("example", "token"), "probability": ("example", "token")}

    def __call__(self, logits: Tensor, *, scale: Tensor | None = None) -> NextTokens:
        return NextTokens(logits.float())

    @property
    def title(self) -> str:
        return "a text"

    @property
    def head_settings(self) -> dict[str, Any]:
        return {}

    def card(self, labels: Sequence[str]) -> str:
        return f"It continues a text that ends in `{self.separator.strip()}`."

    # --- labels ---

    def allows(self, labels: np.ndarray) -> np.ndarray:
        return np.array([self.is_text(label) for label in labels])

    @property
    def allowed_labels(self) -> str:
        return "allowed are texts that are not empty"

    @property
    def feature(self) -> datasets.Features:
        import datasets

        return datasets.Value("string")

    @property
    def examples(self) -> list[list[int]]:
        return [[5, 6, 7], [6, 5, IGNORED]]

    def laid_out(self, labels: Sequence[Any]) -> np.ndarray:
        """Tokens; a text, whose tokenizer is not known here, stands as its bytes."""
        rows = [list(label.encode()) if isinstance(label, str) else list(label) for label in labels]
        found = np.full((len(rows), max(map(len, rows))), IGNORED)
        for place, row in zip(found, rows, strict=True):
            place[: len(row)] = row
        return found

    # --- batches ---

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, columns: tuple[str, ...], max_length: int) -> Rows:
        """input_ids, and the token after each of them, IGNORED where that is no token of the text.

        Errors: ValueError for a text to read that leaves no room, and for a tokenizer without an end of a text.
        """
        found: dict[str, list[list[int]]] = {"input_ids": [], "label": []}
        ends = [end_of(tokenizer)]
        prompts = self._prompts(tokenizer, rows, columns)
        for prompt, text in zip(prompts, rows["label"], strict=True):
            if len(prompt) >= max_length:
                raise ValueError(
                    f"a text of {len(prompt)} tokens ({tokenizer.decode(prompt)[:60]!r}) leaves no room to continue it "
                    f"within {max_length}: raise --max_length"
                )
            written = text_ids(tokenizer, f" {text}") + ends
            tokens = (prompt + written)[: max_length + 1]
            found["input_ids"].append(tokens[:-1])
            found["label"].append([IGNORED] * (len(prompt) - 1) + tokens[len(prompt) :])
        return found

    def _prompts(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, columns: tuple[str, ...]) -> list[list[int]]:
        texts = zip(*(rows[column] for column in columns), strict=True)
        return [prompt_ids(tokenizer, " ".join(parts) + self.separator) for parts in texts]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate:
        """Padded on the right, where no token that is asked looks."""
        filling = {"input_ids": end_of(tokenizer), "attention_mask": 0, "labels": IGNORED}

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            longest = -(-max(len(row["input_ids"]) for row in rows) // PAD_TO) * PAD_TO
            found: dict[str, list[list[int]]] = {name: [] for name in filling}
            for row in rows:
                own = {"input_ids": row["input_ids"], "labels": row["label"]}
                own["attention_mask"] = [1] * len(row["input_ids"])
                for name, fill in filling.items():
                    found[name].append([*own[name], *[fill] * (longest - len(own[name]))])
            return {name: torch.tensor(x) for name, x in found.items()}

        return collate

    # --- predictions ---

    def averaged(self, distribution: NextTokens, labels: Tensor) -> Tensor:
        """Of every token that is asked, (..., B, W, 3): its probability, whether it is the most probable, its number
        plus one; 0 elsewhere."""
        places, asked = asked_first(labels)
        label = torch.where(asked, labels.gather(-1, places), 0)
        leading = distribution.logits.shape[:-3]
        places, label, asked = (x.expand(*leading, *x.shape) for x in (places, label, asked))
        logits = distribution.logits.take_along_dim(places[..., None], -2)  # (..., B, W, V)
        own = logits.take_along_dim(label[..., None], -1).squeeze(-1)
        hit = (own >= logits.amax(-1)).to(own)
        kept = torch.stack([(own - logits.logsumexp(-1)).exp(), hit, (label + 1).to(own)], -1)
        return kept * asked[..., None]

    def scored(self, labels: Tensor) -> Tensor:
        places, _ = asked_first(labels)
        return labels.gather(-1, places)

    def decision(self, mean: Tensor) -> Tensor:
        """The text's own token where it is the most probable one under more than half of the draws, else OTHER."""
        token = mean[..., 2].round().long() - 1
        return torch.where(token < 0, IGNORED, torch.where(mean[..., 1] > 0.5, token, OTHER))

    def cells(self, answers: Tensor) -> list[list[int]]:
        return [row[row != IGNORED].tolist() for row in answers]

    def columns(self, outputs: Tensor) -> dict[str, list[list[float]]]:
        mean = outputs.mean(0)
        rows = [each[each[:, 2] > 0] for each in mean]
        return {
            "token": [(row[:, 2].round().long() - 1).tolist() for row in rows],
            "probability": [row[:, 0].tolist() for row in rows], "top": [row[:, 1].tolist() for row in rows],
        }  # fmt: skip

    def read(self, table: pd.DataFrame) -> Tensor:
        rows = [
            torch.tensor(np.stack([probability, top, np.asarray(token) + 1.0], -1))
            for token, probability, top in zip(table["token"], table["probability"], table["top"], strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def placeholder(self, texts: Sequence[Any]) -> str:
        return "."

    # --- texts ---

    def write(
        self, network: Network, tokenizer: PreTrainedTokenizerBase, rows: Rows, columns: tuple[str, ...],
        batch_size: int,
    ) -> list[str]:  # fmt: skip
        prompts = self._prompts(tokenizer, rows, columns)
        return greedy(network, tokenizer, prompts, longest=self.longest, batch_size=batch_size)

    def text_scores(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return TextScores().compute(predictions=texts, references=references)

    # --- ArviZ ---

    def predicted(self, outputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """probability: nan beyond the tokens of an example."""
        return {"probability": torch.where(outputs[..., 2] > 0, outputs[..., 0], torch.nan)}

    # --- scores ---

    def metric(self) -> TokenAccuracy:
        return TokenAccuracy()

    def constants(self, labels: np.ndarray) -> list[np.ndarray]:
        tokens, counts = np.unique(labels[labels != IGNORED], return_counts=True)
        return [np.where(labels == IGNORED, IGNORED, tokens[counts.argmax()])]

    def constant_log_scores(self, labels: np.ndarray) -> np.ndarray:
        asked = labels != IGNORED
        _, places, counts = np.unique(labels[asked], return_inverse=True, return_counts=True)
        each = np.zeros(labels.shape)
        each[asked] = np.log(counts / counts.sum())[places.ravel()]
        return np.asarray(each.sum(1))

    def right(self, decision: Tensor, labels: Tensor) -> float:
        """Share of the tokens."""
        return float((decision == labels)[labels != IGNORED].double().mean())

    def details(self, mean: Tensor, labels: Tensor) -> dict[str, Any]:
        """Of tokens: perplexity, the exponential of the mean negative log of their probabilities over draws."""
        asked = labels != IGNORED
        each = -mean[..., 0][asked].double().clamp(min=torch.finfo(torch.float32).tiny).log()
        tokens = {"tokens": int(asked.sum()), "nll": float(each.mean()), "perplexity": float(each.mean().exp())}
        return {"perplexity": tokens["perplexity"], "tables": {"Tokens, at averaged probabilities": [tokens]}}

    # --- gates, distillation ---

    def fisher_directions(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """p - e_y of a token y that is drawn, at every place that is asked."""
        p = logits.float().softmax(-1)
        drawn = dist.Categorical(probs=p).sample()
        directions = p.scatter_add(-1, drawn[..., None], -torch.ones_like(p[..., :1]))
        return directions * (labels != IGNORED)[..., None]

    def divergence(self, teacher: Any, student: Any, labels: Tensor) -> Tensor:
        log_p, log_q = (each.logits.log_softmax(-1) for each in (teacher, student))
        return torch.where(labels != IGNORED, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0).sum(-1)


class TokenAccuracy:
    """`accuracy`: the share of the tokens that were the most probable, given the true ones before them."""

    def compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        """Lists of tokens; where a reference is IGNORED nothing is scored.  Errors: ValueError for no token."""
        pairs = [np.concatenate([np.asarray(row) for row in rows]) for rows in (predictions, references)]
        asked = pairs[1] != IGNORED
        if not asked.any():
            raise ValueError("next tokens cannot be scored: no token is asked")
        return {"accuracy": float((pairs[0] == pairs[1])[asked].mean())}
