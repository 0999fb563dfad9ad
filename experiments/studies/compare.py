"""Paired comparisons of cells: over the seeds that both methods have, and over the examples of their evaluation set."""

import numpy as np

BOOTSTRAP = 2000
INTERVAL = (2.5, 97.5)  # percent


def _arrays(cell: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in cell["examples"].items()}


def score(examples: dict[str, np.ndarray], metric: str) -> float:
    """Of the decisions: accuracy, or Pearson's correlation."""
    if metric == "accuracy":
        return float((examples["decision"] == examples["label"]).mean())
    if metric == "pearson":
        return float(np.corrcoef(examples["decision"], examples["label"])[0, 1])
    raise ValueError(f"comparisons know accuracy and pearson, got {metric!r}: add the metric to compare.py")


def paired(ours: list[dict], theirs: list[dict], metric: str, *, seed: int = 0) -> dict[str, tuple[float, ...]]:
    """Difference ours - theirs of the score and of the NLL, averaged over seeds, with 95 % bootstrap intervals.

    ours, theirs: cells by seed, in the same order. Seeds and examples are drawn anew in each of 2,000 bootstrap
    samples, the same examples for both methods.
    """
    pairs = [(_arrays(a), _arrays(b)) for a, b in zip(ours, theirs, strict=True)]
    size, generator = len(pairs[0][0]["label"]), np.random.default_rng(seed)

    def differences(tables, rows) -> tuple[float, float]:
        taken = [[{name: x[rows] for name, x in table.items()} for table in pair] for pair in tables]
        scores = [score(a, metric) - score(b, metric) for a, b in taken]
        nlls = [(b["log_likelihood"] - a["log_likelihood"]).mean() for a, b in taken]
        return float(np.mean(scores)), float(np.mean(nlls))

    samples = []
    for _ in range(BOOTSTRAP):
        rows = generator.integers(size, size=size)
        samples.append(differences([pairs[i] for i in generator.integers(len(pairs), size=len(pairs))], rows))
    means, (low, high) = differences(pairs, slice(None)), np.percentile(samples, INTERVAL, axis=0)
    return {key: (means[i], low[i], high[i]) for i, key in enumerate(("score", "nll"))}


def rank_differences(cells: list[dict], *, seed: int = 0) -> tuple[float, float, float, int]:
    """E[rank] of `value` minus the mean of `query` and `key`, layer by layer: mean and 95 % bootstrap interval.

    Layers of all cells are drawn anew in each bootstrap sample.  Returns (mean, low, high, layers).
    """
    values = []
    for cell in cells:
        layers = {name.rpartition(".")[0] for name in cell["ranks"]}
        ranks = {layer: [cell["ranks"][f"{layer}.{kind}"] for kind in ("value", "query", "key")] for layer in layers}
        values += [value - (query + key) / 2 for value, query, key in ranks.values()]
    values, generator = np.asarray(values), np.random.default_rng(seed)
    means = values[generator.integers(len(values), size=(BOOTSTRAP, len(values)))].mean(1)
    return (float(values.mean()), *np.percentile(means, INTERVAL), len(values))
