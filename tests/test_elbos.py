"""ELBOs against the exact expectation, and the exact expectation against that of Pyro.

The program is a regression whose features are multiplied by gates: small enough for all its states.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import every_state, toy_layout
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyro_blora.elbos import ELBOS, Elbo, GateELBO, ScoreFunction, StraightThrough, build_elbo, register_elbo
from pyro_blora.gates import Gates, NestedBernoulli
from pyro_blora.guides import build_guide, log_prob
from pyro_blora.priors import build_prior
from pyro_blora.program import GateProgram
from pyro_blora.training.natural_gradient import fisher

N_TRAIN = 20
EXAMPLES = 8


class Pinned(nn.Module):
    """Rate 0.6 where `free` says so, in chains that are open elsewhere."""

    def __init__(self, layout, z_free, g_free):
        super().__init__()
        z, g = torch.zeros(layout.z_shape), torch.zeros(layout.g_shape)
        for index in z_free:
            z[index] = -0.6
        for index in g_free:
            g[index] = -0.6
        self.register_buffer("z", z)
        self.register_buffer("g", g)

    def forward(self):
        return Gates(NestedBernoulli(self.z, validate_args=False), NestedBernoulli(self.g, validate_args=False))


def normal(mean, scale):
    return dist.Normal(mean.squeeze(-1), scale)


class Regression(GateProgram):
    """mean = sum of weight_i * gate_i * feature_i over all gates that exist."""

    def __init__(self, layout, prior, guide, **settings):
        super().__init__(layout, prior, guide, normal, n_train=N_TRAIN, **settings)
        torch.manual_seed(2)
        opened = (torch.ones(shape) for shape in (layout.z_shape, layout.g_shape))
        self.weight = nn.Parameter(torch.randn(len(self.flat(*opened))))

    def flat(self, z, g):
        return torch.cat([z[self.z_mask].flatten(), g[self.g_mask].flatten()])

    def logits(self, inputs, gates, theta=None):
        return (inputs["x"] @ (self.weight * self.flat(*gates)))[:, None]


def chains(estimator="enumerate", guide="mean_field", **settings):
    """Four free chains of one to three gates, some of their gates pinned: 81 states at most; the rest is open."""
    layout = toy_layout(rank=3)
    rows = [(0, 0), (0, 1), (1, 0, 1)]  # input and base of one projection; the second gate of another's input
    return program_of(layout, Pinned(layout, rows, [0]), estimator, guide, **settings)


def bits(estimator="enumerate", guide="mean_field", **settings):
    """Four free gates: three of one gate a chain, and a rank."""
    layout = toy_layout(ladder=(2, 32))
    return program_of(layout, Pinned(layout, [(0, 0), (0, 1), (1, 0)], [0]), estimator, guide, **settings)


def program_of(layout, prior, estimator, guide, **settings):
    guide = build_guide(guide, layout, prior, {"open_logit": 0.4, **settings})
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    return Regression(layout, prior, guide, estimator=estimator)


def data(program):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, len(program.weight), generator=generator)
    return {"x": x}, torch.randn(EXAMPLES, generator=generator)


def learning(program):
    return [*program.gate_guide.parameters(), program.weight, program.log_scale]


def slopes(value, program):
    return torch.cat([x.flatten() for x in torch.autograd.grad(value, learning(program), materialize_grads=True)])


def of_every_state(program):
    """E[NLL] summed over all states that are possible."""
    inputs, labels = data(program)
    guide, masks = program.gate_guide, (program.z_mask, program.g_mask)
    states = every_state(program.layout)
    possible = log_prob(guide, states, *masks) > -torch.inf
    states = Gates(*(gates[possible] for gates in states))
    q = log_prob(guide, states, *masks).exp()
    assert 1 < len(q) <= 81
    return sum(q[i] * program.nll(inputs, labels, states.z[i], states.g[i]) for i in range(len(q)))


# --- enumeration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
@pytest.mark.parametrize("build", [chains, bits])
def test_enumeration_is_the_sum_over_every_state(build, guide):
    program = build(guide=guide)
    ours, exact = program.terms(*data(program)).nll, of_every_state(program)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slopes(ours, program), slopes(exact, program), rtol=1e-4, atol=1e-5)


def test_the_enumerated_elbo_is_that_of_pyro():
    """TraceEnum_ELBO of the same regression, with one enumerated Bernoulli site for each free gate."""
    program = bits()
    inputs, labels = data(program)
    free = [("z", (0, 0, 0)), ("z", (0, 1, 0)), ("z", (1, 0, 0)), ("g", (0, 0))]
    index = torch.zeros(program.layout.z_shape), torch.zeros(program.layout.g_shape)
    for i, (site, place) in enumerate(free):
        index["zg".index(site)][place] = i + 1
    feature = program.flat(*index)  # 0 for a feature whose gate is pinned open

    def gates(logits):
        distributions = [dist.Bernoulli(logits=getattr(logits, site)[place]) for site, place in free]
        return [
            pyro.sample(f"gate_{i}", distribution, infer={"enumerate": "parallel"})
            for i, distribution in enumerate(distributions)
        ]

    def guide():
        gates(Gates(*(x[0] for x in program.gate_guide.logits())))

    def model():
        prior = [torch.logit(distribution.log_probs.exp()) for distribution in program.prior()]
        opened = gates(Gates(*prior))
        mean = sum(
            inputs["x"][:, i] * program.weight[i] * (opened[int(of) - 1] if of else 1.0) for i, of in enumerate(feature)
        )
        with pyro.plate("example", EXAMPLES), poutine.scale(scale=N_TRAIN / EXAMPLES):
            pyro.sample("label", dist.Normal(mean, program.log_scale.exp()), obs=labels)

    model = poutine.infer_config(model, lambda site: {"enumerate": None})  # the guide's states are summed over
    theirs = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide) / N_TRAIN
    ours = program.terms(inputs, labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slopes(ours, program), slopes(theirs, program), rtol=1e-4, atol=1e-5)


def test_nothing_free_is_one_state():
    layout = toy_layout()
    program = program_of(layout, Pinned(layout, [], []), "enumerate", "mean_field")
    opened = Gates(torch.ones(layout.z_shape), torch.ones(layout.g_shape))
    torch.testing.assert_close(program.terms(*data(program)).nll, program.nll(*data(program), *opened))


def test_components_that_are_sure_of_different_states_are_both_counted():
    program = bits(guide="mixture", components=2)
    with torch.no_grad():
        program.gate_guide.z_evidence[0].fill_(500.0)
        program.gate_guide.z_evidence[1].fill_(-500.0)
    torch.testing.assert_close(program.terms(*data(program)).nll, of_every_state(program))


def test_too_many_states_are_refused_with_the_remedy():
    layout = toy_layout(ladder=(2, 4, 8, 16, 32))
    prior = Pinned(layout, [(0,), (1,)], [(0,)])
    with pytest.raises(ValueError, match="would take 156,250 forwards a step, more than 16,384: use --estimator rel"):
        program_of(layout, prior, "enumerate", "mean_field")
    program = program_of(layout, prior, "relaxed", "mean_field")
    with pytest.raises(ValueError, match="would take 156,250 forwards"):
        build_elbo("enumerate", program.gate_guide)


def test_states_without_number_are_refused_with_their_power_of_ten():
    layout = toy_layout(adapted=(True,) * 40, ladder=(2, 4, 8, 16, 32))
    with pytest.raises(ValueError, match=r"would take 10\^151 forwards a step"):  # 5^200 * 2^40
        program_of(layout, build_prior("nested", layout), "enumerate", "mean_field")


# --- sampling ---------------------------------------------------------------------------------------------------------


def each_value(program, count):
    """So many estimates of the NLL, each with a graph of its own."""
    inputs, labels = data(program)
    torch.manual_seed(0)
    return [program.terms(inputs, labels).nll for _ in range(count)]


def values_of(program, count):
    return torch.stack(each_value(program, count)).detach()


def exact_value(program):
    return build_elbo("enumerate", program.gate_guide).terms(program.model, program.guide, *data(program)).nll


def estimates(program, count):
    """Values and slopes of so many estimates of the NLL, and the exact ones."""
    values, exact = each_value(program, count), exact_value(program)
    gradients = torch.stack([slopes(value, program) for value in values])
    return torch.stack(values).detach(), gradients, exact.detach(), slopes(exact, program)


def agree(draws, expected):
    error = draws.std(0) / math.sqrt(len(draws))
    return bool(((draws.mean(0) - expected).abs() <= 4 * error + 1e-5).all())


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
@pytest.mark.parametrize("build", [chains, bits])
def test_the_mean_of_many_score_function_slopes_is_the_enumerated_one(build, guide):
    values, gradients, value, slope = estimates(build("score_function", guide), 250)
    assert agree(values, value) and agree(gradients, slope)
    assert gradients.std(0).max() / math.sqrt(250) < 0.01 * slope.abs().max()  # an estimate that says something


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
def test_the_mean_of_many_straight_through_values_is_the_enumerated_one(guide):
    values, gradients, value, slope = estimates(chains("straight_through", guide), 300)
    assert values.std() > 0 and agree(values, value)
    assert not agree(gradients, slope)  # its slopes are biased


def test_a_soft_draw_of_the_relaxed_estimator_is_biased_less_when_it_is_colder():
    program, gaps = chains("relaxed"), []
    for temperature in (2.0, 0.01):
        program.temperature = temperature
        gaps.append((values_of(program, 400).mean() - exact_value(program)).abs())
    assert gaps[1] < 0.3 * gaps[0]


def test_gates_that_are_pinned_have_no_slope():
    program = chains("score_function")
    free = [distribution.log_probs < 0 for distribution in program.prior()]
    for _ in range(20):
        slope = torch.autograd.grad(program.terms(*data(program)).nll, list(program.gate_guide.parameters()))
        for site, where in zip(slope, free, strict=True):
            assert bool((site[0][~where].abs() < 1e-6).all())
        assert bool((slope[0][0][free[0]] != 0).any())


def test_antithetic_draws_keep_pins_at_the_edge_of_the_generator(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)  # one draw in 17 million is 0
    program = chains("score_function")
    distributions = program.gate_guide.distributions(1.0, True)
    for distribution, prior in zip(distributions, program.prior(), strict=True):
        for gates in ScoreFunction().draw(distribution).cumprod(-1):
            assert bool((gates[prior.log_probs.cumsum(-1) == 0] == 1).all())


def test_two_antithetic_draws_vary_less_than_two_independent_ones():
    program = bits("score_function")
    values, single = values_of(program, 300), values_of(bits("straight_through"), 600)
    assert values.var() < single.view(-1, 2).mean(-1).var()


@pytest.mark.parametrize("estimator", ["score_function", "enumerate"])
def test_a_guide_of_one_allocation_is_refused(estimator):
    refused = pytest.raises(
        ValueError, match=f"estimator '{estimator}' .* use --guide mean_field, or --estimator straight"
    )
    with refused:
        bits(estimator, "point")
    with refused:
        elbo, program = ELBOS.resolve(estimator)(), bits("relaxed", "point")
        elbo.terms(program.model, program.guide, *data(program))


def test_every_estimator_has_the_same_kl():
    distributions = {name: chains(name).kl() for name in ELBOS.names()}
    program = chains()
    q, p = program.gate_guide.posterior(), program.prior()
    expected = torch.where(program.z_mask, kl_divergence(q.z, p.z), 0.0).sum()
    assert set(distributions) == {"relaxed", "straight_through", "score_function", "gauss_newton", "enumerate"}
    for kl in distributions.values():
        torch.testing.assert_close(kl.z, expected)


def test_an_unknown_estimator_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown estimator 'enumerated': did you mean 'enumerate'"):
        bits("enumerated")


# --- as ELBOs of Pyro -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
@pytest.mark.parametrize("name", ELBOS.names())
def test_every_one_is_a_pyro_elbo_whose_loss_over_n_is_that_of_training_to_the_bit(name, guide):
    program, batch = chains(name, guide), data(chains())
    assert isinstance(program.elbo, TraceMeanField_ELBO) and isinstance(program.elbo, Elbo)
    program.n_train = 49  # in single precision, 49 * (1 / 49) is not 1
    torch.manual_seed(1)
    loss = program.elbo.differentiable_loss(program.model, program.guide, *batch)
    torch.manual_seed(1)
    terms = program.elbo.terms(program.model, program.guide, *batch)
    assert (loss / 49).float() == terms.loss and terms.n_train == 49
    assert torch.equal(slopes(loss / 49, program), slopes(terms.loss, program))
    torch.testing.assert_close(terms.loss, terms.nll + (terms.kl_z + terms.kl_g) / 49)


def of_pyro(elbo, program, count):
    """Losses and slopes of so many estimates by an ELBO of Pyro, over N."""
    losses, gradients = [], []
    torch.manual_seed(0)
    for _ in range(count):
        for parameter in learning(program):
            parameter.grad = None
        with poutine.trace(param_only=True):  # as SVI does
            losses.append(elbo.loss_and_grads(program.model, program.guide, *data(program)) / N_TRAIN)
        gradients.append(torch.cat([p.grad.flatten() for p in learning(program)]) / N_TRAIN)
    return torch.tensor(losses), torch.stack(gradients)


@pytest.mark.parametrize(("elbo", "guide"), [(Trace_ELBO, "mixture"), (TraceGraph_ELBO, "mean_field")])
def test_elbos_of_pyro_are_unbiased_with_discrete_draws(elbo, guide):
    program = bits("score_function", guide)
    losses, gradients = of_pyro(elbo(), program, 250)
    exact = build_elbo("enumerate", program.gate_guide).terms(program.model, program.guide, *data(program)).loss
    assert agree(losses, exact.detach()) and agree(gradients, slopes(exact, program))


@pytest.mark.parametrize(("elbo", "estimator"), [(Trace_ELBO, "straight_through"), (TraceGraph_ELBO, "score_function")])
def test_without_data_hard_draws_leave_the_gates_at_their_prior(elbo, estimator):
    """Where the density of a soft draw would have closed them."""
    program, (inputs, labels) = bits(estimator), data(bits())
    with torch.no_grad():
        program.weight.zero_()  # every label has density 1 in every state
        program.log_scale.fill_(-math.log(2 * math.pi) / 2)
    for parameter in (program.weight, program.log_scale):
        parameter.requires_grad_(False)
    rates = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.99}
    optimizer = pyro.optim.ExponentialLR(rates)
    svi = SVI(program.model, program.guide, optimizer, elbo())
    torch.manual_seed(0)
    for _ in range(400):
        svi.step(inputs, torch.zeros_like(labels))
        optimizer.step()
    for q, p in zip(program.gate_guide.posterior(), program.prior(), strict=True):
        torch.testing.assert_close(q.mean, p.mean, atol=0.1, rtol=0)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_elbos_of_pyro_know_the_divergence_of_a_mixture(elbo):
    """One component is drawn; the site `joint` makes the sites' KLs that of the mixture."""
    program = chains("straight_through", "mixture")
    with torch.no_grad():
        program.weight.zero_()  # the NLL is the same in every state
        program.gate_guide.z_evidence[:2].add_(3.0)
    losses, _ = of_pyro(elbo(), program, 150)
    with torch.no_grad():
        nll = build_elbo("enumerate", program.gate_guide).terms(program.model, program.guide, *data(program)).nll
        exact = nll + torch.stack([sum(program.kl()) for _ in range(150)]) / N_TRAIN  # its information is sampled, too
        each = zip(program.gate_guide.components(), program.prior(), strict=True)
        of_components = nll + sum(kl_divergence(q, p).sum() for q, p in each) / 4 / N_TRAIN
    error = math.sqrt((losses.var() + exact.var()) / 150)
    assert abs(losses.mean() - exact.mean()) < 4 * error < 0.5 * (of_components - exact.mean())


def test_a_kl_weight_is_a_scale_of_every_latent_site():
    program = bits("straight_through")
    program.kl_weight = 0.25
    torch.manual_seed(1)
    ours = program.terms(*data(program))
    torch.manual_seed(1)
    theirs = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, *data(program)) / N_TRAIN
    torch.testing.assert_close(ours.loss, theirs)
    torch.testing.assert_close(ours.loss, ours.nll + 0.25 * (ours.kl_z + ours.kl_g) / N_TRAIN)


@pytest.mark.parametrize("name", ELBOS.names())
def test_gates_that_are_given_are_not_drawn_and_pay_nothing(name):
    program, opened = chains(name), Gates(*(torch.ones(x) for x in (toy_layout(rank=3).z_shape, (2, 2))))
    model, guide = (poutine.condition(part, data=opened._asdict()) for part in (program.model, program.guide))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    terms = program.elbo.terms(model, guide, *data(program))
    assert torch.equal(torch.rand(3), expected)
    torch.testing.assert_close(terms.nll, program.nll(*data(program), *opened))
    assert torch.equal(terms.loss, terms.nll) and terms.kl_z == program.kl().z > 0


class Twice(GateELBO):
    """The mean of two straight-through draws."""

    def expected_nll(self, at):
        return (at.nll(at.gates) + at.nll(at.gates_of(0))) / 2


@pytest.fixture
def twice(monkeypatch):
    monkeypatch.setattr(ELBOS, "_functions", dict(ELBOS._functions))
    register_elbo("twice")(Twice)


def test_an_elbo_of_ones_own_takes_a_method(twice):
    values, single = (values_of(chains(name), 400) for name in ("twice", "straight_through"))
    assert 0.3 < values.var() / single.var() < 0.75


def test_what_is_no_elbo_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("def old(score, guide, temperature): pass\ndef nothing(): pass\n")
    with pytest.raises(ValueError, match=r"old' takes arguments: it must be a subclass of pyro_blora\.elbos\.GateELBO"):
        bits(f"{tmp_path}/mine.py:old")
    with pytest.raises(ValueError, match="nothing' makes a NoneType, which is no ELBO of gates"):
        bits(f"{tmp_path}/mine.py:nothing")


def test_the_natural_gradient_is_that_of_random_rates():
    """Of KL(q || p(. | rates)) at the drawn rates: the factors alone would be that of KL(q || p(. | their mean))."""
    layout = toy_layout()
    prior = build_prior("hierarchical", layout, {})
    guide = build_guide("mean_field", layout, prior)
    program = Regression(layout, prior, guide, estimator="gauss_newton")
    (inputs, labels), masks = data(program), (program.z_mask, program.g_mask)
    factors = guide.z_evidence, guide.g_evidence
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in factors:
            parameter.copy_(torch.randn_like(parameter))
    for _ in range(3):
        drawn = poutine.trace(poutine.block(program.guide, expose=["rates"])).get_trace(inputs, labels)
        terms = program.elbo.terms(program.model, poutine.replay(program.guide, drawn), inputs, labels)
        found = torch.autograd.grad(terms.kl_z + terms.kl_g, factors)
        q, p = guide.components(), prior.gates_at(drawn.nodes["rates"]["value"])
        kl = sum(torch.where(m, kl_divergence(a, b), 0.0).sum() for a, b, m in zip(q, p, masks, strict=True))
        slopes = torch.autograd.grad(kl, factors)
        for own, e, distribution, slope, mask in zip(found, factors, q, slopes, masks, strict=True):
            matrix = fisher(distribution.mean[:, mask].double())
            exact = torch.linalg.solve(matrix, slope[:, mask].double()[..., None])[..., 0]
            torch.testing.assert_close(own[:, mask].double(), exact, rtol=0, atol=1e-3)
            assert (exact - e[:, mask]).abs().max() > 0.1


def test_an_estimator_with_something_to_learn_is_refused():
    """Nothing would train it, and no checkpoint would hold it."""

    class Learned(StraightThrough, nn.Module):
        def __init__(self):
            nn.Module.__init__(self)
            StraightThrough.__init__(self)
            self.c = nn.Parameter(torch.zeros(()))

    with pytest.raises(ValueError, match="has parameters or buffers, which nothing trains and no checkpoint holds"):
        build_elbo(lambda: Learned(), None)
