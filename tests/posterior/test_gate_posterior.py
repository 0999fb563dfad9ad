"""What is read off a posterior.nc is what enumeration, draws and the program itself say."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray
from models import every_state, tiny_bert, toy_layout

from pyro_blora.adapters import attach
from pyro_blora.bops import at_full_width, expected_bits, expected_bops, expected_rank, savings
from pyro_blora.gates import Gates, NestedBernoulli
from pyro_blora.guides import build_guide, components
from pyro_blora.posterior import (
    Posterior,
    arviz_compat,
    bops,
    deployed,
    divergences,
    draw,
    forcing,
    marginals,
    rates,
    to_arviz,
)
from pyro_blora.posterior.arviz import coordinates
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.report.sections.bit_operations import _shown, spent_of
from pyro_blora.report.sections.restarts import restarts
from pyro_blora.tasks import get_task

pytestmark = pytest.mark.usefixtures("eager")


def made(guide="mean_field", prior="nested", scope="adapted", seed=0, size=4, **settings):
    """A program of `size` ranks whose gates are neither sure nor even, untrained."""
    torch.manual_seed(seed)
    net = attach(tiny_bert(), rank=size, scope=scope, sequence_length=10)
    distribution = build_prior(prior, net.layout, settings)
    family = build_guide(guide, net.layout, distribution, {"components": 3} if guide == "mixture" else {})
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return BayesianLoRA(net, distribution, family, get_task("acceptability").likelihood, n_train=100)


def opened(program, draws=20):
    return Posterior(to_arviz(program, draw(program, draws)))


# --- against enumeration of every state of a toy, from a file that is written by hand --------------------------------


def written(log_q, log_prior, draws=None):
    """Laws of `toy_layout()`, z (C, M, L, T, K + 1), g (C, M, L, R), as a Posterior; draws of every state."""
    layout, names, sites = toy_layout(), ("width", "rank"), zip(log_q, log_prior, strict=True)
    coords = coordinates(layout)
    dims = {"width": ("projection", "tensor", "width"), "rank": ("projection", "open_rank")}
    found = {}
    for name, (q, p), mask in zip(names, sites, (layout.z_mask, layout.g_mask), strict=True):
        q, p = (torch.where(mask[..., None], x, torch.nan).numpy() for x in (q, p))
        found[f"log_q_{name}"] = (("chain", "component", *dims[name]), q)
        found[f"log_prior_{name}"] = (("chain", *dims[name]), p)
    constant = xarray.Dataset(found, {key: coords[key] for key in (*dims["width"], "open_rank")})
    constant.attrs["layout"] = json.dumps(layout.to_dict())
    groups = {"constant_data": constant}
    if draws is not None:
        ratios = expected_bops(layout, *draws).adapted_ratio
        dims = {"z": ("projection", "tensor", "rung"), "g": ("projection", "rank"), "bops_adapted": ()}
        arrays = {"z": draws.z, "g": draws.g, "bops_adapted": ratios}
        groups["posterior"] = xarray.Dataset(
            {name: (("chain", "draw", *dims[name]), array.numpy()[None]) for name, array in arrays.items()}
        )
    return Posterior(arviz_compat.container(groups))


def toy_laws(M, pinned=False, seed=0):
    """Random distributions of one chain: guide and prior, the prior of z never at 32 bit, never closed if pinned."""
    layout, generator = toy_layout(), torch.Generator().manual_seed(seed)
    shapes = [(*s[:-1], s[-1] + 1) for s in (layout.z_shape, layout.g_shape)]
    prior = [torch.randn(1, *s, generator=generator, dtype=torch.float64) for s in shapes]
    if pinned:
        prior[0][:, 0, 1, 2] = prior[0][:, 1, 0, 0] = -torch.inf
    prior = [x.log_softmax(-1) for x in prior]
    guide = [
        (x[:, None] + torch.randn(1, M, *s, generator=generator, dtype=torch.float64)).log_softmax(-1)
        for x, s in zip(prior, shapes, strict=True)
    ]
    return Gates(*guide), Gates(*prior)


def of_states(states, distributions):
    """log probabilities (S, ...) of every state: distributions with z (..., L, T, K + 1) and g (..., L, R), one ladder
    each, which are summed over the ones that exist."""
    layout, total = toy_layout(), 0.0
    for chains, distribution, mask in zip(states, distributions, (layout.z_mask, layout.g_mask), strict=True):
        one_hot = torch.nn.functional.one_hot(chains.sum(-1).long(), distribution.shape[-1]).bool()
        one_hot = one_hot.view(len(chains), *[1] * (distribution.dim() - one_hot.dim() + 1), *one_hot.shape[1:])
        picked = torch.where(one_hot, distribution, 0.0).sum(-1)
        total = total + torch.where(mask, picked, 0.0).flatten(-mask.dim()).sum(-1)
    return total


def expectation(change, values):
    """The sum of a change of probabilities (S,) times values, 0 where neither distribution is ever there."""
    return float(torch.where(change != 0, change * values, 0.0).sum())


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("M", [1, 3])
def test_a_forced_gate_is_the_law_of_every_state_in_which_it_is_so(M, pinned):
    log_q, log_prior = toy_laws(M, pinned)
    posterior, states = written(log_q, log_prior), every_state(toy_layout())
    q = of_states(states, Gates(*(x[0] for x in log_q))).exp().mean(1)  # (S,)
    log_factors = q.log() - of_states(states, Gates(*(x[0] for x in log_prior)))  # at the guide's optimum: -NLL
    assert float(q.sum()) == pytest.approx(1)
    spent = expected_bops(toy_layout(), *states)
    assert float(posterior.expected_bops().model_ratio) == pytest.approx(float(q @ spent.model_ratio))
    told = 0
    for name, site, index, depth in posterior._every_gate():
        depths = getattr(states, site)[(slice(None), *index)].sum(-1)
        for opens in (True, False):
            chosen = (depths >= depth) == opens
            if not float(q[chosen].sum()):
                with pytest.raises(ValueError, match=f"{name} cannot be .* pinned by its prior"):
                    posterior.what_if(name, opens)
                told += 1
                continue
            found, then = posterior.what_if(name, opens), torch.where(chosen, q, 0.0) / q[chosen].sum()
            assert found.probability == pytest.approx(float(q[chosen].sum()))
            assert found.elbo_loss == pytest.approx(-math.log(float(q[chosen].sum())), abs=1e-12)
            assert found.bops_adapted == pytest.approx(float(then @ spent.adapted_ratio))
            assert found.bops_model == pytest.approx(float(then @ spent.model_ratio))
            assert found.before_adapted == pytest.approx(float(q @ spent.adapted_ratio))
            assert found.nll_rise == pytest.approx(expectation(q - then, log_factors), abs=1e-9 if M == 1 else 0.03)
    assert told == 2 * pinned  # 32 bit cannot be open, and what is never at 2 bit cannot be closed


def test_what_moves_every_ladder_at_once_is_exact():
    """Two components that are single allocations: a gate of one ladder is a statement about all of them."""
    log_q, log_prior = toy_laws(2)
    ends = [torch.full_like(x, -torch.inf) for x in log_q]
    for m in range(2):
        for x in ends:
            x[:, m, ..., m] = 0.0
    posterior, states = written(Gates(*ends), log_prior), every_state(toy_layout())
    q = of_states(states, Gates(*(x[0] for x in ends))).exp().mean(1)
    log_factors = q.log() - of_states(states, Gates(*(x[0] for x in log_prior)))
    rises = []
    for name, site, index, depth in posterior._every_gate():
        chosen = getattr(states, site)[(slice(None), *index)].sum(-1) >= depth
        if depth == 1:
            then = torch.where(chosen, q, 0.0) / q[chosen].sum()
            rises.append(posterior.what_if(name, True).nll_rise)
            assert rises[-1] == pytest.approx(expectation(q - then, log_factors), abs=1e-9)
    assert len(rises) > 2 and rises == pytest.approx(rises[:1] * len(rises)) and rises[0] != 0


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("M", [1, 3])
def test_rates_times_a_factor_are_prior_over_prior_in_every_state(M, factor):
    log_q, log_prior = toy_laws(M)
    states = every_state(toy_layout())
    posterior = written(log_q, log_prior, states)
    other = []
    for distribution in log_prior:
        at_least = distribution.exp().flip(-1).cumsum(-1).flip(-1)
        opening = (at_least[..., 1:] / at_least[..., :-1]) ** factor  # exp(-factor * rate)
        reached = torch.cat([torch.ones_like(opening[..., :1]), opening.cumprod(-1)], -1)
        other.append((reached * torch.cat([1 - opening, torch.ones_like(opening[..., :1])], -1)).log())
    ratio = of_states(states, [x[0] for x in other]) - of_states(states, [x[0] for x in log_prior])
    q = of_states(states, Gates(*(x[0] for x in log_q))).exp().mean(1) * ratio.exp()
    found = posterior.reweighted(factor)
    exact = (q / q.sum()) @ expected_bops(toy_layout(), *states).adapted_ratio
    assert found.bops_exact == pytest.approx(float(exact))
    assert found.pareto_k < 0.7 and np.argmax(found.weights) in np.flatnonzero(ratio > ratio.max() - 0.3)
    body = ratio < ratio.median()  # the largest ones are smoothed
    raw = ratio[body].exp() / ratio[body].exp().sum()
    assert np.allclose(found.weights[body] / found.weights[body].sum(), raw)


def test_moments_divergences_and_choices_are_those_of_the_laws():
    log_q, log_prior = toy_laws(3, pinned=True)
    posterior, layout = written(log_q, log_prior), toy_layout()
    distribution, values = log_q.z[0].exp().mean(0), torch.tensor(layout.ladder, dtype=torch.float64)
    mean, variance = posterior.moments().z[:, 0]
    exists = layout.z_mask
    assert torch.allclose(mean[exists], (distribution @ values)[exists])
    assert torch.allclose(
        variance[exists], (distribution * (values - (distribution @ values)[..., None]) ** 2).sum(-1)[exists]
    )
    kl = torch.where(distribution > 0, distribution * (distribution.log() - log_prior.z[0]), 0.0).sum(-1)
    assert torch.allclose(posterior.kl().z[exists], kl[exists]) and not posterior.kl().z[~exists].any()
    assert torch.equal(posterior.free().z, exists) and torch.equal(posterior.free().g, layout.g_mask)


def test_a_median_of_infinite_rhats_is_infinite():
    free, rhat = Gates(torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)), torch.full((4,), math.inf)
    posterior = SimpleNamespace(rhat=lambda: Gates(rhat, rhat), free=lambda: free, chains=2)
    fit = {"seed": 0, "metric": {"value": 0.5}, "nll": 0.7, "elbo_per_example": -1.0, "bops": {"adapted_ratio": 0.5}}
    run = SimpleNamespace(summary={**fit, "restarts": [fit]}, metric="accuracy", posterior=posterior)
    (text,) = restarts(run, "").paragraphs
    assert "bits: median inf, worst inf" in text


def test_restarts_that_are_sure_of_something_else_never_agree():
    sure = [torch.full((2, 1, *s), -torch.inf, dtype=torch.float64) for s in ((2, 5, 3), (2, 2))]
    sure[0][..., 1] = sure[1][..., 0] = 0.0
    sure[0][1, 0, 0, 1] = torch.tensor([-torch.inf, -torch.inf, 0.0])  # the second chain has 32 bit in one tensor
    posterior = written(Gates(*sure), Gates(*(torch.zeros(2, *s).log_softmax(-1) for s in ((2, 5, 3), (2, 2)))))
    rhat, expected = posterior.rhat(), torch.ones(2, 5, dtype=torch.float64)
    expected[0, 1] = torch.inf
    assert torch.equal(rhat.z, expected) and bool((rhat.g == 1).all())


# --- against the program ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["adapted", "encoder"])
@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
def test_the_file_says_what_the_program_says(guide, scope):
    program = made(guide, scope=scope)
    posterior = opened(program)
    for mine, theirs in zip(posterior.expected_bops(), bops(program), strict=True):
        assert float(mine) == pytest.approx(float(theirs), rel=1e-5)
    z, g = marginals(program)
    distribution = posterior.depth_probs()
    for probs, marginal, mask in zip(distribution, (z, g), posterior.masks, strict=True):
        at_least = probs.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        assert torch.allclose(at_least[mask].float(), marginal[mask], atol=1e-6)
    for mine, theirs, mask in zip(posterior.kl(), divergences(program), posterior.masks, strict=True):
        assert torch.allclose(mine[mask].float(), theirs[mask], atol=1e-5)
    table, mode = posterior.gates(), deployed(program)
    expected = int(posterior.masks.z.sum()) * 4 + int(posterior.masks.g.sum()) * 3
    assert len(table) == expected and table["gate"].is_unique
    assert table["deployed"].sum() == int(mode.z[posterior.masks.z].sum() + mode.g[posterior.masks.g].sum())


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
def test_the_table_names_every_gate_and_says_what_is_deployed(guide):
    program = made(guide, scope="encoder")
    table, mode = opened(program).gates().set_index("gate"), deployed(program)
    names = coordinates(program.layout)["projection"]
    for i, projection in enumerate(program.layout.projections):
        for t, tensor in enumerate(program.layout.tensors):
            for k, width in enumerate(program.layout.ladder[1:]):
                name = f"{names[i]}.{tensor}.{width}"
                assert (name in table.index) == bool(program.z_mask[i, t])
                if name in table.index:
                    line = table.loc[name]
                    assert line["deployed"] == bool(mode.z[i, t, k])
                    assert line["forced"] == ("closed" if mode.z[i, t, k] else "open")
                    found = (line["layer"], line["type"], line["tensor"], line["rung"])
                    assert found == (projection.layer, projection.type, tensor, width)
        for rank in range(2, program.layout.rank + 1):
            name = f"{names[i]}.rank.{rank}"
            assert (name in table.index) == projection.adapted
            assert not projection.adapted or table.loc[name, "deployed"] == bool(mode.g[i, rank - 2])


def test_gates_that_cannot_be_forced_are_lines_without_a_forecast():
    table = opened(made(prior="fixed", bits=8)).gates()
    assert set(table["forced"]) == {"never"} and table[["elbo_loss", "nll_rise", "bops_change"]].isna().all(axis=None)
    assert list(table[table["deployed"]]["rung"].unique()) == [4, 8, 2, 3]  # bits to 8, then ranks to 4


@pytest.mark.parametrize("scope", ["adapted", "encoder"])
def test_adapters_of_one_rank_have_bit_gates_only(scope):
    program = made("mixture", scope=scope, size=1)
    posterior = opened(program, draws=100)
    table = posterior.gates()
    assert set(table["site"]) == {"z"} and not posterior.free().g.any()
    assert table["saving_model"].sum() == pytest.approx(1 - float(bops(program).model_ratio), rel=1e-5)
    assert posterior.reweighted(1.0).bops_adapted == pytest.approx(
        float(posterior.data["posterior"]["bops_adapted"].mean()), rel=1e-6
    )


def test_savings_of_any_law_add_up_in_any_layout(layout):
    torch.manual_seed(0)
    distributions = [NestedBernoulli.from_rate(2 * torch.rand(shape)) for shape in (layout.z_shape, layout.g_shape)]
    z, g = (distribution.mean for distribution in distributions)
    saved, expected, full = savings(layout, z, g), expected_bops(layout, z, g), at_full_width(layout)
    each = saved.z.sum((-1, -2)) + saved.g.sum(-1)  # (L,)
    assert float(each.sum()) == pytest.approx(float(full.model - expected.model), rel=1e-9)
    assert float(each[layout.g_mask].sum()) == pytest.approx(float(full.adapted - expected.adapted), rel=1e-9)
    assert not saved.z[~layout.z_mask].any() and not saved.g[~layout.g_mask].any()
    assert bool((saved.z >= 0).all()) and bool((saved.g >= 0).all())


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
def test_savings_add_up_to_full_minus_expected(guide):
    program = made(guide, scope="encoder")
    posterior = opened(program)
    table = posterior.gates()
    adapted = [name for name, p in zip(posterior.projections, program.layout.projections, strict=True) if p.adapted]
    assert table["saving_model"].sum() == pytest.approx(1 - float(posterior.expected_bops().model_ratio), rel=1e-6)
    mine = table[table["projection"].isin(adapted)]["saving_adapted"].sum()
    assert mine == pytest.approx(1 - float(posterior.expected_bops().adapted_ratio), rel=1e-6)


@pytest.mark.parametrize("target", ["query", "value"])
def test_a_shared_input_saves_what_its_adapted_readers_do(target):
    torch.manual_seed(0)
    net = attach(tiny_bert(), rank=4, scope="encoder", sequence_length=10, share_inputs=True, target_modules=[target])
    prior = build_prior("nested", net.layout, {})
    guide = build_guide("mean_field", net.layout, prior, {"open_logit": -1.0})
    posterior = opened(BayesianLoRA(net, prior, guide, get_task("acceptability").likelihood, n_train=100))
    table = posterior.gates()
    for column, now in zip(("adapted", "model"), posterior.expected_bops()[2:], strict=True):
        assert table[f"saving_{column}"].sum() == pytest.approx(1 - float(now), rel=1e-6)
    spent = spent_of(posterior)
    assert set(spent[spent["share"] > 0]["part"]) == {target}
    assert spent["share"].sum() == pytest.approx(float(posterior.expected_bops().adapted_ratio), rel=1e-6)


def test_savings_are_shapley_values():
    """Of one projection's six factors, by going through all 720 orders with `expected_bops` itself."""
    program = made()
    layout, (z, g) = program.layout, marginals(program)
    saved = savings(layout, z, g)
    factors, mine = [*range(len(layout.tensors)), "rank"], dict.fromkeys([*range(len(layout.tensors)), "rank"], 0.0)

    def spent(closed):
        now_z, now_g = z.double().clone(), g.double().clone()
        for factor in factors:
            if factor not in closed:
                if factor == "rank":
                    now_g[0] = 1.0
                else:
                    now_z[0, factor] = 1.0
        return float(expected_bops(layout, now_z, now_g).model)

    cost = {subset: spent(subset) for n in range(7) for subset in map(frozenset, itertools.combinations(factors, n))}
    for order in itertools.permutations(factors):
        for place, factor in enumerate(order):
            before = frozenset(order[:place])
            mine[factor] += (cost[before] - cost[before | {factor}]) / math.factorial(6)
    for t in range(len(layout.tensors)):
        assert float(saved.z[0, t].sum()) == pytest.approx(mine[t], rel=1e-9)
    assert float(saved.g[0].sum()) == pytest.approx(mine["rank"], rel=1e-9)
    assert torch.allclose(saved.z[0, 0] / saved.z[0, 0].sum(), share(layout, z[0, 0]))


def share(layout, probs):
    """Of the bits that a tensor saves, what each of its gates closes."""
    steps = torch.tensor(layout.ladder, dtype=torch.float64).diff()
    return (1 - probs.double()) * steps / ((1 - probs.double()) * steps).sum()


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("gate", ["1.value.base.8", "0.query.rank.3"])
def test_a_forced_gate_is_a_conditioned_law(guide, opens, gate):
    """Against draws of the guide in which the gate happens to be in that state."""
    program = made(guide)
    posterior = opened(program)
    found = posterior.what_if(gate, opens)
    z, g = draw(program, 40_000, seed=1)
    i = posterior.projections.index(gate[: gate.index(".", 2)])
    state = z[:, i, 1, 1] if "base" in gate else g[:, i, 1]
    chosen = state == float(opens)
    ratio = expected_bops(program.layout, z[chosen], g[chosen]).adapted_ratio
    error = float(ratio.std() / chosen.sum().sqrt())
    assert found.bops_adapted == pytest.approx(float(ratio.mean()), abs=4 * error)
    share = float(chosen.double().mean())
    assert found.probability == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(z)) + 1e-9)
    assert found.elbo_loss == pytest.approx(-math.log(found.probability), rel=1e-9)
    assert found.probability + posterior.what_if(gate, not opens).probability == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kl_weight", [1.0, 0.1])
def test_the_loss_of_a_forced_gate_is_that_of_the_elbo(kl_weight):
    """With evidence e the chain's part of the ELBO is E_q[e] - KL(q || p), q the best for a KL of that weight."""
    program = made(prior="depth")
    program.kl_weight = kl_weight
    posterior = opened(program)
    q, p = posterior.log_q.z[0, 0, 2, 1], posterior.log_prior.z[0, 2, 1]
    evidence = kl_weight * (q - p)

    def elbo(distribution):
        alive = distribution > 0
        return float(
            (distribution * evidence).sum() - (distribution[alive] * (distribution[alive].log() - p[alive])).sum()
        )

    closed = torch.cat([q[:2].softmax(0), torch.zeros(3)]).double()
    found = posterior.what_if(f"{posterior.projections[2]}.base.8", False)
    assert found.elbo_loss == pytest.approx(elbo(q.exp()) - elbo(closed), rel=1e-5)
    assert found.nll_rise == pytest.approx(float(((q.exp() - closed) * evidence).sum()), rel=1e-5)


def test_gates_of_the_prior_group_are_drawn_at_the_rates_beside_them():
    data = to_arviz(program := made(prior="hierarchical"), draw(program, 2000))
    before = arviz_compat.group(data, "prior")
    for tensor in ("input", "base"):
        rate = before["rate"].sel(law=tensor).values[0]
        share = before["z"].sel(tensor=tensor).isel(rung=0).values[0].mean(-1)
        assert np.corrcoef(np.log(rate), share)[0, 1] < -0.7
    rate = before["rate"].sel(law="rank_query").values[0]
    of_type = [name for name in before["projection"].values if str(name).endswith("query")]
    share = before["g"].sel(projection=of_type).isel(rank=0).values[0].mean(-1)
    assert np.corrcoef(np.log(rate), share)[0, 1] < -0.6


def test_what_cannot_be_forced_is_told():
    posterior = opened(made(prior="fixed", bits=8))
    with pytest.raises(ValueError, match=r"0\.query\.base\.16 cannot be open: it is pinned by its prior"):
        posterior.what_if("0.query.base.16", True)
    with pytest.raises(ValueError, match=r"no gate '0\.query\.base\.7'.*0\.query\.base\.8"):
        posterior.what_if("0.query.base.7", True)
    assert not any(bool(x.any()) for x in posterior.free())


def test_rhat_is_that_of_endless_draws():
    programs = [made(seed=seed) for seed in (0, 1, 2)]
    joined = Posterior(arviz_compat.concatenate([to_arviz(p, draw(p, 5)) for p in programs], [0, 1, 2]))
    drawn = torch.stack([expected_bits(p.layout, draw(p, 40_000, seed=7).z) for p in programs])  # (C, S, L, T)
    within, between = drawn.var(1).mean(0), drawn.mean(1).var(0)
    assert torch.allclose(joined.rhat().z.float(), (1 + between / within).sqrt(), rtol=0.02)
    same = Posterior(arviz_compat.concatenate([to_arviz(programs[0], draw(programs[0], 5))] * 2, [0, 1]))
    assert bool((same.rhat().z == 1).all())
    assert bool(opened(programs[0]).rhat().z.isnan().all())


def test_another_rate_is_the_nested_prior_at_that_rate():
    program = made(rate=0.4, rank_rate=0.4)
    posterior = opened(program, draws=4000)
    found = posterior.reweighted(1.3)
    distributions = []
    for log_q, log_p in zip(posterior.log_q, posterior.log_prior, strict=True):
        rates = torch.full((*log_q.shape[2:-1], log_q.shape[-1] - 1), 1.3 * 0.4, dtype=torch.float64)
        distributions.append((log_q[0, 0] - log_p[0] + NestedBernoulli.from_rate(rates).depth_log_probs).softmax(-1))
    z, g = (distribution.flip(-1).cumsum(-1).flip(-1)[..., 1:] for distribution in distributions)
    assert found.bops_exact == pytest.approx(float(expected_bops(program.layout, z, g).adapted_ratio), rel=1e-6)
    drawn = posterior.data["posterior"]["bops_adapted"].values[0]
    error = math.sqrt(found.weights**2 @ (drawn - found.bops_adapted) ** 2)
    assert found.bops_adapted == pytest.approx(found.bops_exact, abs=4 * error)
    same = posterior.reweighted(1.0)
    assert np.allclose(same.weights, 1 / 4000) and same.bops_exact == pytest.approx(
        float(posterior.expected_bops().adapted_ratio)
    )


@pytest.mark.parametrize("factor", [0, -1.0, math.inf, math.nan])
def test_a_factor_that_is_none_is_refused(factor):
    with pytest.raises(ValueError, match=r"factor must be a positive number, got .*: 2 doubles every rate"):
        opened(made()).reweighted(factor)


def test_weights_of_a_mixtures_draws_agree_with_its_laws():
    posterior = opened(made("mixture", scope="encoder", rate=0.3, rank_rate=0.3), draws=8000)
    found = posterior.reweighted(1.2)
    drawn = posterior.data["posterior"]["bops_adapted"].values[0]
    error = math.sqrt(found.weights**2 @ (drawn - found.bops_adapted) ** 2)
    assert found.pareto_k < 0.7 and found.bops_adapted == pytest.approx(found.bops_exact, abs=4 * error)
    assert abs(found.bops_exact - float(posterior.expected_bops().adapted_ratio)) > 4 * error


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 2, "rank": 1}, {}], ids=str)
def test_a_rate_says_nothing_about_pinned_gates(settings):
    posterior = opened(made(prior="fixed", **settings))
    found = posterior.reweighted(3.0)
    assert np.allclose(found.weights, 1 / 20) and found.pareto_k == -math.inf
    assert found.bops_adapted == pytest.approx(found.bops_exact) == float(posterior.expected_bops().adapted_ratio)


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
@pytest.mark.parametrize("settings", [{}, {"g": "depth"}, {"z": "depth"}], ids=["both", "z", "g"])
def test_the_ratio_of_rates_is_joint_over_guide(settings, guide):
    """log p(rates) - log q(rates) - KL(gates at these rates), the densities and depths summed by hand."""
    program = made(guide, prior="hierarchical", scope="encoder", shape=2.0, **settings)
    with torch.no_grad():
        for name, parameter in program.prior.named_parameters():
            parameter.sub_(
                2.0 if name.endswith("log_sd") else 0.0
            )  # broad distributions have rates beyond float32's 1 - p
    found = rates(program, 50, seed=3)
    part = program.prior if not settings else program.prior.g if "z" in settings else program.prior.z
    names, sites = part.names, {"z", "g"} - set(settings)
    every = dict(zip(found.names, found.posterior.double().unbind(-1), strict=True))
    assert set(every) == {name for name in part.rate_names if ("g" if name.startswith("rank_") else "z") in sites}
    loc, sd = part.loc.detach().double(), part.log_sd.detach().double().exp()
    expected, q = torch.zeros(50, dtype=torch.float64), components(program.gate_guide)
    for name, rate in every.items():
        i = names.index(name)
        expected += rate.log() - rate  # Gamma(2, 1)
        expected += rate.log() + sd[i].log() + 0.5 * math.log(2 * math.pi) + ((rate.log() - loc[i]) / sd[i]) ** 2 / 2
    layout = program.layout
    for site, distribution, mask in zip("zg", q, (layout.z_mask, layout.g_mask), strict=True):
        for index in mask.nonzero().tolist() if site in sites else ():
            projection = layout.projections[index[0]]
            rate = every[layout.tensors[index[1]] if site == "z" else f"rank_{projection.type}"]
            K = distribution.log_probs.shape[-1]
            probs = distribution.depth_probs.detach().double()[(slice(None), *index)]  # (M, K + 1)
            depth = torch.arange(K + 1)
            stays = torch.where(depth < K, torch.log(-torch.expm1(-rate))[:, None], 0.0)
            prior = -rate[:, None] * depth + stays  # (S, K + 1)
            expected -= (probs * (probs.log() - prior[:, None])).sum(-1).mean(-1)
    assert torch.allclose(found.log_ratio.double(), expected, rtol=1e-4, atol=1e-3)


def test_random_rates_travel_with_a_ratio():
    program = made(prior="hierarchical")
    data = to_arviz(program, draw(program, 300))
    rates = data["posterior"]["rate"]
    assert rates.dims == ("chain", "draw", "law") and "rank_value" in rates["law"].values
    prior = data["prior"]["rate"].mean(("chain", "draw"))
    assert np.allclose(prior, 1.0, atol=4 / math.sqrt(300))  # Gamma(1, 1)
    ratio = data["sample_stats"]["log_ratio"].values[0]
    assert np.isfinite(ratio).all()
    weights, k = arviz_compat.pareto_weights(ratio)
    assert weights.sum() == pytest.approx(1) and math.isfinite(k)
    assert arviz_compat.pareto_weights(ratio[:20])[1] == math.inf


def test_a_file_is_read_whole_and_can_be_replaced(tmp_path):
    data = to_arviz(made(), draw(made(), 4))
    path = tmp_path / "posterior.nc"
    for _ in range(2):
        arviz_compat.save(data, path)
        data = arviz_compat.read(path)
    again = arviz_compat.read(tmp_path)
    for name in arviz_compat.group_names(data):
        assert arviz_compat.group(again, name).identical(arviz_compat.group(data, name))
    with pytest.raises(ValueError, match="do not fit together"):
        other = made(scope="encoder")
        arviz_compat.concatenate([data, to_arviz(other, draw(other, 4))], [0, 1])


def test_arviz_works_on_it_without_preparation():
    import arviz

    for scope in ("adapted", "encoder"):
        programs = [made(scope=scope, seed=seed) for seed in (0, 1)]
        data = arviz_compat.concatenate([to_arviz(p, draw(p, 30)) for p in programs], [0, 1])
        table = arviz.summary(data, var_names=["bits", "ranks"])
        assert "bits[1.value, lora_A]" in table.index and "ranks[0.key]" in table.index
        assert np.isfinite(float(arviz.rhat(data, var_names=["bops_adapted"])["bops_adapted"]))
        assert data["posterior"]["z"].sel(projection="1.value", tensor="base", rung=8).shape == (2, 30)
        assert list(data["constant_data"]["layer"].values[:2]) == [0, 0]
        arviz.plot_forest(data, var_names=["ranks"])


def test_the_denominators_are_those_of_bops():
    program = made()
    layout = program.layout
    ones = torch.ones(layout.z_shape), torch.ones(layout.g_shape)
    assert float(expected_bops(layout, *ones).adapted) == float(at_full_width(layout).adapted)
    assert float(expected_rank(ones[1])[0]) == layout.rank
    assert float(savings(layout, *ones).z.abs().sum()) == 0


def test_a_gate_that_the_data_hold_open_by_hundreds_of_nats_is_not_pinned():
    program = made()
    with torch.no_grad():
        program.gate_guide.z_evidence.fill_(150.0)
    posterior = opened(program)
    assert posterior.what_if("0.query.base.8", False).elbo_loss == pytest.approx(447.46, abs=0.05)
    table = posterior.gates()
    assert (table["forced"] != "never").all() and np.isfinite(table["elbo_loss"]).all()


def test_a_guide_of_one_allocation_is_not_taken_for_a_pin():
    posterior = opened(made("point"))
    line = posterior.gates().iloc[0]
    assert "nan" not in _shown(posterior.gates()).to_string()
    assert line["forced"] == "never" and bool(posterior.free().z.all())
    with pytest.raises(ValueError, match="its guide is a single allocation"):
        posterior.what_if(line["gate"], not line["deployed"])


def test_every_gate_is_forced_without_counting_everything_again(monkeypatch):
    """E[BOPs] is linear in the gates of one ladder: its slopes are computed once, however many gates there are."""
    posterior, calls = opened(made(scope="encoder", size=3), draws=2), []
    monkeypatch.setattr(forcing, "expected_bops", lambda *a: calls.append(1) or expected_bops(*a))
    table = posterior.gates()
    assert len(table) > 100 and len(calls) == 1
    posterior.what_if(table["gate"][0], not table["deployed"][0])
    assert len(calls) == 1
