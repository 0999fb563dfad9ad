"""Natural gradients of the gates: the estimate against enumeration, the average, the shrinkage, and what is reached."""

import pytest
import torch

from experiments.ladder.noisy import curvature_of, learned, loss
from experiments.ladder.problems import twelve_gates
from experiments.ladder.states import best_on_table
from pyro_blora.gates import Gates, RelaxedNestedBernoulli
from pyro_blora.guides import components
from pyro_blora.training.natural_gradient import NaturalGradient, averaged, fisher, shrunk, standard_error

GO_ON = torch.tensor(False)


@pytest.fixture(scope="module")
def problem():
    return twelve_gates()


def program_of(problem, estimator="gauss_newton", *, curved=True, **settings):
    program = problem.program("mean_field", estimator, **settings)
    if program.elbo.needs_curvature and curved:
        program.elbo.take_curvature(curvature_of(problem))
    return program


@pytest.mark.parametrize("curved", [True, False])
def test_slopes_at_a_draw_are_the_differences_of_a_quadratic_nll_and_only_with_its_curvature(problem, curved):
    """Of every gate at once, from one backward pass: NLL with it open less NLL with it closed, the others as drawn."""
    program, n = program_of(problem, curved=curved), len(problem.labels)
    e = program.gate_guide.z_evidence
    for state in (0, 1234, 4095):
        drawn = Gates(*(x[state] for x in problem.table.states.gates))
        program.elbo.draw = lambda q, drawn=drawn: drawn.z if q.event_shape == drawn.z.shape[-1:] else drawn.g
        slope = torch.autograd.grad(loss(program, problem, 0.0), e)[0].flatten() - e.detach().flatten() / n
        exact = []
        for k in range(12):
            opened, closed = drawn.z.clone(), drawn.z.clone()
            opened[k], closed[k] = 1.0, 0.0
            exact.append(problem.looked_up(Gates(opened, drawn.g)) - problem.looked_up(Gates(closed, drawn.g)))
        assert torch.allclose(slope, torch.stack(exact), atol=1e-5) is curved


def test_the_fisher_matrix_is_the_covariance_of_open_gates_and_turns_marginal_slopes_into_those_of_log_odds():
    logits = torch.tensor([0.4, -0.3, 1.2], dtype=torch.double, requires_grad=True)
    q = RelaxedNestedBernoulli(logits, 1.0).discrete
    states = q.enumerate_support()
    probs, mean = q.log_prob(states).exp(), q.mean
    covariance = torch.einsum("s,si,sj->ij", probs, states - mean, states - mean)
    torch.testing.assert_close(fisher(mean), covariance)


def test_the_average_weighs_the_tth_target_by_t_and_knows_its_error():
    torch.manual_seed(0)
    targets = 3 + 2 * torch.randn(200, 500)
    zero = torch.zeros(500)
    state = {"step": torch.zeros(()), "start": zero, "mean": zero, "variance": zero}
    for target in targets:
        state = averaged(state, target)
    weights = torch.arange(1, 201) / sum(range(1, 201))
    torch.testing.assert_close(state["mean"], weights @ targets, rtol=1e-4, atol=1e-4)
    spread = weights @ (targets - state["mean"]).square()
    torch.testing.assert_close(state["variance"], spread, rtol=1e-3, atol=1e-3)
    # 500 averages: how far they are from the truth is what they say
    assert standard_error(state).mean() == pytest.approx((state["mean"] - 3).square().mean().sqrt().item(), rel=0.15)


def at(mean, error, steps=100.0):
    """A state whose means have a given standard error, and which started at 0."""
    t = torch.tensor(steps)
    squares = 2 * (2 * t + 1) / (3 * t * (t + 1))
    variance = torch.full_like(mean, error**2) * (1 - squares) / squares
    return {"step": t, "start": torch.zeros_like(mean), "mean": mean, "variance": variance}


def test_noise_leaves_gates_where_they_started_and_what_is_clear_moves_all_the_way():
    torch.manual_seed(0)
    one_role = torch.ones(1, 400)
    noise = torch.randn(400)
    moved = shrunk(at(noise, 1.0), one_role)
    assert moved.square().mean() < 0.1 * noise.square().mean()
    clear = 20 * torch.randn(400) + torch.randn(400)
    torch.testing.assert_close(shrunk(at(clear, 1.0), one_role), clear, rtol=0.02, atol=0.5)


def test_gates_of_a_role_share_what_they_have_in_common_and_those_of_other_roles_do_not_see_it():
    torch.manual_seed(0)
    two_roles = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(200, 1)
    means = torch.randn(400) + torch.tensor([2.0, 0.0]).repeat_interleave(200)
    moved = shrunk(at(means, 1.0), two_roles)
    assert moved[:200].mean() == pytest.approx(2.0, abs=0.3) and moved[:200].std() < 0.5
    assert moved[200:].abs().mean() < 0.3
    torch.testing.assert_close(moved[:200], shrunk(at(means[:200], 1.0), torch.ones(1, 200)))
    others = means + torch.tensor([0.0, 9.0]).repeat_interleave(200)
    assert torch.equal(shrunk(at(others, 1.0), two_roles)[:200], moved[:200])


@pytest.mark.parametrize(("estimator", "bound"), [("gauss_newton", 0.1), ("relaxed", 1.0)])
def test_twelve_gates_are_learned_in_500_noisy_steps(problem, estimator, bound):
    """ELBO gap to the exact mean field, nats, at a noise of 5 nats a step; Adam at .02 is 8 away, at .1 it is 1.2."""
    states, log_joint = problem.table.states, problem.table.log_joint
    best = problem.table.elbo(best_on_table(states, log_joint, restarts=2, steps=300)[0])
    program = learned(program_of(problem, estimator), problem, steps=500)
    assert best - problem.table.elbo(states.log_q(components(program.gate_guide))) < bound


def test_a_step_that_is_left_out_changes_nothing(problem):
    program = program_of(problem)
    natural, (z, g) = NaturalGradient(program), program.gate_guide.parameters()
    for number in range(30):
        z.grad, g.grad = torch.randn(z.shape), None
        before, kept = z.detach().clone(), {k: x.clone() for k, x in natural.state.get(z, {}).items()}
        if left_out := number == 20:
            z.grad.fill_(torch.nan)
        natural.step(torch.tensor(left_out))
        same = all(torch.equal(x, natural.state[z][k]) for k, x in kept.items())
        assert (torch.equal(z, before) and same) == (left_out or number == 0) or number < 9
    assert z.isfinite().all() and natural.state[z]["step"] == 29


def test_a_share_leads_gates_that_far_from_their_start_to_the_average(problem):
    reached = {}
    for share in (0.25, 1.0):
        torch.manual_seed(0)
        program = program_of(problem)
        natural, z = NaturalGradient(program), program.gate_guide.z_evidence
        start = z.detach().clone()
        for number in range(15):
            z.grad = 1 + torch.rand(z.shape)
            natural.step(GO_ON, share if number == 14 else 0.0)
            assert torch.equal(z, start) == (number < 14)
        reached[share] = z.detach() - start
    torch.testing.assert_close(reached[0.25], 0.25 * reached[1.0])


def test_gates_that_the_prior_pins_stay(problem):
    program = program_of(problem)
    program.gate_guide.z_pins[3] = torch.inf
    natural, z = NaturalGradient(program), program.gate_guide.z_evidence
    before = z.detach().clone()
    for _ in range(20):
        z.grad = 1 + torch.rand(z.shape)
        natural.step(GO_ON)
    assert torch.equal((z == before).flatten(), torch.arange(12) == 3)


def test_a_guide_without_marginals_is_refused(problem):
    with pytest.raises(ValueError, match="log Bayes factors"):
        problem.program("point", "gauss_newton")
    with pytest.raises(ValueError, match="gate_optimizer adam"):
        NaturalGradient(problem.program("point", "straight_through"))
