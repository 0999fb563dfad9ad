"""Paired comparisons of runs: over the seeds that both have, and over the examples of their evaluation set."""

from pathlib import Path

import numpy as np
import pandas as pd

BOOTSTRAP = 2000
INTERVAL = (2.5, 97.5)  # percent


def predictions(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "predictions.parquet", columns=["label", "decision", "log_likelihood"])


def score(table: pd.DataFrame, metric: str) -> float:
    """Of the decisions: accuracy, or Pearson's correlation."""
    if metric == "accuracy":
        return float((table["decision"] == table["label"]).mean())
    if metric == "pearson":
        return float(np.corrcoef(table["decision"], table["label"])[0, 1])
    raise ValueError(f"comparisons know accuracy and pearson, got {metric!r}: add the metric to compare.py")


def paired(
    ours: list[Path], theirs: list[Path], metric: str, *, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Difference ours - theirs of the score and of the NLL, averaged over seeds, with 95 % bootstrap intervals.

    ours, theirs: run folders by seed, in the same order. Seeds and examples are drawn anew in each of 2,000 bootstrap
    samples, the same examples for both methods.
    """
    pairs = [(predictions(a), predictions(b)) for a, b in zip(ours, theirs, strict=True)]
    generator, draws = np.random.default_rng(seed), {"score": [], "nll": []}

    def differences(tables) -> tuple[float, float]:
        scores = [score(a, metric) - score(b, metric) for a, b in tables]
        nlls = [float((b["log_likelihood"] - a["log_likelihood"]).mean()) for a, b in tables]
        return float(np.mean(scores)), float(np.mean(nlls))

    for _ in range(BOOTSTRAP):
        rows = generator.integers(len(pairs[0][0]), size=len(pairs[0][0]))
        which = generator.integers(len(pairs), size=len(pairs))
        for key, value in zip(draws, differences([tuple(x.iloc[rows] for x in pairs[i]) for i in which]), strict=True):
            draws[key].append(value)
    means = dict(zip(draws, differences(pairs), strict=True))
    return {key: (means[key], *np.percentile(values, INTERVAL)) for key, values in draws.items()}


def rank_differences(folders: list[Path], *, seed: int = 0) -> tuple[float, float, float, int]:
    """E[rank] of `value` minus the mean of `query` and `key`, layer by layer: mean and 95 % bootstrap interval.

    Layers of all runs are drawn anew in each bootstrap sample.  Returns (mean, low, high, layers).
    """
    import arviz

    found = []
    for folder in folders:
        marginals = arviz.from_netcdf(folder / "posterior.nc")["constant_data"]["g_marginal"]
        ranks = (1 + marginals.sum("rank", skipna=False)).to_series().dropna()
        table = ranks.rename_axis("projection").reset_index(name="rank")
        table[["layer", "type"]] = table["projection"].str.rsplit(".", n=1, expand=True)
        wide = table.pivot(index="layer", columns="type", values="rank")
        found.append((wide["value"] - (wide["query"] + wide["key"]) / 2).to_numpy())
    values, generator = np.concatenate(found), np.random.default_rng(seed)
    means = values[generator.integers(len(values), size=(BOOTSTRAP, len(values)))].mean(1)
    return (float(values.mean()), *np.percentile(means, INTERVAL), len(values))
