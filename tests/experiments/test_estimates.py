"""Estimates of the gates' natural gradient: exact targets, programs of a table, and what is unbiased."""

import pytest
import torch

from experiments.ladder import estimates, rivals
from experiments.ladder.estimates import exact_targets, targets
from experiments.ladder.gradients import exact_gradient
from experiments.ladder.noisy import curvature_of, loss
from experiments.ladder.problems import Network, twelve_gates
from experiments.ladder.tabulated import tabulated
from pyro_blora.gates import Gates
from pyro_blora.training.natural_gradient import fisher

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def network(eager):
    return Network(examples=8).problem()


@pytest.fixture(scope="module")
def table(network):
    return tabulated(network)


def program_of(problem, elbo):
    program = problem.program()
    program.elbo = elbo
    elbo.check(program.gate_guide)
    return program


def exact_of(program, problem):
    return exact_targets(problem, problem.table.states.log_q(program.gate_guide.components()).detach())


def test_exact_targets_are_the_gradient_over_the_fisher_matrix(network):
    program, states, n = network.program(), network.table.states, len(network.labels)
    guide = program.gate_guide
    slopes = exact_gradient(program, network).split([guide.z_evidence.numel(), guide.g_evidence.numel()])
    slopes = Gates(slopes[0].view_as(guide.z_evidence)[0], slopes[1].view_as(guide.g_evidence)[0])
    expected = [
        -n * torch.linalg.solve(fisher(guide.components()[site].mean[0][index]).double(), slopes[site][index].double())
        for site, index in states.chains
    ]
    torch.testing.assert_close(exact_of(program, network), torch.cat(expected).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("state", [0, 123, 399])
def test_a_program_of_the_table_has_the_networks_value_and_slopes(network, table, state):
    drawn, found = Gates(*(x[state] for x in table.table.states.gates)), []
    for problem in (network, table):
        program = problem.program(estimator="gauss_newton")
        program.elbo.draw = lambda q: drawn.z if q.event_shape == drawn.z.shape[-1:] else drawn.g
        torch.manual_seed(0)
        value = loss(program, problem, 0.0, 5)
        slopes = torch.autograd.grad(value, (program.gate_guide.z_evidence, program.gate_guide.g_evidence))
        free = [slopes[site][0][index] for site, index in table.table.states.chains]
        found.append(torch.cat([value[None], *free]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_the_path_estimate_of_one_ladder_at_a_time_is_unbiased(network):
    """One of four ladders stands between two depths, on a network that is not quadratic."""
    program = program_of(network, rivals.Path())
    torch.manual_seed(0)
    found, exact = targets(program, network, 400), exact_of(program, network)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() < 4 * error + 1e-4).all()
    assert (exact - torch.cat([x.flatten() for x in _present(program, network)])).abs().max() > 4 * error.max()


def _present(program, problem):
    return [program.gate_guide.factors(0)[site][index].detach() for site, index in problem.table.states.chains]


def test_a_control_variate_changes_no_mean_and_removes_the_noise_of_batches(table):
    plain, anchored = (program_of(table, make()) for make in (estimates.GaussNewton, rivals.Anchored))
    whole, batches = [], []
    for program in (plain, anchored):
        for found, batch in ((whole, None), (batches, 2)):
            torch.manual_seed(0)
            found.append(targets(program, table, 300, batch=batch))
    torch.testing.assert_close(*whole, rtol=1e-4, atol=1e-4)  # of all examples it is the same estimate
    spread = [x.var(0).mean() for x in batches]
    difference = batches[1].mean(0) - whole[0].mean(0)
    error = ((batches[1].var(0) + whole[0].var(0)) / 300).sqrt()
    assert (difference.abs() < 4 * error + 1e-4).all() and spread[1] < spread[0]


def test_linear_noise_is_removed_by_a_control_variate_and_gauss_newton_is_exact_on_a_quadratic():
    problem = twelve_gates()
    program = program_of(problem, rivals.Anchored())
    program.elbo.take_curvature(curvature_of(problem))
    torch.manual_seed(0)
    clean = targets(program, problem, 1)
    torch.manual_seed(0)
    assert torch.allclose(targets(program, problem, 1, noise=50.0), clean, atol=1e-2)
    found, exact = targets(program, problem, 300), exact_of(program, problem)
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / 300**0.5 + 1e-3).all()
