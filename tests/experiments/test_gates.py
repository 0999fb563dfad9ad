"""The page of experiments/gates.py: what learning gained, in nats of the whole training set."""

import numpy as np
import pytest
import torch

from experiments.gates import differences, gained, headline
from experiments.studies.gate_learning import gain


def row(task, seed, method, nats, error=4.0):
    return {"task": task, "seed": seed, "method": method, "gain": {"nats": nats, "error": error}}


def test_gains_stand_beside_the_error_of_their_draws_and_the_interval_over_seeds():
    rows = [row("a", seed, "natural", gain) for seed, gain in enumerate((20.0, 10.0))]
    rows += [row("a", 0, "frozen", 40.0), row("b", 0, "natural", 6.0)]
    first, second = headline(rows).splitlines()
    assert first.startswith("- **a: learning gains +15.0 ± 2.8 nats of ELBO** in these trainings, more than twice")
    assert "by seed +20.0, +10.0" in first
    assert "in [-48.5, 78.5]" in first  # 12.71 x 7.07 / sqrt(2) of Student with one degree of freedom
    assert second.startswith("- **b: learning gains +6.0 ± 4.0 nats of ELBO** in these trainings, not more than twice")
    assert second.endswith("this error (by seed +6.0); one seed has no interval")


def test_the_error_of_a_gain_is_that_of_rows_and_draws():
    """Of 2,000 rows and any draw, against many samples of 100 of these rows and 40 draws."""
    generator = torch.Generator().manual_seed(0)
    of_row, of_draw = (torch.randn(n, generator=generator) for n in (2000, 100_000))
    found = []
    for _ in range(400):
        rows = torch.randperm(2000, generator=generator)[:100]
        draws = torch.randint(100_000, (40, 1), generator=generator)
        nll = 0.3 + of_row[rows] + 0.5 * of_draw[draws] + 0.1 * torch.randn(40, 100, generator=generator)
        found.append(gain(nll, 5.0, 2000))
    nats, errors = (np.array([one[key] for one in found]) for key in ("nats", "error"))
    assert nats.mean() == pytest.approx(2000 * float(0.3 + of_row.mean()) + 5, abs=4 * nats.std() / 20)
    assert errors.mean() == pytest.approx(nats.std(), rel=0.1)
    whole = gain(torch.ones(40, 1) * of_row, 0.0, 2000)
    assert whole["of_rows"] == 0 and whole["of_draws"] < 1e-2  # nothing is left out


def test_a_seed_without_a_frozen_rival_has_no_difference_to_it():
    of_run = {"n_train": 100, "moved": 1.0, "config": {"max_train": 100}}
    rows = [row("a", 0, "frozen", 0.0) | {"learned": {"elbo": -0.5}}]
    rows += [row("a", seed, "natural", 6.0) | {"learned": {"elbo": -0.4}} | of_run for seed in (0, 1)]
    cells = [[cell.strip() for cell in line.split("|")] for line in differences(rows).splitlines()[2:]]
    assert [cell[2:6] for cell in cells] == [["0", "+10.0", "+6.0", "4.0"], ["1", "-", "+6.0", "4.0"]]


def test_older_cells_have_the_error_of_their_draws_alone():
    at = {"learned": {"elbo": -0.48, "error": 0.003}, "start": {"elbo": -0.5, "error": 0.004}}
    nats, error = gained({"config": {"max_train": 1000}, **at})
    assert (nats, error) == (pytest.approx(20), pytest.approx(5)) and gained(None) is None
