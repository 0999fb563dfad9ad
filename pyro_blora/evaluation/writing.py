"""Scores of the texts that a trained program writes on held-out rows: deployed, and under draws of the posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gates import Gates
from ..posterior.writing import write
from ..program import BayesianLoRA
from ..progress import labelled
from ..tasks.likelihoods import Rows
from ..tasks.writing import Writer

_SHOWN = 10  # texts in the report


def scored_texts(
    program: BayesianLoRA, tokenizer: Any, rows: Rows, draws: Gates[Tensor], theta: Tensor | None, batch_size: int
) -> dict[str, Any]:
    """`written`: scores of the deployed texts, `over_draws` (mean and standard deviation), and `tables` of both.

    rows: columns of held-out rows; those that read alike have one text, whose references are all their labels.
    {} for a kind of outcome that writes nothing.
    """
    kind = program.likelihood
    if not isinstance(kind, Writer):
        return {}
    read = list(zip(*(rows[name] for name in program.text_columns), strict=True))
    references: dict[tuple[str, ...], list[str]] = {}
    for row, label in zip(read, rows["label"], strict=True):
        references.setdefault(row, []).append(label)
    alone = dict(zip(program.text_columns, map(list, zip(*references, strict=True)), strict=True))
    with labelled("deployed"):
        texts = write(program, tokenizer, alone, None, None, batch_size)
    scores = kind.text_scores(texts, [*references.values()])
    each = []
    for i in range(min(kind.drawn, len(draws.z))):
        with labelled(f"draw {i + 1}"):
            at = Gates(draws.z[i], draws.g[i])
            drawn = write(program, tokenizer, alone, at, None if theta is None else theta[i], batch_size)
        each.append(kind.text_scores(drawn, [*references.values()]))
    over = {name: torch.tensor([scores_of[name] for scores_of in each]) for name in scores} if each else {}
    table = [
        {"score": name, "deployed": value}
        | ({"mean over draws": float(over[name].mean()), "std over draws": float(over[name].std(correction=0))}
           if each else {})
        for name, value in scores.items()
    ]  # fmt: skip
    shown = [
        {"read": " | ".join(row), "written": text, "a reference": own[0]}
        for (row, own), text in zip(references.items(), texts, strict=True)
    ]  # fmt: skip
    return {
        "written": {"texts": len(texts), "scores": scores, "draws": len(each), "over_draws": {
            name: {"mean": float(x.mean()), "std": float(x.std(correction=0))} for name, x in over.items()}},
        "tables": {f"Scores of {len(texts)} texts that were written": table,
                   "The first of these texts, deployed": shown[:_SHOWN]},
    }  # fmt: skip
