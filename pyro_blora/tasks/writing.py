"""Texts that a network writes token by token, the most probable one each time, and their scores.

Scores, of texts that have one or several references each: `bleu` (sacrebleu's, 13a, as a share), `nist` (NLTK's, to
5-grams) and `rougeL` (the best F of a text's references, averaged). They run without a network.
Sources: Post (2018) for sacreBLEU; Doddington (2002); Lin (2004).
"""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..progress import phase
from .prompts import end_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .likelihoods import Rows

Network = Any  # a model of transformers or PEFT, with `generate`
PACKAGES = ("sacrebleu", "nltk", "rouge_score")
_SHOWN_FROM = 4  # batches, from which progress is shown


class Writer(abc.ABC):
    """A kind of outcome whose answers are texts that the network writes, token by token."""

    drawn: int
    """Draws of the posterior that write texts to score, beside the deployed allocation."""

    @abc.abstractmethod
    def write(
        self, network: Network, tokenizer: PreTrainedTokenizerBase, rows: Rows, columns: tuple[str, ...],
        batch_size: int,
    ) -> list[str]:  # fmt: skip
        """A text for each row."""

    @abc.abstractmethod
    def text_scores(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Of texts, each with its references: larger is better, the headline first."""


def greedy(
    network: Network, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], *, longest: int,
    batch_size: int,
) -> list[str]:  # fmt: skip
    """What is written after each prompt, at most `longest` tokens; prompts of similar length go together."""
    end, device = end_of(tokenizer), next(network.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    texts = [""] * len(prompts)

    def write(batch: list[int]) -> None:
        width = len(prompts[batch[0]])
        # padded on the left, so that all go on at the same place
        rows = torch.tensor([[end] * (width - len(prompts[i])) + prompts[i] for i in batch], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        with torch.no_grad():
            found = network.generate(
                input_ids=rows, attention_mask=mask, max_new_tokens=longest, do_sample=False, num_beams=1,
                pad_token_id=end, eos_token_id=end, use_cache=True,
            )  # fmt: skip
        for i, tokens in zip(batch, found[:, width:].tolist(), strict=True):
            own = tokens[: tokens.index(end)] if end in tokens else tokens
            texts[i] = str(tokenizer.decode(own, skip_special_tokens=True)).strip()

    if len(batches) < _SHOWN_FROM:
        for batch in batches:
            write(batch)
        return texts
    with phase("writing texts", len(batches), unit="batches") as shown:
        for batch in shown.over(batches):
            write(batch)
    return texts


def require_packages(task: str) -> None:
    """Errors: ValueError where a package of the scores is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"task {task!r} scores texts by {', '.join(missing)}: pip install 'pyro-blora[decoder]'")


class TextScores:
    """bleu, nist and rougeL of texts."""

    def compute(self, *, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """references: one or several texts of each.  Errors: ValueError for a text without any."""
        if not predictions or not all(references):
            raise ValueError("texts are scored against references: give each text one or more")
        return {"bleu": _bleu(predictions, references), "nist": _nist(predictions, references),
                "rougeL": _rouge(predictions, references)}  # fmt: skip


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    import sacrebleu

    most = max(map(len, references))
    streams: list[list[Any]] = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(texts), streams).score) / 100


def _nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from nltk.translate.nist_score import corpus_nist

    cut: Callable[[str], list[str]] = _tokens()
    words = [cut(x) for x in texts]
    longest = max(map(len, words))  # NLTK divides by the number of sequences of each length
    if not longest:
        return 0.0
    return float(corpus_nist([[cut(x) for x in each] for each in references], words, n=min(5, longest)))


def _tokens() -> Callable[[str], list[str]]:
    """The words that BLEU counts."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer = Tokenizer13a()
    return lambda text: str(tokenizer(text)).split()


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    each = [scorer.score_multi(list(x), text)["rougeL"].fmeasure for x, text in zip(references, texts, strict=True)]
    return float(sum(each) / len(each))
