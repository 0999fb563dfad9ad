"""Priors that adapt, learn or pin by a target: their distributions by hand, by simulation and by integration."""

import math

import pytest
import torch
from models import tiny_bert, toy_layout
from pyro import poutine
from scipy import integrate
from tiny import save_tiny_backbone, tiny_config
from torch.distributions import Gamma, LogNormal, kl_divergence

from pyro_blora import adapters, export, load
from pyro_blora.bops import expected_bits, expected_bops, expected_rank
from pyro_blora.build import build_program
from pyro_blora.checkpoint import load_checkpoint, save_checkpoint, trainable
from pyro_blora.gates import Gates
from pyro_blora.guides import build_guide
from pyro_blora.layout import AdapterLayout
from pyro_blora.posterior import marginals
from pyro_blora.priors import build_prior
from pyro_blora.tasks import get_task
from pyro_blora.testing import GatesAlone
from pyro_blora.training import make_optimizer

DENOMINATORS = ("adapted", "model")
# Nats a rate that two gates share: min of KL(q(rate) q(gate) q(gate) || p), by Gauss-Hermite quadrature. Log-normal and
# independent, q is no better; for the rate alone it is 0.041.
MEAN_FIELD_GAP = 0.2814

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def layout():
    return AdapterLayout.of(tiny_bert(), rank=4, scope="encoder", sequence_length=10)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


def random_means(layout, seed=0):
    """Marginals of random chains: they fall along each chain.  z (L, T, K), g (L, R - 1)"""
    generator = torch.Generator().manual_seed(seed)
    return Gates(*(torch.rand(shape, generator=generator).cumprod(-1) for shape in (layout.z_shape, layout.g_shape)))


def settled(prior, means, calls=100):
    """The prior after so many steps at the same marginals: its prices have come to rest."""
    for _ in range(calls):
        prior.adapt(means)
    return prior


def ratio(layout, denominator, gates):
    return getattr(expected_bops(layout, *gates), f"{denominator}_ratio").item()


# --- budget: prices and distribution ----------------------------------------------------------------------------------


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_prices_are_the_derivative_of_the_expected_bops(layout, denominator):
    means, step = random_means(layout), 0.01
    prior = settled(build_prior("budget", layout, {"bops": 0.4, "denominator": denominator}), means)
    for site, prices in enumerate((prior.z_price, prior.g_price)):
        assert bool((prices >= 0).all()) and prices.max() > 0
        for flat in torch.arange(prices.numel())[:: max(1, prices.numel() // 40)].tolist():
            place, ends = torch.unravel_index(torch.tensor(flat), prices.shape), []
            for sign in (1, -1):
                moved = [mean.double().clone() for mean in means]
                moved[site][place] += sign * step
                ends.append(ratio(layout, denominator, moved))
            assert prices[place].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_a_chain_has_its_gibbs_law_at_the_means_of_the_others(layout, denominator):
    """log p(depth) - log p(0) = -rate * (the ratio at that depth - the ratio at depth 0)."""
    means = random_means(layout, seed=1)
    prior = settled(build_prior("budget", layout, {"bops": 0.4, "denominator": denominator}), means)
    prior.asinh_rate.fill_(math.asinh(25.0))
    rate = prior.report()["rate"]
    for site, place in ((0, (0, 0)), (0, (0, 1)), (0, (1, 2)), (0, (2, 4)), (0, (3, 0)), (1, (0,)), (1, (2,))):
        distribution, ratios = prior()[site].depth_log_probs[place], []
        for depth in range(len(distribution)):
            at = [mean.double().clone() for mean in means]
            at[site][place] = (torch.arange(len(distribution) - 1) < depth).double()
            ratios.append(ratio(layout, denominator, at))
        expected = [-rate * (at - ratios[0]) for at in ratios]
        assert (distribution - distribution[0]).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_prior_starts_with_prices_of_the_open_model(layout):
    prior = build_prior("budget", layout, {"bops": 0.4})
    z, g = (torch.ones(shape).double().requires_grad_() for shape in (layout.z_shape, layout.g_shape))
    prices = torch.autograd.grad(expected_bops(layout, z, g).adapted_ratio, (z, g))
    for price, expected in zip((prior.z_price, prior.g_price), prices, strict=True):
        torch.testing.assert_close(price, expected.float())


# --- budget: the target -----------------------------------------------------------------------------------------------


def steered(layout, target, denominator, scale, distribution, *, calls=300, seed=0):
    """E[BOPs] / target - 1 after each call, and the prior, of a mean field that has found random evidence."""
    prior = build_prior("budget", layout, {"bops": target, "denominator": denominator})
    guide, generator = build_guide("mean_field", layout, prior), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (guide.z_evidence, guide.g_evidence):
            said = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(scale * (said.abs() if distribution == "half-normal" else torch.exp(2 * said)))
    misses = []
    for _ in range(calls):
        prior.adapt(Gates(*(distribution.mean.detach() for distribution in guide.posterior())))
        misses.append(
            ratio(layout, denominator, [distribution.mean.detach() for distribution in guide.posterior()]) / target - 1
        )
    return misses, prior


@pytest.mark.parametrize(
    ("scale", "distribution", "denominator", "targets"),
    [
        (3.0, "half-normal", "adapted", (0.5, 0.1, 0.03)),
        (30.0, "half-normal", "adapted", (0.2, 0.05)),
        (1.0, "log-normal", "adapted", (0.2, 0.05)),  # many chains of little, a few of very much
        (30.0, "log-normal", "adapted", (0.5, 0.1, 0.03)),
        (10.0, "half-normal", "model", (0.5, 0.3)),
    ],
)
def test_the_expected_bops_meet_the_target_without_swinging(layout, scale, distribution, denominator, targets):
    for target in targets:
        misses, _ = steered(layout, target, denominator, scale, distribution)
        assert abs(misses[-1]) < 0.01
        assert max(map(abs, misses[-20:])) < 0.02


@pytest.mark.parametrize("target", [0.5, 0.9])
def test_a_budget_that_the_data_leave_unused_is_met_at_a_negative_rate(layout, target):
    misses, prior = steered(layout, target, "adapted", 0.0, "half-normal")  # the data say nothing
    assert abs(misses[-1]) < 0.01 and max(map(abs, misses[-20:])) < 0.02
    assert (before := prior.report()["rate"]) < 0
    opened = Gates(*(torch.ones(shape) for shape in (layout.z_shape, layout.g_shape)))
    for _ in range(50):
        prior.adapt(opened)
    assert prior.report()["rate"] > before / 2  # the way back is short


def test_the_rate_rises_above_the_target_and_falls_below_it(layout):
    prior = build_prior("budget", layout, {"bops": 0.3})
    rates = [prior.report()["rate"]]
    for value in (1.0, 0.0):
        prior.adapt(Gates(*(torch.full(shape, value) for shape in (layout.z_shape, layout.g_shape))))
        rates.append(prior.report()["rate"])
    assert rates[1] > rates[0] and rates[1] > rates[2]


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_a_target_out_of_reach_is_refused_with_what_can_be_reached(layout, denominator):
    closed = ratio(layout, denominator, [torch.zeros(shape) for shape in (layout.z_shape, layout.g_shape)])
    opened = ratio(layout, denominator, [torch.ones(shape) for shape in (layout.z_shape, layout.g_shape)])
    reachable = rf"between {closed:.3g} \(every gate closed\) and {opened:.3g} \(open\).*'{denominator}' in scope 'enc"
    for name in ("budget", "random"):
        for target in (0.99 * closed, 1.01 * opened, -1.0):
            with pytest.raises(ValueError, match=f"prior '{name}': bops must be {reachable}"):
                build_prior(name, layout, {"bops": target, "denominator": denominator})


def test_an_unknown_denominator_is_refused(layout):
    with pytest.raises(ValueError, match="denominator must be 'adapted' or 'model', got 'encoder'"):
        build_prior("budget", layout, {"denominator": "encoder"})


def test_marginals_that_require_grad_are_taken_as_numbers(layout):
    means, priors = random_means(layout), []
    for mode, requires in ((torch.enable_grad, True), (torch.no_grad, True), (torch.no_grad, False)):
        prior = build_prior("budget", layout, {"bops": 0.2})
        with mode():
            settled(prior, Gates(*(mean.clone().requires_grad_(requires) for mean in means)), calls=3)
        assert all(not state.requires_grad for state in prior.state_dict(keep_vars=True).values())
        priors.append(prior.state_dict())
    for state in priors[1:]:
        assert all(torch.equal(state[key], priors[0][key]) for key in state)


def test_a_budget_steers_the_bops_of_a_mixture_not_those_of_its_marginals(layout):
    prior = build_prior("budget", layout, {"bops": 0.2})
    guide, generator = build_guide("mixture", layout, prior, {"components": 3}), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (guide.z_evidence, guide.g_evidence):
            parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
    for _ in range(300):
        prior.adapt(Gates(*(distribution.mean.detach() for distribution in guide.components())))
    with torch.no_grad():
        each = expected_bops(layout, *(distribution.mean for distribution in guide.components())).adapted_ratio
    marginal = ratio(layout, "adapted", [distribution.mean.detach() for distribution in guide.posterior()])
    assert each.mean().item() == pytest.approx(0.2, rel=0.01)
    assert abs(marginal / 0.2 - 1) > 0.01


def test_the_newton_step_of_a_mixture_is_that_of_its_equal_components(layout):
    prior = build_prior("budget", layout, {"bops": 0.2})
    means = [torch.rand(shape, generator=torch.Generator().manual_seed(0)).cumprod(-1)
             for shape in (layout.z_shape, layout.g_shape)]  # fmt: skip
    alone, three = (prior._variance(Gates(*x)) for x in (means, [mean.expand(3, *mean.shape) for mean in means]))
    assert three.item() == pytest.approx(alone.item(), rel=1e-6) and alone > 0


# --- budget: its state ------------------------------------------------------------------------------------------------


def adapted_program(config):
    """A program of a run whose prior has moved."""
    torch.manual_seed(config.seed)
    program = build_program(config, get_task(config.task), 64)
    for _ in range(5):
        program.prior.adapt(marginals(program))
    return program


def test_the_state_of_the_prior_travels_in_a_checkpoint(backbone, tmp_path):
    config = tiny_config(backbone, prior="budget", settle=0.0, prior_settings={"bops": 0.2})
    program = adapted_program(config)
    program.gate_guide.register_buffer("baseline", torch.tensor(3.0))  # as a guide of the user's may have
    assert {"prior.asinh_rate", "prior.z_price", "prior.g_price"} <= set(trainable(program))
    save_checkpoint(tmp_path, program, make_optimizer(program, config), 5, 8)
    torch.manual_seed(config.seed)
    fresh = build_program(config, get_task(config.task), 64)
    fresh.gate_guide.register_buffer("baseline", torch.tensor(0.0))
    assert fresh.prior.asinh_rate != program.prior.asinh_rate
    assert load_checkpoint(tmp_path, fresh, make_optimizer(fresh, config), 8).step == 5
    assert fresh.gate_guide.baseline == 3
    for site, same in zip(program.prior(), fresh.prior(), strict=True):
        assert torch.equal(site.log_probs, same.log_probs)


def test_the_state_of_the_prior_travels_with_the_exported_adapter(backbone, tmp_path):
    config = tiny_config(backbone, prior="budget", settle=0.0, prior_settings={"bops": 0.2})
    program = adapted_program(config)
    adapters.calibrate(program.net, [{"input_ids": torch.arange(20).view(2, 10)}])
    export(program, tmp_path / "adapter")
    (tmp_path / "config.json").write_text(config.to_json())
    loaded = load(tmp_path)
    assert loaded.prior.report() == program.prior.report()
    for distribution, same in zip(program.gate_guide.posterior(), loaded.gate_guide.posterior(), strict=True):
        assert torch.equal(distribution.log_probs, same.log_probs)


# --- hierarchical -----------------------------------------------------------------------------------------------------


def test_prior_draws_of_hierarchical_know_nothing_of_the_data(layout):
    prior = build_prior("hierarchical", layout, {"shape": 2.0, "rate": 1.0})
    with torch.no_grad():
        prior.loc.fill_(3.0)  # as if the data had closed everything
    torch.manual_seed(0)
    distributions = prior.sample_prior(4000)
    assert distributions.z.mean.shape == (4000, *layout.z_shape) and distributions.g.mean.shape == (
        4000,
        *layout.g_shape,
    )
    first = distributions.z.mean[:, 0, 0, 0]  # E exp(-rate) = (1 + 1 / rate of the Gamma) ** -shape
    assert first.mean().item() == pytest.approx(0.25, abs=5 * first.std().item() / 4000**0.5)
    assert torch.equal(distributions.z.mean[:, 0, 0], distributions.z.mean[:, 1, 0])  # one rate for a role
    assert not torch.equal(distributions.z.mean[:, 0, 0], distributions.z.mean[:, 0, 1])


def at_a_draw(prior):
    """The distributions of the gates at rates drawn from their guide."""
    return poutine.condition(prior.pyro_model, data=prior.pyro_guide())()


def divergence(prior):
    """KL of the rates' guide from their prior, nats."""
    return kl_divergence(prior.distribution_in_use("posterior"), prior.distribution_in_use("prior")).sum()


@pytest.mark.parametrize(("shape", "rate", "log_sd"), [(1.0, 1.0, -1.0), (2.5, 0.4, 0.3), (0.3, 5.0, -2.0)])
def test_the_divergence_is_that_of_a_log_normal_from_a_gamma(layout, shape, rate, log_sd):
    prior = build_prior("hierarchical", layout, {"shape": shape, "rate": rate})
    torch.manual_seed(0)
    with torch.no_grad():
        prior.loc.add_(torch.randn_like(prior.loc))
        prior.log_sd.fill_(log_sd)
    q, p = LogNormal(prior.loc.double(), prior.log_sd.double().exp()), Gamma(shape, rate)
    draws = q.sample((40000,))
    sampled = (q.log_prob(draws) - p.log_prob(draws))[:, prior.used].sum(-1)
    error = sampled.std().item() / math.sqrt(len(sampled))
    assert divergence(prior).item() == pytest.approx(sampled.mean().item(), abs=4 * error)


def test_a_draw_has_one_rate_for_each_role_and_is_reparametrised(layout):
    prior = build_prior("hierarchical", layout)
    one, other = at_a_draw(prior), at_a_draw(prior)
    for distribution, again, shape in zip(one, other, (layout.z_shape, layout.g_shape), strict=True):
        assert distribution.log_probs.shape == shape and not torch.equal(distribution.log_probs, again.log_probs)
    assert bool((one.z.log_probs == one.z.log_probs[:1, :, :1]).all())
    assert len(one.z.log_probs.unique()) == len(layout.tensors)
    types = [p.type for p in layout.projections]
    for i, kind in enumerate(types):
        assert bool((one.g.log_probs[i] == one.g.log_probs[types.index(kind), 0]).all())
    adapted = [p.adapted for p in layout.projections]
    assert len(one.g.log_probs[adapted].unique()) == len({p.type for p in layout.adapted})
    slopes = torch.autograd.grad(one.z.log_probs.sum() + one.g.log_probs[adapted].sum(), (prior.loc, prior.log_sd))
    assert all(bool((slope[prior.used] != 0).all()) for slope in slopes)


def test_intervals_of_the_rates_are_ordered_and_hold_their_share(layout):
    prior = build_prior("hierarchical", layout, {"shape": 3.0})
    report, draws = prior.report(), LogNormal(prior.loc, prior.log_sd.exp()).sample((20000,))
    assert len(report) == 3 * len(prior.rate_names)
    for i, name in zip(prior.used.tolist(), prior.rate_names, strict=True):
        low, mean, high = (report[f"rate_{name}{end}"] for end in ("_low", "", "_high"))
        assert 0 < low < mean < high
        assert ((draws[:, i] > low) & (draws[:, i] < high)).float().mean().item() == pytest.approx(0.94, abs=0.01)


def shared_rates():
    """Six rates of a Gamma distribution, each shared by two ladders of one gate: five roles of two maps, and ranks.

    p(two gates open) = E[exp(-2 rate)], one integral over the rate.
    """
    layout = toy_layout(adapted=(True, True), ladder=(2, 32), rank=2)
    prior, gamma = build_prior("hierarchical", layout, {"shape": 2.0, "rate": 1.5}), Gamma(2.0, 1.5)
    evidence, _ = integrate.quad(lambda r: math.exp(-2 * r + gamma.log_prob(torch.tensor(r)).item()), 1e-9, 40)
    assert len(prior.names) == 6 and evidence == pytest.approx((1.5 / 3.5) ** 2, rel=1e-4)
    return layout, prior, math.log(evidence)


def maximised(elbo, parameters, steps=400):
    """Mean of 2000 estimates of the ELBO after so many steps of Adam, and the standard error."""
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    torch.manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        (-elbo()).backward()
        optimizer.step()
    with torch.no_grad():
        estimates = torch.stack([elbo() for _ in range(2000)])
    return estimates.mean().item(), estimates.std().item() / math.sqrt(len(estimates))


def test_the_elbo_of_gates_that_are_seen_is_just_below_their_evidence():
    _, prior, log_evidence = shared_rates()

    def elbo():
        opened = (
            distribution.log_prob(torch.ones(distribution.log_probs.shape)).sum() for distribution in at_a_draw(prior)
        )
        return sum(opened) - divergence(prior)

    bound, error = maximised(elbo, prior.parameters())
    assert 6 * (log_evidence - 0.1) < bound < 6 * log_evidence + 4 * error


def test_the_elbo_without_data_is_just_below_zero():
    layout, prior, _ = shared_rates()
    guide = build_guide("mean_field", layout, prior, {"open_logit": 0.0})

    def elbo():
        divergences = map(kl_divergence, guide.distributions(0.5, True), at_a_draw(prior))
        return -sum(kl.sum() for kl in divergences) - divergence(prior)

    bound, error = maximised(elbo, guide.parameters())  # the prior's own are among them
    assert -6 * MEAN_FIELD_GAP - 0.15 < bound < -6 * MEAN_FIELD_GAP + 4 * error < 0


# --- fixed and random -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 8), (8, 4), (2, 32), (32, 2)])
def test_weights_and_activations_get_their_widths_by_role(layout, bits, activation_bits):
    prior = build_prior("fixed", layout, {"bits": bits, "activation_bits": activation_bits})()
    widths = expected_bits(layout, prior.z.mean)
    for t, tensor in enumerate(layout.tensors):
        expected = activation_bits if tensor in ("input", "hidden") else bits
        assert bool((widths[:, t] == expected).all()), tensor
    assert bool((expected_rank(prior.g.mean) == layout.rank).all())


def test_activations_have_the_width_of_the_weights_unless_said_otherwise(layout):
    alone, both = (build_prior("fixed", layout, s)() for s in ({"bits": 8}, {"bits": 8, "activation_bits": 8}))
    assert torch.equal(alone.z.log_probs, both.z.log_probs)
    with pytest.raises(ValueError, match="activation_bits must be one of 2, 4, 8, 16, 32, got 6"):
        build_prior("fixed", layout, {"bits": 8, "activation_bits": 6})


@pytest.mark.parametrize("target", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_a_random_allocation_meets_the_target_by_less_than_a_rung(layout, denominator, target):
    target = target if denominator == "adapted" else 0.5 + target / 2  # attention and head stay at 32 bit
    means = Gates(
        *(
            distribution.mean
            for distribution in build_prior("random", layout, {"bops": target, "denominator": denominator})()
        )
    )
    assert bool(((means.z == 0) | (means.z == 1)).all()) and bool((means.g == 1).all())
    reached, rungs = ratio(layout, denominator, means), []
    for place in (means.z.diff(dim=-1, prepend=torch.ones(*layout.z_shape[:2], 1)) < 0).nonzero().tolist():
        if layout.z_mask[place[0], place[1]]:  # the next rung of this tensor, opened again
            opened = means.z.clone()
            opened[tuple(place)] = 1.0
            rungs.append(ratio(layout, denominator, (opened, means.g)))
    assert reached <= target <= max(rungs)


def test_the_seed_of_an_allocation_is_the_allocation(layout):
    distributions = [build_prior("random", layout, {"bops": 0.1, "seed": seed})().z.log_probs for seed in (0, 0, 1)]
    assert torch.equal(distributions[0], distributions[1]) and not torch.equal(distributions[0], distributions[2])
    torch.manual_seed(3)
    build_prior("random", layout, {"bops": 0.1})
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.rand(1) == drawn  # of a generator of its own


def test_a_random_allocation_that_would_have_to_close_ranks_is_refused(layout):
    closed = Gates(torch.zeros(layout.z_shape), torch.zeros(layout.g_shape))
    least = ratio(layout, "adapted", (closed.z, torch.ones(layout.g_shape)))
    between = (ratio(layout, "adapted", closed) + least) / 2
    with pytest.raises(ValueError, match=f"prior 'random': bops must be at least {least:.3g} .2 bit, every rank open"):
        build_prior("random", layout, {"bops": between})


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
def test_random_rates_pay_their_own_divergence(layout, guide):
    prior = build_prior("hierarchical", layout)
    distribution = build_guide(guide, layout, prior, {"open_logit": 1.0})
    program = GatesAlone(layout, prior, distribution, n_train=1)
    torch.manual_seed(0)
    paid = program.kl()
    torch.manual_seed(0)
    there, masks = at_a_draw(prior), (layout.z_mask, layout.g_mask)
    if guide == "mixture":
        expected = distribution.divergence(there, *masks)
    else:
        sites = zip(distribution.distributions(0.5, True), there, masks, strict=True)
        expected = Gates(*(torch.where(mask, kl_divergence(q, p), 0.0).sum() for q, p, mask in sites))
    torch.testing.assert_close(paid.g, expected.g)
    torch.testing.assert_close(paid.z, expected.z + divergence(prior))


@pytest.mark.parametrize("site", ["both", "z", "g"])
def test_rates_are_drawn_from_either_law_and_set_the_gates(layout, site):
    settings = {"shape": 2.0, "rate": 4.0} if site == "both" else {site: "hierarchical", f"{site}.shape": 2.0,
                                                                   f"{site}.rate": 4.0}  # fmt: skip
    prior = build_prior("hierarchical" if site == "both" else "depth", layout, settings)
    part = prior if site == "both" else getattr(prior, site)
    kinds = [f"rank_{kind}" for kind in dict.fromkeys(p.type for p in layout.adapted)]
    names = {"both": [*layout.tensors, *kinds], "z": [*layout.tensors], "g": kinds}[site]
    assert part.rate_names == names
    torch.manual_seed(0)
    with torch.no_grad():
        part.loc.fill_(1.0), part.log_sd.fill_(-1.0)
    draws = {distribution: part.draw_rates(20_000, distribution) for distribution in ("prior", "posterior")}
    sd = math.exp(-1.0)
    moments = {"prior": (0.5, math.sqrt(2) / 4), "posterior": (math.exp(1 + sd**2 / 2), None)}
    for distribution, (mean, spread) in moments.items():
        assert draws[distribution].shape == (20_000, len(names)) and bool((draws[distribution] > 0).all())
        error = draws[distribution].std(0) / 20_000**0.5
        assert bool(((draws[distribution].mean(0) - mean).abs() < 5 * error).all())
        assert spread is None or bool(((draws[distribution].std(0) - spread).abs() < 0.02).all())
    rates = draws["posterior"][:3]
    distributions, column = part.gates_at(rates), dict(zip(names, rates.unbind(-1), strict=True))
    for i, projection in enumerate(layout.projections):
        for t, tensor in enumerate(layout.tensors):
            if site != "g":
                assert torch.equal(distributions.z.log_probs[:, i, t], -column[tensor][:, None].expand(3, 4))
        if site != "z" and projection.adapted:
            assert torch.equal(
                distributions.g.log_probs[:, i], -column[f"rank_{projection.type}"][:, None].expand(3, 3)
            )
    expected = Gamma(2.0, 4.0).log_prob(rates) - LogNormal(1.0, sd).log_prob(rates)
    torch.testing.assert_close(part.log_ratio(rates).detach(), expected.sum(-1))


@pytest.mark.parametrize(("size", "site"), [(4, "both"), (1, "both"), (1, "z"), (1, "g")])
def test_what_has_no_ladder_has_no_rate(size, site):
    of = AdapterLayout.of(tiny_bert(), rank=size, scope="encoder", sequence_length=10, target_modules=["query"])
    settings = {} if site == "both" else {site: "hierarchical"}
    prior = build_prior("hierarchical" if site == "both" else "fixed", of, settings)
    part = prior if site == "both" else getattr(prior, site)
    ranks = ["rank_query"] if size > 1 else []
    assert part.rate_names == {"both": [*of.tensors, *ranks], "z": [*of.tensors], "g": ranks}[site]
    assert len(part.loc) == len(part.names) > len(part.rate_names)  # as in older checkpoints
    program = GatesAlone(of, prior, build_guide("mean_field", of, prior, {"open_logit": 1.0}), n_train=1)
    assert all(bool(x.isfinite()) for x in program.kl()) and prior.report().keys() == {
        f"{'' if site == 'both' else site + '_'}rate_{name}{end}"
        for name in part.rate_names for end in ("", "_low", "_high")
    }  # fmt: skip
    drawn = prior.pyro_guide()
    assert sum(x.numel() for x in drawn.values()) == len(part.rate_names)
    assert bool(prior.rate_parts()) == bool(part.rate_names) == bool(drawn)
