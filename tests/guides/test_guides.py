"""What a guide holds: evidence in nats beside the prior's; and a mixture's joint distribution, against enumeration."""

import math

import pytest
import torch
from contracts import masks
from models import every_state, toy_layout
from torch import nn
from torch.distributions import kl_divergence

from pyro_blora.bops import expected_bops
from pyro_blora.gates import Gates, NestedBernoulli
from pyro_blora.guides import MeanField, base, build_guide, draw_gates, log_prob, mixture
from pyro_blora.posterior import bops, deployed
from pyro_blora.priors import build_prior
from pyro_blora.program import GateProgram
from pyro_blora.training.natural_gradient import fisher

# --- evidence ---------------------------------------------------------------------------------------------------------


class Rates(nn.Module):
    """A prior with one rate, in nats, that a test can move."""

    def __init__(self, layout, rate):
        super().__init__()
        self.layout, self.rate = layout, nn.Parameter(torch.tensor(rate))

    def forward(self):
        shapes = (self.layout.z_shape, self.layout.g_shape)
        return Gates(*(NestedBernoulli(-self.rate.expand(shape), validate_args=False) for shape in shapes))


def steps(layout, nats):
    """Depth evidence of so many nats for opening every further gate, up to a constant."""
    depths = torch.arange(5.0), torch.arange(float(layout.rank))
    chains = layout.z_shape[:2], layout.g_shape[:1]
    return Gates(*(nats * (depth - 2.0).expand(*c, -1) for depth, c in zip(depths, chains, strict=True)))


def existing_laws(guide, prior, layout):
    """Depth log-probabilities of the posterior and of the prior, of chains that exist."""
    for q, p, mask in zip(guide.posterior(), prior(), (layout.z_mask, layout.g_mask), strict=True):
        yield q.depth_log_probs[mask], p.depth_log_probs[mask]


@pytest.mark.parametrize("prior", ["nested", "bops"])
def test_a_started_guide_is_the_prior_times_the_evidence(prior, layout, monkeypatch):
    monkeypatch.setattr(mixture, "_SPREAD", 0.0)
    prior = build_prior(prior, layout, {"rate": 0.8, "rank_rate": 0.5})
    torch.manual_seed(0)
    evidence = Gates(*(2 * torch.randn(distribution.depth_log_probs.shape) for distribution in prior()))
    exact = [
        (distribution.depth_log_probs + said).softmax(-1) for distribution, said in zip(prior(), evidence, strict=True)
    ]
    existing = [probs[mask] for probs, mask in zip(exact, (layout.z_mask, layout.g_mask), strict=True)]
    for name in ("mean_field", "mixture"):
        guide = build_guide(name, layout, prior)
        guide.start(evidence)
        for (log_q, _), probs in zip(existing_laws(guide, prior, layout), existing, strict=True):
            torch.testing.assert_close(log_q.exp(), probs, atol=1e-5, rtol=1e-4)
    point = build_guide("point", layout, prior)
    point.start(evidence)
    for (log_q, _), probs in zip(existing_laws(point, prior, layout), existing, strict=True):
        median = (probs.cumsum(-1) < 0.5).sum(-1)
        assert torch.equal(log_q.argmax(-1), median) and bool((log_q.amax(-1) == 0).all())


@pytest.mark.parametrize("rate", [0.5, 300.0, 1e5])
def test_without_evidence_the_posterior_is_the_prior(rate, layout):
    prior = Rates(layout, rate)
    guide = build_guide("mean_field", layout, prior)
    guide.start(steps(layout, 0.0))
    for log_q, log_p in existing_laws(guide, prior, layout):
        torch.testing.assert_close(log_q, log_p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [0.5, 300.0, 1e5])
@pytest.mark.parametrize("logit", [-1.0, 0.0, 4.0])
def test_a_guide_opens_at_its_log_odds_whatever_the_prior(logit, rate, layout):
    posterior = build_guide("mean_field", layout, Rates(layout, rate), {"open_logit": logit}).posterior()
    for distribution, exists in zip(posterior, masks(layout), strict=True):
        opening = distribution.log_probs.exp()[exists]
        torch.testing.assert_close(opening, torch.tensor(logit).sigmoid().expand(opening.shape), atol=0.02, rtol=0)


@pytest.mark.parametrize("nats", [-1000.0, 1000.0])
def test_evidence_that_is_sure_is_undone_by_as_many_nats(nats, layout):
    """Nothing is clamped at a start; the way back is as long as the data are sure, in the evidence or in the prior."""
    prior = Rates(layout, 0.7)
    guide = build_guide("mean_field", layout, prior)
    guide.start(steps(layout, nats))
    for distribution, exists in zip(guide.posterior(), masks(layout), strict=True):
        assert torch.equal(distribution.mean[exists], torch.full_like(distribution.mean[exists], float(nats > 0)))
    with torch.no_grad():
        guide.z_evidence -= nats
        guide.g_evidence -= nats
    for log_q, log_p in existing_laws(guide, prior, layout):
        torch.testing.assert_close(log_q, log_p, atol=1e-3, rtol=0)
    if nats > 0:  # a rate is a cost of opening, so only what is open can be answered by it
        guide.start(steps(layout, nats))
        with torch.no_grad():
            prior.rate.fill_(nats)
        for log_q, _ in existing_laws(guide, prior, layout):
            torch.testing.assert_close(log_q, torch.full_like(log_q, -math.log(log_q.shape[-1])), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["mean_field", "mixture"])
def test_a_prior_that_moves_moves_the_gates_in_the_same_call(name, layout):
    prior = Rates(layout, 1.0)
    guide = build_guide(name, layout, prior, {"open_logit": 0.5})
    before = [distribution.depth_log_probs.detach() for distribution in guide.components()]
    with torch.no_grad():
        prior.rate.fill_(3.0)
    moved = [distribution.depth_log_probs for distribution in prior()]
    with torch.no_grad():
        prior.rate.fill_(1.0)
    stood = [distribution.depth_log_probs for distribution in prior()]
    with torch.no_grad():
        prior.rate.fill_(3.0)
    for distribution, old, new, at_start, exists in zip(
        guide.components(), before, moved, stood, masks(layout), strict=True
    ):
        expected = NestedBernoulli.from_depth_logits(old + new - at_start).mean
        torch.testing.assert_close(distribution.mean[:, exists], expected[:, exists], atol=1e-5, rtol=1e-4)
    slopes = torch.autograd.grad(guide.distributions(0.5, True).z.mean.sum(), prior.rate)
    assert slopes[0] < 0


def test_a_point_guide_is_the_chain_whose_product_exceeds_one_half(layout):
    prior = Rates(layout, math.log(2))
    guide = build_guide("point", layout, prior)
    probs = torch.tensor([0.9, 0.8, 0.65, 0.99])  # products .9 .72 .468 .463
    odds = NestedBernoulli(probs.log()).depth_log_probs - prior().z.depth_log_probs.detach()
    guide.start(Gates(odds, torch.zeros(*layout.g_shape[:1], layout.rank)))
    z = layout.z_mask
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(layout.z_shape)[z]
    assert torch.equal(guide.posterior().z.mean[z], expected)
    assert torch.equal(guide.distributions(0.5, True).z.rsample()[z], expected)
    kl = kl_divergence(guide.distributions(0.5, True).z, prior().z)
    torch.testing.assert_close(kl[z], torch.full_like(kl[z], 3 * math.log(2)))  # -log prior of depth 2


def test_a_hard_draw_of_a_guide_follows_its_posterior(layout):
    torch.manual_seed(0)
    guide = build_guide("mean_field", layout, build_prior("nested", layout), {"open_logit": 0.3})
    draws = guide.distributions(0.5, True).z.rsample((5000,)).mean(0)[layout.z_mask].mean(0)
    torch.testing.assert_close(draws, guide.posterior().z.mean[0, 0], atol=0.02, rtol=0)


# --- mixtures ---------------------------------------------------------------------------------------------------------


def mixture_of(layout, components=3, scale=1.5, rate=0.5):
    """A mixture whose components differ by so many nats, and its prior."""
    prior = Rates(layout, rate)
    guide = build_guide("mixture", layout, prior, {"components": components})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (guide.z_evidence, guide.g_evidence):
            parameter.copy_(scale * torch.randn_like(parameter))
    return guide, prior


def densities(distributions, states, layout):
    """log P(state) under each component, from products of depth probabilities.  (S, M)"""
    total = 0.0
    for distribution, gates, mask in zip(distributions, states, (layout.z_mask, layout.g_mask), strict=True):
        depth = gates.sum(-1).long()[:, None, ..., None]  # (S, 1, ..., 1)
        table = distribution.depth_log_probs.expand(
            len(depth), *(-1,) * distribution.depth_log_probs.dim()
        )  # (S, M, ..., K + 1)
        picked = table.gather(-1, depth.expand(*table.shape[:-1], 1))[..., 0]
        total = total + torch.where(mask, picked, 0.0).flatten(2).sum(-1)
    return total


def enumerated_kl(guide, prior, layout):
    """KL of the joint distribution from the prior, and I(component; gates), summed over every state."""
    states = every_state(layout)
    each = densities(guide.components(), states, layout)
    log_p = densities([NestedBernoulli(distribution.log_probs[None]) for distribution in prior()], states, layout)[:, 0]
    log_q = each.logsumexp(-1) - math.log(each.shape[-1])
    kl = (log_q.exp() * (log_q - log_p)).sum()
    information = (each.exp() * (each - log_q[:, None])).sum(0).mean()
    return kl, information


def test_the_joint_law_of_a_mixture_is_normalised():
    layout = toy_layout()
    guide, _ = mixture_of(layout)
    states = every_state(layout)
    log_q = log_prob(guide, states, layout.z_mask, layout.g_mask)
    assert log_q.shape == (4374,)
    torch.testing.assert_close(log_q.exp().sum(), torch.tensor(1.0))
    each = densities(guide.components(), states, layout)
    torch.testing.assert_close(log_q, each.logsumexp(-1) - math.log(3), rtol=1e-4, atol=1e-4)


def test_draws_of_a_mixture_follow_its_joint_law():
    layout = toy_layout(adapted=(True,), ladder=(2, 32))
    guide, _ = mixture_of(layout, scale=3.0)
    states, draws = every_state(layout), draw_gates(guide, 20000)
    probs = log_prob(guide, states, layout.z_mask, layout.g_mask).exp()
    code = [torch.cat([x.flatten(1) for x in gates], -1) @ 2.0 ** torch.arange(6) for gates in (states, draws)]
    counts = (code[1][:, None] == code[0]).sum(0)  # of the 64 states
    assert counts.sum() == 20000
    error = (20000 * probs * (1 - probs)).sqrt()
    assert bool(((counts - 20000 * probs).abs() < 4 * error + 1).all())
    z, marginal = draws.z[:, 0, :2, 0], guide.posterior().z.mean[0, :2, 0]
    assert (z.prod(-1).mean() - marginal.prod()).abs() > 0.02  # the two trade off, which no mean field shows


def test_the_posterior_of_a_mixture_is_its_marginals():
    layout = toy_layout()
    guide, _ = mixture_of(layout)
    states = every_state(layout)
    q = log_prob(guide, states, layout.z_mask, layout.g_mask).exp()
    for distribution, gates in zip(guide.posterior(), states, strict=True):
        torch.testing.assert_close(distribution.mean, torch.einsum("s,s...->...", q, gates), atol=1e-5, rtol=1e-4)


def test_the_divergence_of_a_mixture_and_its_slope_are_those_of_the_joint_law_on_average():
    layout = toy_layout()
    guide, prior = mixture_of(layout)
    parameters = [guide.z_evidence, guide.g_evidence, prior.rate]
    exact, _ = enumerated_kl(guide, prior, layout)
    slope = torch.cat([x.flatten() for x in torch.autograd.grad(exact, parameters)])
    torch.manual_seed(0)
    values, slopes = [], []
    for _ in range(800):
        value = sum(guide.divergence(prior(), layout.z_mask, layout.g_mask))
        values.append(value.detach())
        slopes.append(torch.cat([x.flatten() for x in torch.autograd.grad(value, parameters)]))
    for draws, expected in ((torch.stack(values)[:, None], exact[None]), (torch.stack(slopes), slope)):
        error = draws.std(0) / 800**0.5
        assert bool(((draws.mean(0) - expected).abs() <= 4 * error + 1e-5).all())
        assert error.max() < 0.03 * expected.abs().max()  # an estimate that says something


def test_the_natural_slope_of_a_mixture_is_its_gradient_over_the_fisher_matrix_on_average():
    layout = toy_layout()
    guide, prior = mixture_of(layout)
    exact, _ = enumerated_kl(guide, prior, layout)
    gradients = torch.autograd.grad(exact, [guide.z_evidence, guide.g_evidence])
    torch.manual_seed(0)
    drawn = [guide.kl_slopes(layout.z_mask, layout.g_mask) for _ in range(400)]
    masks = layout.z_mask[..., None], layout.g_mask[..., None]
    for slopes, gradient, q, mask in zip(zip(*drawn, strict=True), gradients, guide.components(), masks, strict=True):
        found = torch.stack([fisher(q.mean) @ x[..., None] for x in slopes])[..., 0]
        found = torch.where(mask, found, 0.0)
        error = found.std(0) / 400**0.5
        assert bool(((found.mean(0) - 3 * gradient).abs() <= 4 * error + 1e-4).all())
        assert error.max() < 0.05 * gradient.abs().max()  # an estimate that says something


def information(guide, prior, layout):
    """What is subtracted from the components' mean KL: one estimate of I(component; gates), nats."""
    each = zip(guide.components(), prior(), (layout.z_mask, layout.g_mask), strict=True)
    mean = sum(torch.where(mask, kl_divergence(q, p), 0.0).flatten(1).sum(-1).mean() for q, p, mask in each)
    return mean - sum(guide.divergence(prior(), layout.z_mask, layout.g_mask))


def test_a_mixture_gains_what_the_gates_tell_about_the_component_at_most_log_m():
    layout = toy_layout()
    torch.manual_seed(0)
    for scale in (0.0, 0.5, 1.5, 40.0):
        guide, prior = mixture_of(layout, scale=scale)
        with torch.no_grad():
            estimates = torch.stack([information(guide, prior, layout) for _ in range(50)])
        _, exact = enumerated_kl(guide, prior, layout)
        assert -1e-5 < exact < math.log(3) + 1e-5
        assert bool((estimates < math.log(3) + 1e-4).all())
        assert abs(estimates.mean() - exact) < 4 * estimates.std() / 50**0.5 + 1e-4
    torch.testing.assert_close(exact, torch.tensor(math.log(3)), atol=1e-3, rtol=0)  # a draw gives its component away


class Sums(GateProgram):
    """Logits that are the sums of an example's gates; what is tested needs none."""

    def logits(self, inputs, gates, theta=None):
        return (gates.z.sum() + gates.g.sum()).expand(len(inputs["x"]), 2)


def test_bops_under_a_mixture_are_those_of_every_state():
    layout = toy_layout()
    guide, prior = mixture_of(layout, scale=3.0)
    program = Sums(layout, prior, guide, None, n_train=1)
    states = every_state(layout)
    with torch.no_grad():
        q = log_prob(guide, states, layout.z_mask, layout.g_mask).exp().double()
        marginal = expected_bops(layout, *(distribution.mean for distribution in guide.posterior()))
    for ours, each, mean_field in zip(bops(program), expected_bops(layout, *states), marginal, strict=True):
        torch.testing.assert_close(ours, q @ each, rtol=1e-5, atol=0)
        assert abs(ours - mean_field) > 1e-3 * ours  # bits of an input and of its weight trade off


def test_of_two_gates_that_stand_in_for_each_other_a_mixture_deploys_one():
    layout = toy_layout(ladder=(2, 32))
    prior = build_prior("nested", layout)
    guide = build_guide("mixture", layout, prior, {"components": 3})
    program = Sums(layout, prior, guide, None, n_train=1)
    wanted = torch.full((3, *layout.z_shape), -9.0)  # log-odds: closed, but for one tensor in each component
    for component, tensor in enumerate((0, 1, 1)):
        wanted[component, 0, tensor] = 2.0 if tensor else 9.0
    with torch.no_grad():
        guide.z_evidence.copy_(wanted + prior().z.log_probs_closed - prior().z.log_probs)
        guide.g_evidence.fill_(9.0)
    z, g = deployed(program)
    assert z[0, 0].item() == 0 and z[0, 1].item() == 1 and z[layout.z_mask].sum() == 1 and bool((g == 1).all())
    wanted[1:, 0, 1] = 0.45  # now each is open with less than one half, and both closed is not the likeliest
    with torch.no_grad():
        guide.z_evidence.copy_(wanted + prior().z.log_probs_closed - prior().z.log_probs)
    marginal = guide.posterior().z.mean
    assert bool((marginal[0, :2] < 0.5).all())
    assert deployed(program).z[0, :2].flatten().tolist() == [0, 1]
    candidates = every_state(layout)
    distribution = log_prob(guide, candidates, layout.z_mask, layout.g_mask)
    chosen = log_prob(guide, type(candidates)(*(x[None] for x in deployed(program))), layout.z_mask, layout.g_mask)
    assert chosen.item() == pytest.approx(distribution.max().item(), abs=1e-5)


def test_the_components_of_a_mixture_start_apart(layout):
    guide = build_guide("mixture", layout, build_prior("nested", layout), {"components": 3, "open_logit": 1.0})
    prior = Rates(layout, 1.0)
    fresh = build_guide("mixture", layout, prior, {"components": 3})
    fresh.start(steps(layout, 0.0))
    for distributions in (guide.components(), fresh.components()):
        z = distributions.z.log_probs[:, layout.z_mask]
        assert len(z) == 3 and bool(((z[0] != z[1]) & (z[1] != z[2])).all())


def test_a_mixture_of_one_is_refused(layout):
    with pytest.raises(ValueError, match="at least 2 components, got 1: one is guide 'mean_field'"):
        build_guide("mixture", layout, build_prior("nested", layout), {"components": 1})


def test_a_family_that_changes_the_log_odds_does_so_once_in_the_elbo(layout):
    """Within one evaluation of the ELBO the evidence's own log-odds are shared, not what a family makes of them."""

    class Sharper(MeanField):
        def logits(self):
            return Gates(*(2 * x for x in super().logits()))

    guide = Sharper(layout, build_prior("nested", layout, {}), open_logit=1.5)
    alone = guide.distributions(0.5, False)
    with guide.computed_once():
        shared = guide.distributions(0.5, False)
    again = guide.distributions(0.5, False)
    for distribution, within, after in zip(alone, shared, again, strict=True):
        assert torch.equal(distribution.logits, within.logits) and torch.equal(distribution.logits, after.logits)


def test_sampling_and_kl_compute_the_log_odds_once(layout, monkeypatch):
    guide, calls = build_guide("mean_field", layout, build_prior("nested", layout, {}), {"open_logit": 1.0}), []
    inner = base.conditional_logits
    monkeypatch.setattr(base, "conditional_logits", lambda x: calls.append(x) or inner(x))
    with guide.computed_once():
        first = guide.distributions(0.5, False)
        guide.distributions(0.5, True), guide.components()
        assert len(calls) == sum(guide.free)  # once for each site that has anything free
    with torch.no_grad():
        guide.z_evidence.add_(1.0)
    assert not torch.equal(first.z.logits, guide.distributions(0.5, False).z.logits)  # nothing is kept afterwards
