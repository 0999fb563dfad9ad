"""The page of experiments/gates.py: what learning gained, in nats of the whole training set."""

from experiments.gates import headline


def row(task, seed, method, start, learned, error=0.003):
    """A cell of 1,000 examples; ELBOs are per example."""
    at = {"learned": {"elbo": learned, "error": error}, "start": {"elbo": start, "error": error}}
    return {"task": task, "seed": seed, "method": method, "config": {"max_train": 1000}, **at}


def test_gains_are_over_the_own_start_and_beside_the_error_of_their_draws():
    rows = [row("a", seed, "natural", -0.5, -0.5 + gain) for seed, gain in enumerate((0.02, 0.01))]
    rows += [row("a", 0, "frozen", -0.5, -0.1), row("b", 0, "natural", -0.5, -0.494)]
    first, second = headline(rows).splitlines()
    # of each seed 1,000 x sqrt(2) x .003 = 4.2; of their mean, that over sqrt(2)
    assert first.startswith("- **a: learning gains +15.0 ± 3.0 nats of ELBO**, more than twice the error")
    assert "by seed +20.0, +10.0" in first
    assert second.startswith("- **b: learning gains +6.0 ± 4.2 nats of ELBO**, not more than twice the error")
