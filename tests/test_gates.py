"""Laws of the nested gates, against the literal chain of Bernoulli sites and brute-force enumeration."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import kl_divergence

from pyro_blora.gates import NestedBernoulli, RelaxedNestedBernoulli, pinned_logits
from pyro_blora.ladder_math import log_at_least, nested

PROBS = torch.tensor([[0.9, 0.5, 0.25], [0.3, 0.99, 0.6]], dtype=torch.float64)  # (2, K), conditional
OTHER = torch.tensor([[0.2, 0.7, 0.4], [0.8, 0.1, 0.95]], dtype=torch.float64)
RATES = st.lists(st.floats(-6, 6).map(lambda power: 10.0**power), min_size=1, max_size=5)


def distribution(probs=PROBS):
    return NestedBernoulli(probs.log())


def relaxed(probs=PROBS, temperature=0.5, hard=True):
    return RelaxedNestedBernoulli(probs.logit(), temperature, hard)


def vectors(gates):
    return [torch.tensor(v, dtype=torch.float64) for v in itertools.product((0.0, 1.0), repeat=gates)]


def chain_model(probs):
    """The same distribution as one Pyro site a gate, as the papers write it."""
    parent = torch.ones((), dtype=probs.dtype)
    for k, p in enumerate(probs):
        parent = pyro.sample(f"z_{k}", dist.Bernoulli(p * parent))


def chain_log_prob(probs, vector):
    sites = {f"z_{k}": gate for k, gate in enumerate(vector)}
    return pyro.poutine.trace(pyro.condition(chain_model, sites)).get_trace(probs).log_prob_sum()


def log_softmax_depths(q):
    """(states, probability of each), by enumeration of a distribution of batch shape ()."""
    chains = q.enumerate_support()
    return chains, q.log_prob(chains)


# --- the discrete distribution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1])
def test_log_prob_equals_a_literal_chain_of_bernoulli_sites(row):
    ours = distribution(PROBS[row])
    for vector in vectors(3):
        expected = chain_log_prob(PROBS[row], vector)
        is_chain = bool((vector[1:] <= vector[:-1]).all())
        # Pyro's Bernoulli clamps an impossible value to about log(eps) instead of -inf
        assert is_chain == bool(expected > -15)
        value = NestedBernoulli(PROBS[row].log(), validate_args=False).log_prob(vector)
        if is_chain:
            torch.testing.assert_close(ours.log_prob(vector), expected)
        else:
            assert value == -torch.inf


def test_probabilities_of_all_vectors_sum_to_one():
    q = NestedBernoulli(PROBS.log(), validate_args=False)
    total = sum(q.log_prob(vector.expand(2, 3)).exp() for vector in vectors(3))
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64))


def test_a_value_that_is_no_chain_is_refused_when_validating():
    for value in ([0.0, 1.0, 0.0], [1.0, 0.5, 0.0], [2.0, 1.0, 0.0]):
        with pytest.raises(ValueError, match="support"):
            distribution(PROBS[0]).log_prob(torch.tensor(value, dtype=torch.float64))


def test_the_gradient_of_log_prob_in_a_chain_is_the_exact_difference():
    q, value = distribution(PROBS[0]), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(q.log_prob(value), value)
    closer = q.log_prob(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    opener = q.log_prob(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(slope[1], q.log_prob(value.detach()) - closer)
    torch.testing.assert_close(slope[2], opener - q.log_prob(value.detach()))


@pytest.mark.parametrize("gates", [0, 1, 3])
def test_moments_equal_sums_over_all_states(gates):
    q = distribution(PROBS[0, :gates])
    chains, log_probs = log_softmax_depths(q)
    weights = log_probs.exp()
    assert chains.shape == (gates + 1, gates) and chains.sum(-1).tolist() == list(range(gates + 1))
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(q.mean, weights @ chains)
    torch.testing.assert_close(q.variance, weights @ (chains - q.mean) ** 2)
    torch.testing.assert_close(q.depth_probs, weights)  # chains come in order of their depth
    torch.testing.assert_close(q.entropy(), -(weights * log_probs).sum())


def test_marginals_are_products_of_conditional_probabilities():
    torch.testing.assert_close(distribution().mean, PROBS.cumprod(-1))


def test_enumerate_support_broadcasts_over_the_batch():
    chains, compact = distribution().enumerate_support(), distribution().enumerate_support(expand=False)
    assert chains.shape == (4, 2, 3) and compact.shape == (4, 1, 3)
    assert torch.equal(chains, compact.expand(4, 2, 3))
    torch.testing.assert_close(distribution().log_prob(compact).exp().sum(0), torch.ones(2, dtype=torch.float64))


def test_pyro_enumerates_a_model_of_nested_gates_exactly():
    seen = torch.tensor(1.3, dtype=torch.float64)

    def model():
        z = pyro.sample("z", distribution(PROBS[0]), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=seen)

    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=0)
    depth = torch.arange(4, dtype=torch.float64)
    evidence = (distribution(PROBS[0]).depth_probs * dist.Normal(depth, 1.0).log_prob(seen).exp()).sum().log()
    assert math.isclose(-elbo.loss(model, lambda: None), evidence.item(), rel_tol=1e-9)


def test_sample_frequencies_are_the_law():
    torch.manual_seed(0)
    draws = distribution().sample((40_000,))
    assert draws.shape == (40_000, 2, 3) and bool(distribution().support.check(draws).all())
    depths = torch.nn.functional.one_hot(draws.sum(-1).long(), 4).double().mean(0)
    error = (depths - distribution().depth_probs).abs()
    assert bool((error < 4 * (distribution().depth_probs / 40_000).sqrt()).all())  # four standard errors


def test_mode_opens_gates_whose_marginal_exceeds_one_half():
    probs = torch.tensor([0.9, 0.8, 0.65, 0.99])  # marginals .9 .72 .468 .463: each conditional exceeds one half
    assert distribution(probs).mode.tolist() == [1, 1, 0, 0]
    assert distribution(torch.tensor([0.5, 1.0])).mode.tolist() == [0, 0]  # one half itself is closed


def test_expand_keeps_the_law():
    wide = distribution().expand((5, 2))
    assert wide.batch_shape == (5, 2) and wide.event_shape == (3,) and wide.sample().shape == (5, 2, 3)
    torch.testing.assert_close(wide.depth_probs, distribution().depth_probs.expand(5, 2, 4))
    soft = relaxed(hard=False, temperature=0.3).expand((5, 2))
    assert (soft.temperature, soft.hard, soft.rsample().shape) == (0.3, False, (5, 2, 3))


def test_a_chain_without_gates_has_one_state():
    q = NestedBernoulli(torch.zeros(4, 0))
    assert q.sample().shape == (4, 0) and q.enumerate_support().shape == (1, 4, 0)
    for value in (q.log_prob(q.sample()), q.entropy(), kl_divergence(q, q)):
        assert torch.equal(value, torch.zeros(4))
    assert torch.equal(q.depth_probs, torch.ones(4, 1))
    soft = RelaxedNestedBernoulli(torch.zeros(4, 0), 0.5)
    assert soft.rsample().shape == (4, 0) and torch.equal(kl_divergence(soft, q), torch.zeros(4))


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6))
def test_from_depth_logits_inverts_depth_probs(logits):
    logits = torch.tensor(logits, dtype=torch.float64)
    q = NestedBernoulli.from_depth_logits(logits)
    torch.testing.assert_close(q.depth_probs, logits.softmax(-1), atol=1e-12, rtol=1e-9)
    again = NestedBernoulli.from_depth_logits(q.depth_probs.log())
    torch.testing.assert_close(again.mean, q.mean, atol=1e-12, rtol=1e-9)


def test_depths_of_probability_zero_stay_impossible():
    for probs in ([0.0, 0.0, 1.0, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]):
        probs = torch.tensor(probs)
        logits = probs.log().requires_grad_()
        q = NestedBernoulli.from_depth_logits(logits)
        torch.testing.assert_close(q.depth_probs, probs)
        (slope,) = torch.autograd.grad(q.mean.sum(), logits)
        assert bool(slope[probs > 0].isfinite().all())


def test_depth_log_probs_do_not_underflow():
    q = NestedBernoulli.from_rate(torch.full((4,), 100.0))  # P(d = 4) = exp(-400), below float32
    torch.testing.assert_close(q.depth_log_probs, torch.tensor([0.0, -100, -200, -300, -400]))
    torch.testing.assert_close(distribution().depth_log_probs, distribution().depth_probs.log())


@pytest.mark.parametrize("rate", [-1e-3, float("nan")])
def test_a_rate_that_is_no_rate_is_refused(rate):
    with pytest.raises(ValueError, match="rate must be >= 0"):
        NestedBernoulli.from_rate(torch.tensor([1.0, rate]))


@pytest.mark.parametrize("bad", [0.1, float("nan")])
def test_positive_log_probabilities_are_refused(bad):
    with pytest.raises(ValueError, match="log_probs"):
        NestedBernoulli(torch.tensor([-1.0, bad]))


# --- the KL -----------------------------------------------------------------------------------------------------------


def enumerated_kl(q, p):
    chains = q.enumerate_support()
    log_q, log_p = q.log_prob(chains), p.log_prob(chains)
    return torch.where(log_q > -torch.inf, log_q.exp() * (log_q - log_p), 0.0).sum(0)


def test_kl_equals_enumeration():
    expected = enumerated_kl(distribution(PROBS), distribution(OTHER))
    torch.testing.assert_close(kl_divergence(distribution(PROBS), distribution(OTHER)), expected)
    torch.testing.assert_close(kl_divergence(relaxed(PROBS), distribution(OTHER)), expected)
    assert torch.equal(kl_divergence(distribution(PROBS), distribution(PROBS)), torch.zeros(2, dtype=torch.float64))


def test_kl_of_a_relaxed_law_ignores_temperature_and_hardness():
    values = [kl_divergence(relaxed(PROBS, t, hard), distribution(OTHER)) for t in (0.1, 2.0) for hard in (True, False)]
    assert all(torch.equal(value, values[0]) for value in values)


def test_kl_of_a_single_chain_is_minus_its_log_prior():
    for chain in distribution(OTHER[0]).enumerate_support():
        expected = -distribution(OTHER[0]).log_prob(chain)
        torch.testing.assert_close(kl_divergence(dist.Delta(chain, event_dim=1), distribution(OTHER[0])), expected)


def test_kl_gradient_equals_that_of_enumeration():
    q, p = PROBS.log().requires_grad_(), OTHER.log().requires_grad_()
    closed = torch.autograd.grad(kl_divergence(NestedBernoulli(q), NestedBernoulli(p)).sum(), (q, p))
    brute = torch.autograd.grad(enumerated_kl(NestedBernoulli(q), NestedBernoulli(p)).sum(), (q, p))
    torch.testing.assert_close(closed, brute)


@given(RATES, RATES)
@settings(max_examples=200, deadline=None)
def test_any_rates_give_finite_values_and_gradients_in_float32(q_rates, p_rates):
    gates = min(len(q_rates), len(p_rates))
    q_rate = torch.tensor(q_rates[:gates], requires_grad=True)
    p_rate = torch.tensor(p_rates[:gates], requires_grad=True)
    q, p = NestedBernoulli.from_rate(q_rate), NestedBernoulli.from_rate(p_rate)
    values = [kl_divergence(q, p), q.entropy(), p.log_prob(torch.zeros(gates)), p.log_prob(torch.ones(gates)), *q.mean]
    for value in values:
        assert bool(value.isfinite())
    slopes = torch.autograd.grad(sum(values), (q_rate, p_rate))
    assert all(bool(slope.isfinite().all()) for slope in slopes)
    assert values[0] >= -1e-5 and values[1] >= 0


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=5), RATES)
@settings(max_examples=200, deadline=None)
def test_any_logits_give_finite_kl_and_gradients_in_float32(logits, rates):
    gates = min(len(logits), len(rates))
    logits = torch.tensor(logits[:gates], requires_grad=True)
    p = NestedBernoulli.from_rate(torch.tensor(rates[:gates]))
    kl = kl_divergence(RelaxedNestedBernoulli(logits, 0.1), p)
    (slope,) = torch.autograd.grad(kl, logits)
    assert bool(kl.isfinite()) and bool(slope.isfinite().all())


def test_equal_pins_cost_nothing_and_contrary_pins_cost_everything():
    opened, closed = NestedBernoulli(torch.zeros(3)), NestedBernoulli(torch.full((3,), -torch.inf))
    for pinned in (opened, closed, NestedBernoulli(torch.tensor([0.0, -torch.inf, -torch.inf]))):
        assert kl_divergence(pinned, pinned) == 0
        assert pinned.entropy() == 0
        same = RelaxedNestedBernoulli(pinned_logits(pinned.log_probs), 0.5, validate_args=False)
        assert kl_divergence(same, pinned) == 0
    assert kl_divergence(opened, closed) == torch.inf
    assert kl_divergence(closed, opened) == torch.inf
    assert kl_divergence(distribution(PROBS[0].float()), opened) == torch.inf


def test_a_pin_below_a_closed_gate_is_never_reached():
    q = NestedBernoulli(torch.tensor([-torch.inf, 0.0]))
    p = NestedBernoulli(torch.tensor([-torch.inf, -torch.inf]))
    assert kl_divergence(q, p) == 0  # both never open the first gate


def test_pinned_gates_pass_no_nan_gradient_to_the_free_ones():
    p = NestedBernoulli(torch.tensor([0.0, -0.7, -torch.inf]))
    pins = pinned_logits(p.log_probs)
    assert pins[0] == torch.inf and pins[1].isnan() and pins[2] == -torch.inf
    free = torch.zeros(3, requires_grad=True)
    q = RelaxedNestedBernoulli(torch.where(pins.isnan(), free, pins), 0.5, validate_args=False)
    kl = kl_divergence(q, p)
    (slope,) = torch.autograd.grad(kl + q.rsample().sum(), free)
    expected = enumerated_kl(q.discrete, p)
    torch.testing.assert_close(kl, expected)
    assert bool(slope.isfinite().all()) and slope[0] == 0 and slope[1] != 0 and slope[2] == 0


def test_certain_log_probabilities_get_finite_gradients():
    certain = torch.tensor([0.0, -0.7, -torch.inf], requires_grad=True)
    other = torch.tensor([0.0, -0.2, -torch.inf], requires_grad=True)
    q, p = NestedBernoulli(certain), NestedBernoulli(other)
    for value in (kl_divergence(q, p), q.entropy(), q.depth_probs @ torch.arange(4.0)):
        slopes = torch.autograd.grad(value, (certain, other), materialize_grads=True, retain_graph=True)
        assert all(bool(slope.isfinite().all()) for slope in slopes) and slopes[0][1] != 0


# --- the relaxation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        RelaxedNestedBernoulli(torch.zeros(3), temperature)


def test_hard_samples_are_exact_draws_of_the_discrete_law():
    torch.manual_seed(0)
    with torch.no_grad():
        draws = relaxed(PROBS.float(), 0.5, hard=True).rsample((40_000,))
    assert bool(((draws == 0) | (draws == 1)).all())  # not 0.99999994: an open ladder must be the plain network
    depths = torch.nn.functional.one_hot(draws.sum(-1).long(), 4).double().mean(0)
    assert bool(((depths - distribution().depth_probs).abs() < 4 * (distribution().depth_probs / 40_000).sqrt()).all())


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_soft_samples_are_nested_and_lie_between_zero_and_one(temperature):
    torch.manual_seed(0)
    draws = relaxed(temperature=temperature, hard=False).rsample((1000,))
    assert bool(((draws >= 0) & (draws <= 1)).all()) and bool((draws[..., 1:] <= draws[..., :-1]).all())
    assert bool(((draws > 0.01) & (draws < 0.99)).any())


def test_soft_samples_become_hard_as_the_temperature_falls():
    torch.manual_seed(0)
    hard = relaxed(hard=True).rsample((200,))
    torch.manual_seed(0)
    cold = relaxed(temperature=1e-6, hard=False).rsample((200,))
    assert ((hard - cold).abs() > 1e-3).double().mean() < 0.01


def test_the_straight_through_gradient_is_that_of_the_relaxed_gates():
    logits = torch.tensor([0.4, -0.3, 1.0], dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    noise = torch.rand(3, dtype=torch.float64).logit()
    soft = torch.sigmoid((logits + noise) / 0.5)
    hard = (logits + noise > 0).double()
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    # d(c1 c2 c3)/dc at the hard gates, times dc/dlogits of the soft ones
    slope_of_gates = torch.stack([
        weights[0] + weights[1] * hard[1] + weights[2] * hard[1] * hard[2],
        hard[0] * (weights[1] + weights[2] * hard[2]),
        weights[2] * hard[0] * hard[1],
    ])  # fmt: skip
    expected = slope_of_gates * (soft * (1 - soft) / 0.5).detach()
    torch.manual_seed(1)
    sample = RelaxedNestedBernoulli(logits, 0.5, hard=True).rsample()
    torch.testing.assert_close(sample.detach(), hard.cumprod(-1))
    (slope,) = torch.autograd.grad(sample @ weights, logits)
    torch.testing.assert_close(slope, expected)
    assert bool((slope != 0).any())


def test_log_prob_and_mean_of_a_relaxed_law_are_the_discrete_ones():
    value = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64)
    soft, expected = relaxed(PROBS[0], hard=False), distribution(PROBS[0]).log_prob(value.round())
    torch.testing.assert_close(soft.log_prob(value), expected)
    torch.testing.assert_close(relaxed(PROBS[0]).log_prob(value.round()), expected)
    torch.testing.assert_close(relaxed().mean, distribution().mean)


def test_the_log_probability_of_a_hard_draw_has_a_gradient_and_that_of_a_soft_one_none():
    logits = PROBS[0].logit().requires_grad_()
    hard, soft = (RelaxedNestedBernoulli(logits, 0.5, hard) for hard in (True, False))
    value = hard.rsample()
    (slope,) = torch.autograd.grad(hard.log_prob(value.detach()), logits)
    (expected,) = torch.autograd.grad(hard.discrete.log_prob(value.detach()), logits)
    torch.testing.assert_close(slope, expected)
    (through,) = torch.autograd.grad(hard.log_prob(value) - distribution(PROBS[0]).log_prob(value), logits)
    torch.testing.assert_close(through, expected)  # guide and prior agree: nothing comes through the draw
    with pytest.raises(ValueError, match=r"Use program\.elbo or pyro\.infer\.TraceMeanField_ELBO\(\).*or hard draws"):
        soft.log_prob(soft.rsample()).backward()


def test_a_law_without_reparametrised_draws_stays_so_in_a_plate():
    wide = relaxed().has_rsample_(False).expand((3, *relaxed().batch_shape))
    assert not wide.has_rsample and not wide().requires_grad and relaxed().has_rsample


@pytest.mark.parametrize("hard", [True, False])
def test_without_data_svi_returns_the_prior(hard):
    """Pyro's pairing of a relaxed guide with a Bernoulli model ends at .37 to .46 here: it is not an ELBO."""
    pyro.set_rng_seed(0)
    logits = torch.nn.Parameter(torch.zeros(8, 1))
    prior = NestedBernoulli(torch.full((8, 1), 0.25).log(), validate_args=False)

    def model():
        with pyro.plate("gates", 8):
            pyro.sample("z", prior)

    def guide():
        with pyro.plate("gates", 8):
            pyro.sample("z", RelaxedNestedBernoulli(logits, 0.5, hard, validate_args=False))

    optimizer, elbo = torch.optim.Adam([logits], lr=0.05), pyro.infer.TraceMeanField_ELBO()
    for _ in range(300):
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide).backward()
        optimizer.step()
    assert bool((logits.sigmoid() - 0.25).abs().max() < 0.01)


@pytest.mark.parametrize("gates", [1, 4, 9])
def test_the_slope_of_a_chain_is_that_of_the_product_with_closed_gates_too(gates):
    torch.manual_seed(0)
    x = torch.rand(5, gates, dtype=torch.float64)
    x[0, gates // 2], x[1, 0], x[1, -1], x[2] = 0.0, 0.0, 0.0, 0.0
    x.requires_grad_()
    upstream = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(chain, x, upstream)[0] for chain in (nested(x), x.cumprod(-1)))
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("depths", [2, 5, 10])
def test_the_slope_of_log_at_least_is_that_of_logsumexp(depths):
    torch.manual_seed(0)
    x = (20 * torch.randn(6, depths, dtype=torch.float64)).requires_grad_()
    each = torch.stack([x[:, k:].logsumexp(-1) for k in range(depths)], -1)
    torch.testing.assert_close(log_at_least(x), each)
    upstream = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(value, x, upstream)[0] for value in (log_at_least(x), each))
    torch.testing.assert_close(ours, theirs)
    impossible = x.detach().clone()
    impossible[:, -1] = -torch.inf
    (slope,) = torch.autograd.grad(log_at_least(impossible.requires_grad_())[:, :-1].sum(), impossible)
    assert bool(slope.isfinite().all()) and not slope[:, -1].any()
