"""Laplace's approximation against known answers: Bayesian linear regression, and curvatures that are small enough."""

import math

import pytest
import torch
from models import batch, weighted_net, weighted_program
from regression import NOISE, PRIOR, D, LinearRegression, N, regression_data

from pyro_blora.adapters import open_gates
from pyro_blora.gates import Gates
from pyro_blora.posterior import deployed, draw_weights, predict
from pyro_blora.posterior.jacobians import jacobians
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.training.laplace_fit import eigenvectors_of, fit_laplace, in_directions, precision_of_least_nll

pytest.importorskip("laplace")
pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def data():
    return regression_data()


def covariance_of(distribution):
    """(D, D), from what is kept."""
    if distribution.curvature == "low_rank":
        curvature = distribution.directions * distribution.eigenvalues @ distribution.directions.mT
        return torch.linalg.inv(curvature + distribution.prior_precision * torch.eye(distribution.size))
    return (
        distribution.scale @ distribution.scale.mT
        if distribution.curvature == "full"
        else distribution.scale.square().diag()
    )


def test_laplace_is_exact_on_a_gaussian_posterior(data):
    inputs, labels, mean, covariance = data
    precision = torch.linalg.inv(covariance)
    values, vectors = torch.linalg.eigh(precision - torch.eye(D) / PRIOR**2)
    two = vectors[:, -2:] * values[-2:] @ vectors[:, -2:].mT + torch.eye(D) / PRIOR**2
    for structure, rank, expected in (
        ("full", D, precision), ("diag", D, precision.diagonal().diag()), ("low_rank", 100, precision),
        ("low_rank", 2, two),
    ):  # fmt: skip
        program = LinearRegression("laplace", prior_precision=1 / PRIOR**2, structure=structure, rank=rank)
        program.core.data.copy_(mean.view(2, 2))
        batches = [({"features": x}, y) for x, y in zip(inputs["features"].split(7), labels.split(7), strict=True)]
        fit_laplace(program, batches if rank != 2 else [(inputs, labels)], deployed(program))
        expected = torch.linalg.inv(expected)
        torch.testing.assert_close(covariance_of(program.weights), expected, rtol=1e-3, atol=1e-5)
        draws = draw_weights(program, 20_000, seed=1)
        torch.testing.assert_close(draws.mean(0), mean, atol=5 * (expected.max() / 20_000).sqrt().item(), rtol=0)
        torch.testing.assert_close(draws.T.cov(), expected, atol=0.05 * expected.max().item(), rtol=0)


@pytest.mark.parametrize("structure", ["full", "low_rank"])
def test_without_held_out_rows_the_prior_precision_is_that_of_the_largest_marginal_likelihood(data, structure):
    inputs, labels, mean, _ = data
    program = LinearRegression("laplace", structure=structure)
    program.core.data.copy_(mean.view(2, 2))
    fit_laplace(program, [(inputs, labels)], deployed(program))
    gram = inputs["features"].T @ inputs["features"] / NOISE**2

    def marginal(log_precision):  # laplace's own objective, up to a constant
        p = math.exp(log_precision)
        ratio = torch.logdet(gram + p * torch.eye(D)) - D * log_precision
        return -0.5 * (ratio + p * mean.square().sum()).item()

    grid = torch.linspace(-3, 3, 601)
    best = grid[torch.tensor([marginal(x.item()) for x in grid]).argmax()].exp().item()
    assert program.weights.prior_precision.item() == pytest.approx(best, rel=0.1)


@pytest.mark.parametrize("structure", ["full", "low_rank", "diag"])
def test_held_out_rows_choose_the_prior_precision_of_least_nll(data, structure):
    inputs, labels, *_ = data
    rows = [({"features": inputs["features"][part]}, labels[part]) for part in (slice(0, 3), slice(20, N))]
    X = inputs["features"][:3]
    centre = torch.tensor([0.5, -1.0, 0.3, 0.3])  # off, so that uncertainty is of use
    program = LinearRegression("laplace", structure=structure)
    program.core.data.copy_(centre.view(2, 2))
    fit_laplace(program, rows[:1], deployed(program), rows[1:])

    def held_out_nll(log_precision):  # exact: a Gaussian's
        precision = X.T @ X / NOISE**2 + math.exp(log_precision) * torch.eye(D)
        precision = precision.diagonal().diag() if structure == "diag" else precision
        there, given = inputs["features"][20:], labels[20:]
        variance = (there @ torch.linalg.inv(precision) * there).sum(-1) + NOISE**2
        return -torch.distributions.Normal(there @ centre, variance.sqrt()).log_prob(given).mean().item()

    grid = torch.linspace(-5, 13, 3601).tolist()
    best = min(grid, key=held_out_nll)
    assert -4 < best < 12, "not at an end"
    assert math.log(program.weights.prior_precision.item()) == pytest.approx(best, abs=0.02)


def test_held_out_rows_choose_what_predicts_their_classes_best():
    """Of the precisions tried by brute force, with many draws, none is better by more than the draws' noise."""
    program = weighted_program(weighted_net("lora"), "laplace", structure="low_rank")
    train, (inputs, labels) = batch(24, seed=1), batch(64, seed=2)
    fit_laplace(program, [train], deployed(program), [(inputs, labels)])
    gates = Gates(*(x.expand(400, *x.shape) for x in deployed(program)))

    def nll_at(precision):
        program.weights.prior_precision.fill_(precision)
        return predict(program, [(inputs, labels)], gates=gates, weights=draw_weights(program, 400, seed=0)).nll

    chosen = program.weights.prior_precision.item()
    others = [nll_at(math.exp(x)) for x in range(-4, 12)]
    assert nll_at(chosen) < min(others) + 0.02 and max(others) > min(others) + 0.1


def test_held_out_rows_choose_the_same_precision_in_one_batch_and_in_three():
    train, (inputs, labels) = batch(24, seed=1), batch(48, seed=2)
    parts = [({name: x[i : i + 16] for name, x in inputs.items()}, labels[i : i + 16]) for i in (0, 16, 32)]
    chosen = []
    for held_out in ([(inputs, labels)], parts, parts[2:]):
        program = weighted_program(weighted_net("lora"), "laplace", structure="low_rank")
        fit_laplace(program, [train], deployed(program), held_out)
        chosen.append(program.weights.prior_precision.item())
    assert chosen[1] == pytest.approx(chosen[0], rel=0.01) and chosen[2] != pytest.approx(chosen[0], rel=0.05)


def test_a_complete_basis_leaves_nothing_beside_it():
    """In single precision |J|^2 less its part along the basis is not quite 0, and a small precision divides it."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 300)).Q
    J, values = 5 * torch.randn(64, 1, 300), torch.full((300,), 1e6)
    outputs, labels = torch.randn(64, 1), torch.randn(64)
    seen = in_directions(basis, J)
    assert precision_of_least_nll(values, *seen, outputs, labels, 0.01) > 0  # and no variance below 0 on the way


@pytest.mark.parametrize("classes", [2, 3])
def test_rows_of_the_curvature_are_its_root(classes):
    torch.manual_seed(0)
    J, logits = torch.randn(5, classes, 7), torch.randn(5, classes)
    p = logits.softmax(-1)
    H = p.diag_embed() - p[..., None] * p[:, None]
    rows = Categorical(tuple(map(str, range(classes)))).gauss_newton_rows(J, logits)
    torch.testing.assert_close(rows.mT @ rows, torch.einsum("bcd,bce,bef->df", J, H, J), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 4, 30])
def test_eigenvectors_are_found_in_blocks(size):
    """Exactly where the rank suffices; the largest ones nearly where it does not, but for what fell on the way."""
    torch.manual_seed(0)
    rows = torch.randn(30, 6) @ torch.randn(6, 50)
    values, vectors = torch.linalg.eigh((rows.mT @ rows).double())
    V, found = eigenvectors_of(rows.split(size), 8)
    assert found.shape == (6,)  # as many as there are
    torch.testing.assert_close(found.double(), values[-6:], rtol=1e-4, atol=0)
    torch.testing.assert_close(V.mT @ V, torch.eye(6), atol=1e-4, rtol=0)
    torch.testing.assert_close((V * found @ V.mT).double(), (vectors * values) @ vectors.mT, atol=1e-2, rtol=1e-3)
    _, largest = eigenvectors_of(rows.split(size), 3)
    assert largest.shape == (3,) and bool((largest <= values[-3:] * (1 + 1e-5)).all())
    assert largest[-1] > 0.8 * values[-1]


def test_of_low_rank_it_is_the_full_one_where_the_rank_is_that_of_the_rows():
    """20 examples of two classes: a curvature of rank 20 at most."""
    distributions = {}
    for structure in ("full", "low_rank"):
        program = weighted_program(weighted_net("xs"), "laplace", structure=structure, rank=20, prior_precision=3.0)
        fit_laplace(program, [batch(10, seed=1), batch(10, seed=2)], deployed(program))
        distributions[structure] = program.weights
    full, low_rank = (covariance_of(distribution).detach() for distribution in distributions.values())
    torch.testing.assert_close(full, low_rank, atol=1e-4, rtol=1e-3)
    assert (full.diagonal() < 0.99 / 3.0).any()  # the data say something


def test_linearized_predictions_are_the_mean_plus_jacobian_times_shift():
    net = weighted_net("xs")
    program, (inputs, labels) = weighted_program(net, "laplace", prior_precision=20.0), batch()
    fit_laplace(program, [(inputs, labels)], deployed(program))
    theta, gates = draw_weights(program, 3, seed=0), Gates(*(x.expand(3, *x.shape) for x in open_gates(net.layout)))
    J, logits = jacobians(program, inputs, Gates(*open_gates(net.layout)))
    expected = (logits + torch.einsum("bcd,sd->sbc", J, theta - program.weights.mean)).softmax(-1)
    found = predict(program, [(inputs, labels)], gates=gates, weights=theta).outputs
    torch.testing.assert_close(found, expected.detach())
    program.weights.linearized = False
    sampled = predict(program, [(inputs, labels)], gates=gates, weights=theta).outputs
    assert not torch.allclose(sampled, found, atol=1e-5)


def test_a_precision_without_an_inverse_is_refused_with_the_remedy():
    program = weighted_program(weighted_net("xs"), "laplace", structure="full", prior_precision=1e-30)
    with pytest.raises(ValueError, match=r"a prior precision of 1e-30 has no inverse .* give --weights.prior_p"):
        fit_laplace(program, [batch()], deployed(program))
