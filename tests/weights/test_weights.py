"""Laws of the weights against known answers: Bayesian linear regression on frozen features, and SWAG's own formula."""

import copy
import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from models import batch, random_chains, tiny_bert, tiny_deberta, weighted_net, weighted_program
from pyro.infer import TraceMeanField_ELBO
from regression import NOISE, PRIOR, D, LinearRegression, N, fitted, regression_data
from torch import nn

from pyro_blora import adapters
from pyro_blora.adapters import open_gates
from pyro_blora.config import RunConfig
from pyro_blora.evaluation.summary import stored
from pyro_blora.gates import Gates
from pyro_blora.posterior import deployed, draw, draw_weights, predict
from pyro_blora.posterior.jacobians import jacobians
from pyro_blora.training import Schedule, make_optimizer
from pyro_blora.weights import WEIGHTS, build_weights

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def data():
    return regression_data()


@pytest.fixture(scope="module")
def fits(data, eager):
    settings = {"prior_std": PRIOR, "start_std": 0.1, "steps": 2000}
    return {"gaussian": fitted("gaussian", data, **settings), "low_rank": fitted("low_rank", data, rank=3, **settings)}


def test_a_mean_field_has_the_posteriors_mean_and_the_inverse_of_its_precisions_diagonal(data, fits):
    distribution, (*_, mean, covariance) = fits["gaussian"].weights, data
    torch.testing.assert_close(distribution.mean.detach(), mean, atol=0.02, rtol=0.02)
    expected = torch.linalg.inv(covariance).diagonal().rsqrt()
    assert (covariance.diagonal().sqrt() / expected).max() > 1.3  # what it would be if it were the marginal's
    torch.testing.assert_close(distribution.std.detach(), expected, rtol=0.08, atol=0)


def test_a_low_rank_gaussian_has_the_posteriors_mean_and_covariance(data, fits):
    distribution, (*_, mean, covariance) = fits["low_rank"].weights, data
    torch.testing.assert_close(distribution.mean.detach(), mean, atol=0.02, rtol=0.02)
    found = distribution.distribution().covariance_matrix.detach()
    torch.testing.assert_close(found, covariance, atol=0.1 * covariance.max().item(), rtol=0)


def test_its_elbo_is_the_evidence_and_a_mean_fields_is_below(data, fits):
    inputs, labels, *_ = data
    X = inputs["features"]
    marginal = torch.distributions.MultivariateNormal(torch.zeros(N), PRIOR**2 * X @ X.T + NOISE**2 * torch.eye(N))
    evidence = marginal.log_prob(labels).item()

    @torch.no_grad()
    def elbo(distribution):  # exact: the expected squared error under a Gaussian
        q = distribution.distribution()
        covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else distribution.variance().diag()
        squares = (labels - X @ distribution.mean).square() + (X @ covariance * X).sum(-1)
        expected = -squares.sum() / (2 * NOISE**2) - N * math.log(NOISE * math.sqrt(2 * math.pi))
        return (expected - distribution.divergence()).item()

    mean_field, low_rank = (elbo(fits[name].weights) for name in ("gaussian", "low_rank"))
    assert mean_field < low_rank < evidence and evidence - low_rank < 0.05 < 0.3 < evidence - mean_field


def test_a_learned_prior_scale_is_the_best_one(data):
    distribution = build_weights("gaussian", {(0, "core"): nn.Parameter(torch.randn(3, 3))}, {}, {"start_std": 0.3})
    best = distribution.divergence().item()
    for factor in (0.8, 0.95, 1.05, 1.3):
        scale = factor * distribution.prior_scale()
        other = dist.Normal(torch.zeros(9), scale).to_event(1)
        assert torch.distributions.kl_divergence(distribution.distribution(), other).item() > best
    squares = distribution.mean.square() + distribution.variance()
    assert distribution.prior_scale()[0].item() == pytest.approx(squares.mean().sqrt().item())


@pytest.mark.parametrize("name", ["gaussian", "low_rank"])
def test_the_kl_of_the_weights_is_the_average_log_ratio(name):
    torch.manual_seed(0)
    distribution = build_weights(name, {(0, "core"): nn.Parameter(0.2 * torch.randn(2, 3))}, {}, {"prior_std": 0.5})
    if name == "low_rank":
        distribution.columns.data.normal_(std=2.0)
    distribution.spread.data.uniform_(0, 3.0)
    theta = distribution.distribution().sample((100_000,))
    ratio = distribution.distribution().log_prob(theta) - distribution.prior().log_prob(theta)
    assert distribution.divergence().item() == pytest.approx(
        ratio.mean().item(), abs=5 * ratio.std().item() / 100_000**0.5
    )


# --- dropout and ensembles -------------------------------------------------------------------------------------------


def test_dropout_is_a_ridge_regression_whose_predictions_spread_as_its_masks(data):
    """Wager, Wang and Liang (2013): the penalty is p / (1 - p) sum (x_ij theta_j)^2, a row's part its spread."""
    inputs, labels, *_ = data
    X, ratio = inputs["features"], 0.2 / 0.8
    program = fitted("dropout", data, steps=2000, dropout=0.2)
    expected = torch.linalg.solve(X.T @ X + ratio * (X.T @ X).diagonal().diag(), X.T @ labels)
    torch.testing.assert_close(program.weights.mean.detach(), expected, atol=0.03, rtol=0)
    assert (torch.linalg.lstsq(X, labels).solution - expected).abs().max() > 0.1
    gates = Gates(*(x.expand(4000, *x.shape) for x in deployed(program)))
    means = predict(program, [(inputs, labels)], gates=gates, dropout_seed=1).outputs.squeeze(-1)  # (S, N)
    theta = program.weights.mean.detach()
    variance = ratio * (X * theta).square().sum(-1)
    torch.testing.assert_close(means.mean(0), X @ theta, atol=5 * (variance.max() / 4000).sqrt().item(), rtol=0)
    torch.testing.assert_close(means.var(0), variance, rtol=0.15, atol=0)


def test_members_of_an_ensemble_agree_where_the_data_speak_and_keep_their_start_elsewhere(data):
    """Two rows, four weights: each member is the least-norm solution plus its own start's part that no row sees."""
    inputs, labels, *_ = data
    X, y = inputs["features"][:2], labels[:2]
    unseen = torch.eye(D) - torch.linalg.pinv(X) @ X
    starts = torch.randn(3, D, generator=torch.Generator().manual_seed(3))
    members = []
    for start in starts:
        program = LinearRegression("ensemble", members=3)
        program.core.data.copy_(start.view(2, 2))
        optimizer = torch.optim.SGD([program.core], lr=0.02)
        for _ in range(800):
            optimizer.zero_grad()
            program.terms({"features": X}, y).loss.backward()
            optimizer.step()
        members.append(program.weights.mean.detach())
    members = torch.stack(members)
    torch.testing.assert_close(members.mean(0), torch.linalg.pinv(X) @ y + unseen @ starts.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(members.T.cov(), unseen @ starts.T.cov() @ unseen, atol=1e-3, rtol=0)


# --- SWAG ------------------------------------------------------------------------------------------------------------


def noted(rank, snapshots, path):
    distribution = build_weights(
        "swag", {(0, "core"): nn.Parameter(torch.zeros(path.shape[1]))}, {}, {"rank": rank, "snapshots": 20}
    )
    for theta in path:
        distribution.note(theta, torch.zeros(0))
    return distribution


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_swags_draws_have_the_covariance_of_its_formula(rank):
    """Half of (diag(var) + D D^T / (K - 1)) with deviations from the running mean; the diagonal alone where K = 0."""
    path = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)) @ torch.tensor(
        [[1.0, 0.5, 0.0], [0.0, 0.3, 0.2], [0.0, 0.0, 2.0]]
    )
    distribution = noted(rank, 20, path)
    exact = path.double()
    variance = exact.square().mean(0) - exact.mean(0).square()
    expected = variance.diag()
    if rank:
        running = exact.cumsum(0) / torch.arange(1, 13)[:, None]
        D = (exact - running)[-rank:]
        expected = (variance.diag() + D.T @ D / (rank - 1)) / 2
    torch.manual_seed(0)
    draws = distribution.draw(200_000).double()
    torch.testing.assert_close(draws.mean(0), exact.mean(0), atol=0.02, rtol=0)
    error = (draws.T.cov() - expected).abs().max() / expected.max()
    assert error < 0.02  # the release draws with four times this covariance


def test_fewer_deviations_are_the_last_ones():
    path = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    five, two = noted(5, 20, path), noted(2, 20, path)
    for mine, theirs in zip(five.covariance_parts(2), two.covariance_parts(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_swag_finds_the_mean_of_a_path_that_circles_the_posteriors(data):
    """At a constant rate, stochastic gradient steps on the negative log posterior circle its mode."""
    inputs, labels, mean, _ = data
    torch.manual_seed(0)
    program = LinearRegression("swag", rank=5, snapshots=20, burn_in=0.5)
    program.weights.snapshots = 400
    optimizer = torch.optim.SGD([program.core], lr=2e-2)
    for step in range(1, 2001):
        rows = torch.randint(N, (20,))
        batch = {"features": inputs["features"][rows]}
        loss = program.nll(batch, labels[rows], *open_gates(program.layout))
        loss = loss + program.core.square().sum() / (2 * PRIOR**2 * N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        program.weights.collect(step, 2000)
    assert int(program.weights.count) == 400
    assert not torch.allclose(program.core.detach().flatten(), program.weights.centre.float())
    program.weights.finish()
    torch.testing.assert_close(program.core.detach().flatten(), program.weights.centre.float(), rtol=0, atol=0)
    torch.testing.assert_close(program.core.detach().flatten(), mean, atol=0.05, rtol=0)


def test_the_head_ends_with_its_own_mean():
    head = {0: nn.Parameter(torch.zeros(2)), 1: nn.Parameter(torch.zeros(1, 3))}
    distribution = build_weights("swag", {(0, "core"): nn.Parameter(torch.zeros(1))}, head, {"rank": 2, "snapshots": 2})
    for value in (1.0, 3.0):
        for p in head.values():
            p.data.fill_(value)
        distribution.note(torch.tensor([value]), torch.full((5,), value))
    distribution.finish()
    assert all(bool((p == 2.0).all()) for p in head.values())


def test_snapshots_come_evenly_after_the_burn_in():
    distribution = build_weights(
        "swag", {(0, "core"): nn.Parameter(torch.zeros(1))}, {}, {"rank": 2, "snapshots": 5, "burn_in": 0.4}
    )
    assert [step for step in range(1, 101) if distribution.due(step, 100)] == [52, 64, 76, 88, 100]


# --- in a network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "xs"])
def test_drawn_weights_are_what_the_network_computes_with(adapter):
    net = weighted_net(adapter)
    program, (inputs, _) = weighted_program(net, sides="both"), batch()
    gates = Gates(*open_gates(net.layout))
    theta = draw_weights(program, 1, seed=3)[0]
    with torch.no_grad():
        found = program.logits(inputs, gates, theta)
        assert not torch.allclose(found, program.logits(inputs, gates), atol=1e-4)
        torch.testing.assert_close(program.logits(inputs, gates, program.weights.mean), program.logits(inputs, gates))
        other = copy.deepcopy(program)
        for key, value in other.weights.split(theta).items():
            other.net.random_weights()[key].copy_(value)
        torch.testing.assert_close(other.logits(inputs, gates), found)
        before = program.logits(inputs, gates)
    assert torch.equal(before, program.logits(inputs, gates).detach())  # nothing of a draw stays


@pytest.mark.parametrize("adapter", ["lora", "xs"])
def test_one_draw_an_example_is_each_examples_own(adapter):
    net = weighted_net(adapter, scope="encoder")
    program, (inputs, _) = weighted_program(net, sides="both"), batch(3)
    gates = Gates(random_chains(net.layout.z_shape), random_chains(net.layout.g_shape, seed=1))
    theta = draw_weights(program, 3, seed=0)
    with torch.no_grad():
        together = program.logits(inputs, gates, theta)
        each = [program.logits({k: x[i : i + 1] for k, x in inputs.items()}, gates, theta[i]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(each), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [tiny_bert, tiny_deberta])
def test_jacobians_are_finite_differences(build):
    net = weighted_net("xs", build)
    program, (inputs, _) = weighted_program(net).double(), batch(2)
    gates = Gates(*open_gates(net.layout))
    J, logits = jacobians(program, inputs, gates)
    direction = torch.randn(program.weights.size, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    with torch.no_grad():
        mean, step = program.weights.mean, 1e-6
        ends = [net_logits(program, inputs, gates, mean + s * step * direction) for s in (1, -1)]
    torch.testing.assert_close(J @ direction, ((ends[0] - ends[1]) / (2 * step)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits.double(), net_logits(program, inputs, gates, mean).detach(), atol=1e-6, rtol=1e-5)


def net_logits(program, inputs, gates, theta):
    """In double precision: the program's own are float32."""
    with adapters.gates(program.net, *gates, program.weights.split(theta)):
        return program.net(**inputs).logits


def test_draws_of_gates_and_weights_are_both_in_a_prediction():
    net = weighted_net("xs")
    program, (inputs, labels) = weighted_program(net, start_std=0.3), batch()
    gates, theta = draw(program, 4, seed=0), draw_weights(program, 4, seed=0)
    found = predict(program, [(inputs, labels)], gates=gates, weights=theta).outputs
    with torch.no_grad():
        each = [program.logits(inputs, Gates(gates.z[i], gates.g[i]), theta[i]).softmax(-1) for i in range(4)]
    torch.testing.assert_close(found, torch.stack(each))
    assert torch.equal(draw_weights(program, 4, seed=0), theta) and not torch.equal(
        draw_weights(program, 4, seed=1), theta
    )
    assert draw_weights(weighted_program(net, "point"), 4) is None


def test_pyros_own_elbo_is_ours_with_random_weights():
    net = weighted_net("xs")
    program, (inputs, labels) = weighted_program(net, prior_std=0.5, prior="fixed"), batch()
    torch.manual_seed(0)
    ours = torch.stack([program.terms(inputs, labels).loss for _ in range(200)]).mean()
    torch.manual_seed(1)
    theirs = sum(TraceMeanField_ELBO().loss(program.model, program.guide, inputs, labels) for _ in range(200)) / 200
    assert ours.item() == pytest.approx(theirs / 100, rel=0.02)


@pytest.mark.parametrize("held", ["open", None])  # before and after the gates start
def test_the_posterior_of_the_weights_alone_can_be_a_cold_one(held):
    program, (inputs, labels) = weighted_program(weighted_net("xs"), kl_weight=0.25), batch()
    torch.manual_seed(0)
    loss, terms = program(inputs, labels, 0.5, 0.8, held)
    of_gates = 0.0 if held else 0.8 * (terms.kl_z + terms.kl_g)
    assert terms.kl_theta > 1
    torch.testing.assert_close(loss, terms.nll + (of_gates + 0.8 * 0.25 * terms.kl_theta) / program.n_train)
    if not held:
        torch.manual_seed(0)
        theirs = TraceMeanField_ELBO().loss(program.model, program.guide, inputs, labels)
        assert loss.item() == pytest.approx(theirs / program.n_train, rel=1e-4)


def test_random_weights_learn_without_decay_beside_what_is_a_point():
    net = weighted_net("lora")
    groups = {
        name: {group["name"]: group for group in make_optimizer(weighted_program(net, name), RunConfig()).param_groups}
        for name in ("point", "gaussian", "swag")
    }
    assert set(groups["point"]) == set(groups["swag"]) == {"adapter", "head", "gates", "ranges"}
    assert set(groups["gaussian"]) == {"adapter", "weights", "spread", "head", "gates", "ranges"}
    sides = {name: [p.shape[0] == 4 for p in groups["gaussian"][name]["params"]] for name in ("adapter", "weights")}
    assert not any(sides["adapter"]) and all(sides["weights"]) and len(sides["weights"]) == 6  # lora_B, lora_A
    decays = {name: group["weight_decay"] for name, group in groups["gaussian"].items()}
    assert decays["weights"] == decays["spread"] == 0 < decays["adapter"]


def test_swag_averages_at_a_constant_rate():
    config = RunConfig(epochs=10, batch_size=10, warmup=0.1, lr=1.0, lr_head=0.5)
    distribution = build_weights(
        "swag", {(0, "core"): nn.Parameter(torch.zeros(1))}, {}, {"burn_in": 0.5, "plateau": 0.4}
    )
    schedule = Schedule.of(config, 100, weights=distribution)
    rates = [schedule.learning_rate("adapter", step) for step in range(100)]
    assert rates[9] == 1.0 and all(a > b for a, b in itertools.pairwise(rates[10:51]))
    assert rates[50:] == pytest.approx([0.4] * 50)
    assert schedule.learning_rate("head", 99) == pytest.approx(0.2)
    usual = Schedule.of(config, 100)
    assert usual.learning_rate("weights", 30) == usual.learning_rate("adapter", 30)
    assert usual.learning_rate("spread", 30) == pytest.approx(0.02 * usual.learning_rate("adapter", 30))


# --- names and settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gausian", {}, "unknown weights 'gausian': did you mean 'gaussian'"),
        ("gaussian", {"prior_std": 0.0}, "prior_std must be a positive number"),
        ("gaussian", {"std": 1.0}, "unknown setting 'std'"),
        ("low_rank", {"kl_weight": 0.0}, "kl_weight must be a positive number"),
        ("low_rank", {"rank": 0}, "rank of at least 1"),
        ("swag", {"rank": 1}, "rank must be 0 .diagonal. or at least 2"),
        ("swag", {"burn_in": 1.0}, "burn_in must be from 0 to below 1"),
        ("swag", {"rank": 10, "snapshots": 5}, "as many snapshots as rank"),
        ("laplace", {"structure": "kron"}, "structure must be one of full, low_rank, diag"),
        ("laplace", {"prior_precision": -1.0}, "prior_precision must be a positive number"),
        ("laplace", {"rank": 0}, "rank must be at least 1"),
        ("ensemble", {"members": 1}, "at least 2 members"),
    ],
)
def test_what_cannot_be_a_law_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build_weights(name, {(0, "core"): nn.Parameter(torch.zeros(2, 2))}, {}, settings)


def test_a_law_needs_weights():
    with pytest.raises(ValueError, match="needs an adapter whose weights can be random"):
        build_weights("gaussian", {}, {})
    assert build_weights("point", {}, {}).size == 0


def test_numbers_that_are_stored_are_counted():
    weights = {(0, "core"): nn.Parameter(torch.zeros(3, 3))}
    counts = {"point": 9, "gaussian": 18, "low_rank": 9 * 12, "swag": 9 * 12, "laplace": 9 + 45}
    assert {name: build_weights(name, weights, {}).stored for name in counts} == counts
    structures = {"full": 9 + 45, "low_rank": 9 + 3 * 9 + 3 + 1, "diag": 18}
    for structure, count in structures.items():
        assert build_weights("laplace", weights, {}, {"structure": structure, "rank": 3}).stored == count
    assert set(WEIGHTS.names()) == {*counts, "ensemble", "dropout"}
    net = weighted_net("lora")
    one = 6 * 4 * 32  # lora_A of six projections of width 32, and as many of lora_B
    found = {
        distribution: stored(weighted_program(net, distribution)) for distribution in ("point", "gaussian", "swag")
    }
    assert found == {"point": 2 * one, "gaussian": 3 * one, "swag": 12 * 2 * one}
