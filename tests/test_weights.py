"""Laws of the weights against known answers: Bayesian linear regression on frozen features, and SWAG's own formula."""

import copy
import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from models import batch, random_chains, tiny_bert, tiny_deberta, toy_layout
from torch import nn

from pyro_blora import adapters, attach
from pyro_blora.adapters import calibrate, open_gates
from pyro_blora.config import RunConfig
from pyro_blora.curvature import fit_laplace
from pyro_blora.gates import Gates
from pyro_blora.guides import build_guide
from pyro_blora.jacobians import jacobians
from pyro_blora.posterior import deployed, draw, draw_weights, predict
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA, GateProgram
from pyro_blora.schedule import Schedule
from pyro_blora.summary import stored
from pyro_blora.tasks import get_task
from pyro_blora.training import make_optimizer
from pyro_blora.weights import WEIGHTS, build_weights

pytestmark = pytest.mark.usefixtures("eager")

N, D, NOISE, PRIOR, SLOPE = 60, 4, 0.7, 1.3, 2.5  # a label is SLOPE times its logit, as of STS-B


class LinearRegression(GateProgram):
    """label ~ Normal(features theta, NOISE): the posterior of theta is Gaussian, and known."""

    def __init__(self, name, **settings):
        layout = toy_layout()
        prior = build_prior("fixed", layout, {"bits": 32})
        self_weights = {(0, "core"): nn.Parameter(torch.zeros(2, 2))}
        law = build_weights(name, self_weights, {}, settings)
        super().__init__(
            layout, prior, build_guide("mean_field", layout, prior), self._likelihood, n_train=N, weights=law
        )
        self.core = self_weights[0, "core"]
        self.log_scale.data.fill_(math.log(NOISE)).requires_grad_(False)

    @staticmethod
    def _likelihood(logits, scale):
        return dist.Normal(SLOPE * logits.squeeze(-1), scale)

    def logits(self, inputs, gates, theta=None):
        theta = self.core.flatten() if theta is None else theta
        return (inputs["features"] * theta).sum(-1, keepdim=True) / SLOPE


@pytest.fixture(scope="module")
def data():
    """Correlated features, labels, and the posterior's mean and covariance under Normal(0, PRIOR^2)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(D) + 0.8 * torch.randn(D, D, generator=generator).triu(1)
    features = torch.randn(N, D, generator=generator) @ mixing
    labels = features @ torch.tensor([0.5, -1.0, 0.3, 0.8]) + NOISE * torch.randn(N, generator=generator)
    precision = features.T @ features / NOISE**2 + torch.eye(D) / PRIOR**2
    covariance = torch.linalg.inv(precision)
    return {"features": features}, labels, covariance @ features.T @ labels / NOISE**2, covariance


def fitted(name, data, *, steps, **settings):
    torch.manual_seed(0)
    program = LinearRegression(name, **settings)
    inputs, labels, *_ = data
    rates = [(program.core, 0.02), *((p, 0.02) for p in program.weights.parameters())]
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in rates])
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.002, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        program.elbo(inputs, labels).loss(N).backward()
        optimizer.step()
        falling.step()
    return program


@pytest.fixture(scope="module")
def fits(data, eager):
    settings = {"prior_std": PRIOR, "start_std": 0.1, "steps": 2000}
    return {"gaussian": fitted("gaussian", data, **settings), "low_rank": fitted("low_rank", data, rank=3, **settings)}


def test_a_mean_field_has_the_posteriors_mean_and_the_inverse_of_its_precisions_diagonal(data, fits):
    law, (*_, mean, covariance) = fits["gaussian"].weights, data
    torch.testing.assert_close(law.mean.detach(), mean, atol=0.02, rtol=0.02)
    expected = torch.linalg.inv(covariance).diagonal().rsqrt()
    assert (covariance.diagonal().sqrt() / expected).max() > 1.3  # what it would be if it were the marginal's
    torch.testing.assert_close(law.std.detach(), expected, rtol=0.08, atol=0)


def test_a_low_rank_gaussian_has_the_posteriors_mean_and_covariance(data, fits):
    law, (*_, mean, covariance) = fits["low_rank"].weights, data
    torch.testing.assert_close(law.mean.detach(), mean, atol=0.02, rtol=0.02)
    found = law.law().covariance_matrix.detach()
    torch.testing.assert_close(found, covariance, atol=0.1 * covariance.max().item(), rtol=0)


def test_its_elbo_is_the_evidence_and_a_mean_fields_is_below(data, fits):
    inputs, labels, *_ = data
    X = inputs["features"]
    marginal = torch.distributions.MultivariateNormal(torch.zeros(N), PRIOR**2 * X @ X.T + NOISE**2 * torch.eye(N))
    evidence = marginal.log_prob(labels).item()

    @torch.no_grad()
    def elbo(law):  # exact: the expected squared error under a Gaussian
        q = law.law()
        covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else law.variance().diag()
        squares = (labels - X @ law.mean).square() + (X @ covariance * X).sum(-1)
        expected = -squares.sum() / (2 * NOISE**2) - N * math.log(NOISE * math.sqrt(2 * math.pi))
        return (expected - law.divergence()).item()

    mean_field, low_rank = (elbo(fits[name].weights) for name in ("gaussian", "low_rank"))
    assert mean_field < low_rank < evidence and evidence - low_rank < 0.05 < 0.3 < evidence - mean_field


def test_laplace_is_exact_on_a_gaussian_posterior(data):
    pytest.importorskip("laplace")
    inputs, labels, mean, covariance = data
    for structure in ("full", "diag"):
        program = LinearRegression("laplace", prior_precision=1 / PRIOR**2, structure=structure)
        program.core.data.copy_(mean.view(2, 2))
        fit_laplace(program, [(inputs, labels)], deployed(program))
        scale = program.weights.scale
        if structure == "full":
            torch.testing.assert_close(scale @ scale.mT, covariance, rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(scale, torch.linalg.inv(covariance).diagonal().rsqrt(), rtol=1e-4, atol=0)
        draws = draw_weights(program, 20_000, seed=1)
        torch.testing.assert_close(draws.mean(0), mean, atol=0.01, rtol=0.02)
        expected = scale @ scale.mT if structure == "full" else scale.square().diag()
        torch.testing.assert_close(draws.T.cov(), expected, atol=0.05 * expected.max().item(), rtol=0)


def test_a_prior_precision_that_is_not_given_is_that_of_the_largest_marginal_likelihood(data):
    pytest.importorskip("laplace")
    inputs, labels, mean, _ = data
    program = LinearRegression("laplace")
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


def test_a_learned_prior_scale_is_the_best_one(data):
    law = build_weights("gaussian", {(0, "core"): nn.Parameter(torch.randn(3, 3))}, {}, {"start_std": 0.3})
    best = law.divergence().item()
    for factor in (0.8, 0.95, 1.05, 1.3):
        scale = factor * law.prior_scale()
        other = dist.Normal(torch.zeros(9), scale).to_event(1)
        assert torch.distributions.kl_divergence(law.law(), other).item() > best
    squares = law.mean.square() + law.variance()
    assert law.prior_scale()[0].item() == pytest.approx(squares.mean().sqrt().item())


@pytest.mark.parametrize("name", ["gaussian", "low_rank"])
def test_the_kl_of_the_weights_is_the_average_log_ratio(name):
    torch.manual_seed(0)
    law = build_weights(name, {(0, "core"): nn.Parameter(0.2 * torch.randn(2, 3))}, {}, {"prior_std": 0.5})
    if name == "low_rank":
        law.columns.data.normal_(std=2.0)
    law.spread.data.uniform_(0, 3.0)
    theta = law.law().sample((100_000,))
    ratio = law.law().log_prob(theta) - law.prior().log_prob(theta)
    assert law.divergence().item() == pytest.approx(ratio.mean().item(), abs=5 * ratio.std().item() / 100_000**0.5)


# --- SWAG ------------------------------------------------------------------------------------------------------------


def noted(rank, snapshots, path):
    law = build_weights(
        "swag", {(0, "core"): nn.Parameter(torch.zeros(path.shape[1]))}, {}, {"rank": rank, "snapshots": 20}
    )
    for theta in path:
        law.note(theta, torch.zeros(0))
    return law


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_swags_draws_have_the_covariance_of_its_formula(rank):
    """Half of (diag(var) + D D^T / (K - 1)) with deviations from the running mean; the diagonal alone where K = 0."""
    path = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)) @ torch.tensor(
        [[1.0, 0.5, 0.0], [0.0, 0.3, 0.2], [0.0, 0.0, 2.0]]
    )
    law = noted(rank, 20, path)
    exact = path.double()
    variance = exact.square().mean(0) - exact.mean(0).square()
    expected = variance.diag()
    if rank:
        running = exact.cumsum(0) / torch.arange(1, 13)[:, None]
        D = (exact - running)[-rank:]
        expected = (variance.diag() + D.T @ D / (rank - 1)) / 2
    torch.manual_seed(0)
    draws = law.draw(200_000).double()
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
    law = build_weights("swag", {(0, "core"): nn.Parameter(torch.zeros(1))}, head, {"rank": 2, "snapshots": 2})
    for value in (1.0, 3.0):
        for p in head.values():
            p.data.fill_(value)
        law.note(torch.tensor([value]), torch.full((5,), value))
    law.finish()
    assert all(bool((p == 2.0).all()) for p in head.values())


def test_snapshots_come_evenly_after_the_burn_in():
    law = build_weights(
        "swag", {(0, "core"): nn.Parameter(torch.zeros(1))}, {}, {"rank": 2, "snapshots": 5, "burn_in": 0.4}
    )
    assert [step for step in range(1, 101) if law.due(step, 100)] == [52, 64, 76, 88, 100]


# --- in a network -----------------------------------------------------------------------------------------------------


def program_of(net, weights="gaussian", prior="nested", **settings):
    prior = build_prior(prior, net.layout)
    guide = build_guide("mean_field", net.layout, prior, {"open_logit": 1.0})
    law = build_weights(weights, net.random_weights(), dict(enumerate(net.head_parameters())), settings)
    return BayesianLoRA(net, prior, guide, get_task("sst2").likelihood, n_train=100, weights=law).eval()


def net_of(adapter, build=tiny_bert, **settings):
    torch.manual_seed(0)
    net = attach(build(dropout=0.0), rank=4, sequence_length=10, adapter=adapter, **settings)
    for p in net.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    calibrate(net, [batch()[0]])
    return net.eval()


@pytest.mark.parametrize("adapter", ["lora", "xs"])
def test_drawn_weights_are_what_the_network_computes_with(adapter):
    net = net_of(adapter)
    program, (inputs, _) = program_of(net, sides="both"), batch()
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
    net = net_of(adapter, scope="encoder")
    program, (inputs, _) = program_of(net, sides="both"), batch(3)
    gates = Gates(random_chains(net.layout.z_shape), random_chains(net.layout.g_shape, seed=1))
    theta = draw_weights(program, 3, seed=0)
    with torch.no_grad():
        together = program.logits(inputs, gates, theta)
        each = [program.logits({k: x[i : i + 1] for k, x in inputs.items()}, gates, theta[i]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(each), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [tiny_bert, tiny_deberta])
def test_jacobians_are_finite_differences(build):
    net = net_of("xs", build)
    program, (inputs, _) = program_of(net).double(), batch(2)
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


def test_linearized_predictions_are_the_mean_plus_jacobian_times_shift():
    pytest.importorskip("laplace")
    net = net_of("xs")
    program, (inputs, labels) = program_of(net, "laplace", prior_precision=20.0), batch()
    fit_laplace(program, [(inputs, labels)], deployed(program))
    theta, gates = draw_weights(program, 3, seed=0), Gates(*(x.expand(3, *x.shape) for x in open_gates(net.layout)))
    J, logits = jacobians(program, inputs, Gates(*open_gates(net.layout)))
    expected = (logits + torch.einsum("bcd,sd->sbc", J, theta - program.weights.mean)).softmax(-1)
    found = predict(program, [(inputs, labels)], gates=gates, weights=theta).outputs
    torch.testing.assert_close(found, expected.detach())
    program.weights.linearized = False
    sampled = predict(program, [(inputs, labels)], gates=gates, weights=theta).outputs
    assert not torch.allclose(sampled, found, atol=1e-5)


def test_draws_of_gates_and_weights_are_both_in_a_prediction():
    net = net_of("xs")
    program, (inputs, labels) = program_of(net, start_std=0.3), batch()
    gates, theta = draw(program, 4, seed=0), draw_weights(program, 4, seed=0)
    found = predict(program, [(inputs, labels)], gates=gates, weights=theta).outputs
    with torch.no_grad():
        each = [program.logits(inputs, Gates(gates.z[i], gates.g[i]), theta[i]).softmax(-1) for i in range(4)]
    torch.testing.assert_close(found, torch.stack(each))
    assert torch.equal(draw_weights(program, 4, seed=0), theta) and not torch.equal(
        draw_weights(program, 4, seed=1), theta
    )
    assert draw_weights(program_of(net, "point"), 4) is None


def test_pyros_own_elbo_is_ours_with_random_weights():
    from pyro.infer import TraceMeanField_ELBO

    net = net_of("xs")
    program, (inputs, labels) = program_of(net, prior_std=0.5, prior="fixed"), batch()
    torch.manual_seed(0)
    ours = torch.stack([program.elbo(inputs, labels).loss(100) for _ in range(200)]).mean()
    torch.manual_seed(1)
    theirs = sum(TraceMeanField_ELBO().loss(program.model, program.guide, inputs, labels) for _ in range(200)) / 200
    assert ours.item() == pytest.approx(theirs / 100, rel=0.02)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])  # before and after the gates start
def test_the_posterior_of_the_weights_alone_can_be_a_cold_one(kl_weight):
    program, (inputs, labels) = program_of(net_of("xs"), kl_weight=0.25), batch()
    loss, elbo = program(inputs, labels, 0.5, kl_weight, 0.8)
    expected = elbo.nll + (kl_weight * (elbo.kl_z + elbo.kl_g) + 0.8 * 0.25 * elbo.kl_theta) / program.n_train
    assert elbo.kl_theta > 1
    torch.testing.assert_close(loss, expected)


def test_random_weights_learn_without_decay_beside_what_is_a_point():
    net = net_of("lora")
    groups = {
        name: {group["name"]: group for group in make_optimizer(program_of(net, name), RunConfig()).param_groups}
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
    law = build_weights("swag", {(0, "core"): nn.Parameter(torch.zeros(1))}, {}, {"burn_in": 0.5, "plateau": 0.4})
    schedule = Schedule.of(config, 100, weights=law)
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
        ("laplace", {"structure": "kron"}, "structure must be one of full, diag|structure must be"),
        ("laplace", {"prior_precision": -1.0}, "prior_precision must be a positive number"),
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
    assert set(WEIGHTS.names()) == {*counts, "ensemble", "dropout"}
    net = net_of("lora")
    one = 6 * 4 * 32  # lora_A of six projections of width 32, and as many of lora_B
    found = {law: stored(program_of(net, law)) for law in ("point", "gaussian", "swag")}
    assert found == {"point": 2 * one, "gaussian": 3 * one, "swag": 12 * 2 * one}
