"""Evaluation: posterior predictive and deployed allocation, split over processes."""

from math import nan
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import exact_tensors
from ..adapters.ranges import clipped
from ..bops import expected_bops
from ..build import Parts
from ..distributed import gathered, own_share
from ..gates import Gates
from ..posterior.draws import deployed, draw, draw_weights
from ..posterior.prediction import Prediction, predict
from ..progress import labelled, phase
from ..tasks.batching import batches_by_length, by_length, loader, on_device, take
from .metrics import scores_of

_ELBO_EXAMPLES, _ELBO_DRAWS = 512, 4  # training rows and discrete draws behind elbo_per_example
_RANGE_EXAMPLES = 128  # training rows on which clipped values are counted


class Evaluated(NamedTuple):
    """draws: of the gates; theta: of the weights, where they are random; pairs: averaged over draws, and deployed, by
    split; fitted: of training rows; beyond (L, T); by_rank: scores of every rank, where the guide serves them.
    """

    draws: Gates
    theta: Tensor | None
    pairs: dict[str, tuple[Prediction, Prediction]]
    fitted: Prediction
    beyond: Tensor
    by_rank: list[dict]


def evaluate(parts: Parts) -> Evaluated:
    program, config = parts.program, parts.config
    draws = draw(program, config.draws, seed=config.seed)
    theta = draw_weights(program, config.draws, seed=config.seed)
    splits = [split for split in parts.tokens if split != "train"]
    pairs = {split: _averaged_and_deployed(parts, split, draws, theta) for split in splits}
    train = take(parts.tokens["train"], _ELBO_EXAMPLES, config.seed)
    few = draw(program, _ELBO_DRAWS, seed=config.seed)
    random = draw_weights(program, _ELBO_DRAWS, seed=config.seed) if program.weights.in_training else None
    fitted = predicted(parts, "train", few, random, rows=train)
    rows = take(parts.tokens["train"], _RANGE_EXAMPLES, config.seed)
    load, _ = by_length(rows, parts.collate, 2 * config.batch_size)
    with phase("counting clipped values", len(load), unit="batches") as shown:
        beyond = clipped(program.net, shown.over(on_device(load, program.log_scale.device)))
    by_rank = _by_rank(parts) if program.gate_guide.serves_every_rank else []
    return Evaluated(draws, theta, pairs, fitted, beyond, by_rank)


def with_members(prediction: Prediction, split: str, members: list[Path]) -> Prediction:
    """The predictions of an ensemble: each fit's own mean is a draw. members: folders of the further fits."""
    import pandas as pd

    tables = [pd.read_parquet(folder / predictions_file(split)) for folder in members]
    outputs = [prediction.mean, *(prediction.likelihood.read(table) for table in tables)]
    scores = [prediction.log_score]
    for table in tables:  # of another task's sentences, to which no answer is right, nothing is scored
        scored = "log_likelihood" in table
        scores.append(torch.tensor(table["log_likelihood"].to_numpy()) if scored else torch.full_like(scores[0], nan))
    means, log_scores = (torch.stack([x.to(parts[0].dtype) for x in parts]) for parts in (outputs, scores))
    return Prediction(means, log_scores, prediction.labels, prediction.likelihood)


def predictions_file(split: str) -> str:
    return "predictions.parquet" if split == "eval" else f"predictions_{split.removeprefix('eval_')}.parquet"


def _averaged_and_deployed(
    parts: Parts, split: str, draws: Gates, theta: Tensor | None
) -> tuple[Prediction, Prediction]:
    config, program = parts.config, parts.program
    mode = Gates(*(x[None] for x in deployed(program)))
    if config.average_over == "dropout" or (program.net.layers() and not all(exact_tensors(mode.z))):
        seed = config.seed if config.average_over == "dropout" else None
        return predicted(parts, split, draws, theta, dropout_seed=seed), predicted(parts, split, None)
    # nothing is rounded: it goes along as one more draw, and shares a forward with those that equal it
    gates = Gates(*(torch.cat(pair) for pair in zip(draws, mode, strict=True)))
    if theta is not None:
        theta = torch.cat([theta, program.weights.mean.detach()[None]])
    both = predicted(parts, split, gates, theta)
    return both.of_draws(slice(config.draws)), both.of_draws(slice(config.draws, None))


def _by_rank(parts: Parts) -> list[dict]:
    """Scores of the deployed bit widths with the same rank everywhere, from 1 to R."""
    layout, z = parts.program.layout, deployed(parts.program).z
    ranks = torch.arange(layout.rank, device=z.device)
    g = (ranks[:-1] < ranks[:, None, None]).float().expand(-1, *layout.g_shape)  # (R, L, R - 1)
    gates = Gates(z.expand(layout.rank, *z.shape), g)
    with labelled("every rank"):
        prediction, bops = predicted(parts, "eval", gates), expected_bops(layout, *gates)
    return [
        {
            "rank": i + 1, **scores_of(parts.task, prediction.of_draws(slice(i, i + 1))),
            "bops": {"adapted_ratio": float(bops.adapted_ratio[i]), "model_ratio": float(bops.model_ratio[i])},
        }
        for i in range(layout.rank)
    ]  # fmt: skip


def predicted(
    parts: Parts, split: str, draws: Gates | None, theta: Tensor | None = None, *, rows=None,
    dropout_seed: int | None = None,
) -> Prediction:  # fmt: skip
    """Of all rows of a split (or of `rows`), on every process, which each predicts some of; see `posterior.predict`.

    draws: None for the deployed allocation.
    """
    rows = parts.tokens[split] if rows is None else rows
    mine = own_share(batches_by_length(rows, 2 * parts.config.batch_size))
    load = on_device(loader(rows, parts.collate, mine), parts.program.log_scale.device)
    with phase(f"predicting {split}", len(mine), unit="batches") as shown:
        prediction = predict(parts.program, shown.over(load), gates=draws, weights=theta, dropout_seed=dropout_seed)
    found = gathered((prediction, [i for batch in mine for i in batch]))
    order = torch.tensor([i for _, numbers in found for i in numbers])
    return Prediction.joined([part for part, _ in found]).restored(order)
