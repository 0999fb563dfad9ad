"""The acceptance ladder in small: rungs and thresholds of experiments/check_posterior.py, on the cases that pass there.

What misses its threshold is in benchmarks/posterior_ladder.md.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.ladder import rungs, sbc
from experiments.ladder.batched import nll, trained_posteriors
from experiments.ladder.calibration import Simulations, calibration, ecdf_p_value
from experiments.ladder.fitting import svi
from experiments.ladder.gradients import estimators, exact_gradient, place, quality, sampled
from experiments.ladder.problems import Network, one_gate, prior_only, twelve_gates
from experiments.ladder.starts import start_fits
from experiments.ladder.states import best_on_table, coordinate_sweep
from pyro_blora.elbos import build_elbo
from pyro_blora.gates import Gates

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def network(eager):
    return Network()


@pytest.fixture(scope="module")
def problems(network):
    return {"twelve gates": twelve_gates(1), "network": network.problem()}


def require(checks):
    assert checks
    assert not [f"{c.subject}: {c.meaning}: {c.measured:.3g}, bound {c.bound:.3g}" for c in checks if not c.passed]


# --- the harness ------------------------------------------------------------------------------------------------------


def test_the_table_of_one_gate_is_the_closed_form():
    table = one_gate(2.0, open_probability=0.25).table
    expected = torch.sigmoid(torch.logit(torch.tensor(0.25).double()) + 2.0)
    assert table.marginals(table.posterior).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["twelve gates", "network"])
def test_states_are_all_there_and_each_is_found_again(problems, name):
    states = problems[name].table.states
    assert len(states.depths) == {"twelve gates": 4096, "network": 400}[name]
    assert states.log_prior.logsumexp(0).item() == pytest.approx(0.0, abs=1e-6)
    for i in range(0, len(states.depths), 37):
        assert states.index(type(states.gates)(states.gates.z[i], states.gates.g[i])) == i


def test_the_table_equals_enumeration_through_the_network(problems):
    problem = problems["network"]
    program = rungs.random_program(problem, "mean_field", spread=1.0, seed=3)
    program.elbo = build_elbo("enumerate", program.gate_guide)
    with torch.no_grad():
        forwards = program.terms(problem.inputs, problem.labels).nll
    expected = problem.table.expected_nll(rungs.log_q(program, problem)) / len(problem.labels)
    assert forwards.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["twelve gates", "network"])
def test_the_exact_mean_field_is_a_fixed_point_of_coordinate_ascent(problems, name):
    table = problems[name].table
    distribution, elbo = best_on_table(table.states, table.log_joint, restarts=2, steps=600)
    assert elbo.item() < table.log_evidence
    swept = coordinate_sweep(table.states, table.log_joint, distribution)
    torch.testing.assert_close(table.marginals(swept.exp()), table.marginals(distribution.exp()), atol=2e-3, rtol=0)


def test_a_mixture_comes_closer_than_a_mean_field(problems):
    table = problems["network"].table
    _, plain = best_on_table(table.states, table.log_joint, restarts=2, steps=300)
    _, mixed = best_on_table(table.states, table.log_joint, components=4, restarts=2, steps=300)
    assert 0 < table.log_evidence - mixed < 0.5 * (table.log_evidence - plain)


# --- the rungs --------------------------------------------------------------------------------------------------------


def test_without_data_the_guide_returns_the_prior(monkeypatch):
    """Of one estimator and one temperature, which the next test extends to all of them."""
    monkeypatch.setattr(rungs, "ESTIMATORS", ("relaxed",))
    monkeypatch.setattr(rungs, "TEMPERATURES", (0.1,))
    require(rungs.rung_a(steps=250))


@pytest.mark.parametrize(("guide", "estimators"), [("mean_field", rungs.ESTIMATORS), ("mixture", ("relaxed",))])
def test_without_data_a_guide_learns_the_same_whatever_estimator_and_temperature(guide, estimators):
    """The KL of a mean field is exact: no sample enters.  That of a mixture draws no gates at a temperature."""
    problem, learned = prior_only(), []
    for estimator, temperature in itertools.product(estimators, rungs.TEMPERATURES):
        torch.manual_seed(0)
        program = problem.program(guide, estimator, open_logit=2.0)
        svi(program, problem, steps=3, lr=0.1, temperature=temperature)
        learned.append(torch.cat([p.detach().flatten() for p in program.gate_guide.parameters()]))
    assert len(learned) == 3 * len(estimators) and all(torch.equal(one, learned[0]) for one in learned)


def test_one_gate_has_its_closed_form_posterior():
    runs = [("relaxed", 2000), ("straight_through", 2000), ("score_function", 500), ("enumerate", 300)]
    assert {name for name, _ in runs} == {name for name, _ in rungs.ONE_GATE}
    require(rungs.rung_b(runs=runs, ratios=(-1.0,)))


def test_training_reaches_the_posterior_of_twelve_gates(problems):
    problem = problems["twelve gates"]
    exact = rungs.exact_fits(problem, "twelve gates", restarts=2, steps=300)
    require(rungs.fit_checks("c", rungs.trained_fit(problem, "twelve gates", steps=3000), exact))


def test_training_reaches_the_mean_field_of_the_network(problems):
    problem = problems["network"]
    exact = rungs.exact_fits(problem, "network", restarts=2, steps=300)
    fit = rungs.trained_fit(problem, "network", steps=800)
    require([check for check in rungs.fit_checks("d", fit, exact) if check.quantity == "elbo"])


def test_a_trained_mixture_beats_the_exact_mean_field_of_twelve_gates():
    problem = twelve_gates(0)
    exact = rungs.exact_fits(problem, "twelve gates", restarts=2, steps=300)
    fit = rungs.trained_fit(problem, "twelve gates", guide="mixture", label="mixture", steps=2000, components=2)
    checks = rungs.fit_checks("c", fit, exact)
    assert {check.quantity for check in checks} == {"marginal", "mixture"}
    require(checks)


def test_the_start_from_data_is_near_the_posterior(network):
    exact, _, prior, opened, started = start_fits(network, "network", 1, restarts=1, steps=50)
    gaps = [exact.elbo - fit.elbo for fit in (prior, opened, started)]
    assert 0 < gaps[2] < 0.25 * min(gaps[:2])


@pytest.fixture(scope="module")
def simulations(network):
    return Simulations.of(network, 100)


def test_the_exact_posterior_is_calibrated(network, simulations):
    distribution = sbc.on_table(network, simulations, 0)
    require(sbc.checks("exact posterior", calibration(network.states, simulations, distribution)))


@pytest.mark.parametrize(("power", "statistic"), [(3.0, "gates"), (0.2, "log-likelihood")])
def test_an_overconfident_or_a_timid_law_is_found_out(network, simulations, power, statistic):
    distribution = (power * sbc.on_table(network, simulations, 0).log()).softmax(-1)
    found = calibration(network.states, simulations, distribution)
    assert not {c.quantity: c for c in sbc.checks("wrong", found)}[statistic].passed
    assert (found.overconfidence > 0) == (power > 1)


def test_p_values_of_uniform_ranks_are_uniform():
    generator = torch.Generator().manual_seed(1)
    p = torch.tensor([ecdf_p_value(torch.rand(50, generator=generator)) for _ in range(200)])
    for level in (0.05, 0.2, 0.5):
        assert abs((p <= level).double().mean().item() - level) < 4 * (level * (1 - level) / 200) ** 0.5
    assert ecdf_p_value(torch.rand(50, generator=generator).sqrt()) < 0.01


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["twelve gates", "network"]),
    guide=st.sampled_from(["mean_field", "mixture"]),
    spread=st.floats(0.01, 20.0),
    seed=st.integers(0, 2**31),
)
def test_every_elbo_is_below_the_log_evidence(problems, name, guide, spread, seed):
    program = rungs.random_program(problems[name], guide, spread=spread, seed=seed)
    assert rungs.bound_excess(program, problems[name]) <= rungs.THRESHOLDS["f"]["bound"][1]


def test_the_reported_elbo_is_the_exact_one_within_its_error(problems):
    require(rungs.rung_f({"network": problems["network"]}, guides=2, steps=50))


def test_training_and_evaluation_use_one_law(problems):
    require(rungs.rung_g(problems["network"], guides=1, draws=500))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["prior", "converged"])
def placed(problems, request):
    """The network's program at a guide, and the exact gradient there."""
    program = problems["network"].program()
    place(program, problems["network"], request.param)
    torch.manual_seed(0)
    return program, exact_gradient(program, problems["network"])


def test_score_function_estimators_are_unbiased(problems, placed):
    program, exact = placed
    for estimator in [e for e in estimators() if not e.soft]:
        found = quality(sampled(estimator, program, problems["network"], 400), exact, estimator.forwards)
        assert found.bias < 3 * found.bias_error, (estimator.name, found)


@pytest.mark.parametrize("placed", ["prior"], indirect=True)
def test_a_warm_relaxation_is_biased(problems, placed):
    program, exact = placed
    warm = next(e for e in estimators() if e.name.startswith("relaxed") and e.temperature == 1.0)
    found = quality(sampled(warm, program, problems["network"], 60), exact, 1)
    assert found.bias > 3 * found.bias_error, found


def test_trainings_in_parallel_are_those_in_turn(network, simulations):
    few = simulations.split(3)[0]
    for name in (
        "truth",
        "labels",
        "log_likelihood",
    ):  # parts are in order: each distribution is held against its own truth
        assert torch.equal(torch.cat([getattr(part, name) for part in few.split(2)]), getattr(simulations, name)[:3])
    in_turn, forked = (sbc.shipped(network, few, steps=20, batch=2, processes=n) for n in (1, 2))
    assert torch.equal(in_turn, forked) and not torch.equal(in_turn[0], in_turn[1])
    torch.testing.assert_close(in_turn.sum(-1), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_one_simulation_in_a_batch_is_trained_as_svi_trains_it(network, simulations):
    one = simulations.split(1)[0]
    problem = network.problem().with_labels(one.labels[0], one.log_likelihood[0])
    alone = rungs.log_q(svi(problem.program(), problem, steps=20), problem).exp()
    torch.testing.assert_close(trained_posteriors(network, one, steps=20)[0], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("free", [("base",), ("input", "base")])
def test_a_batch_of_simulations_has_the_likelihood_and_gradients_of_each(eager, free):
    network = Network(examples=16, free=free)
    program = network.program()
    torch.manual_seed(0)
    draws = [
        [distribution.rsample().detach() for distribution in program.gate_guide.distributions(0.5, False)]
        for _ in range(3)
    ]
    gates = Gates(*(torch.stack(site).requires_grad_() for site in zip(*draws, strict=True)))
    labels = torch.randint(2, (3, 16))
    together = nll(network, gates, labels)
    alone = torch.stack([program.nll(network.inputs, y, z, g) for y, z, g in zip(labels, *gates, strict=True)])
    torch.testing.assert_close(together, alone)
    tensors = [network.net.layout.tensors.index(name) for name in free]
    (z, g), (z_alone, g_alone) = (torch.autograd.grad(total.sum(), tuple(gates)) for total in (together, alone))
    torch.testing.assert_close(g, g_alone, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(z[:, :, tensors], z_alone[:, :, tensors], atol=1e-6, rtol=1e-4)
    assert z[:, :, tensors].abs().max() > 1e-3
