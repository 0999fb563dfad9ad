"""What is read off a posterior.nc is what enumeration, draws and the program itself say."""

import itertools
import math

import numpy as np
import pytest
import torch
from models import tiny_bert

from pyro_blora import arviz_data
from pyro_blora.adapters import attach
from pyro_blora.bops import at_full_width, expected_bits, expected_bops, expected_rank, savings
from pyro_blora.diagnostics import Posterior
from pyro_blora.gates import NestedBernoulli
from pyro_blora.guides import build_guide
from pyro_blora.inference_data import to_arviz
from pyro_blora.posterior import bops, deployed, divergences, draw, marginals
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import get_task

pytestmark = pytest.mark.usefixtures("eager")


def made(guide="mean_field", prior="nested", scope="adapted", seed=0, **settings):
    """A program whose gates are neither sure nor even, untrained."""
    torch.manual_seed(seed)
    net = attach(tiny_bert(), rank=4, scope=scope, sequence_length=10)
    law = build_prior(prior, net.layout, settings)
    family = build_guide(guide, net.layout, law, {"components": 3} if guide == "mixture" else {})
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return BayesianLoRA(net, law, family, get_task("acceptability").likelihood, n_train=100)


def opened(program, draws=20):
    return Posterior(to_arviz(program, draw(program, draws)))


@pytest.mark.parametrize("scope", ["adapted", "encoder"])
@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
def test_the_file_says_what_the_program_says(guide, scope):
    program = made(guide, scope=scope)
    posterior = opened(program)
    for mine, theirs in zip(posterior.expected_bops(), bops(program), strict=True):
        assert float(mine) == pytest.approx(float(theirs), rel=1e-5)
    z, g = marginals(program)
    law = posterior.depth_probs()
    for probs, marginal, mask in zip(law, (z, g), posterior.masks, strict=True):
        at_least = probs.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        assert torch.allclose(at_least[mask].float(), marginal[mask], atol=1e-6)
    for mine, theirs, mask in zip(posterior.kl(), divergences(program), posterior.masks, strict=True):
        assert torch.allclose(mine[mask].float(), theirs[mask], atol=1e-5)
    table, mode = posterior.gates(), deployed(program)
    expected = int(posterior.masks.z.sum()) * 4 + int(posterior.masks.g.sum()) * 3
    assert len(table) == expected and table["gate"].is_unique
    assert table["deployed"].sum() == int(mode.z[posterior.masks.z].sum() + mode.g[posterior.masks.g].sum())


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
def test_savings_add_up_to_full_minus_expected(guide):
    program = made(guide, scope="encoder")
    posterior = opened(program)
    table = posterior.gates()
    adapted = [name for name, p in zip(posterior.projections, program.layout.projections, strict=True) if p.adapted]
    assert table["saving_model"].sum() == pytest.approx(1 - float(posterior.expected_bops().model_ratio), rel=1e-6)
    mine = table[table["projection"].isin(adapted)]["saving_adapted"].sum()
    assert mine == pytest.approx(1 - float(posterior.expected_bops().adapted_ratio), rel=1e-6)


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


def test_the_loss_of_a_forced_gate_is_that_of_the_elbo():
    """With evidence e the chain's part of the ELBO is E_q[e] - KL(q || p), at its best q before and after forcing."""
    posterior = opened(made(prior="depth"))
    q, p = posterior.log_q.z[0, 0, 2, 1], posterior.log_prior.z[0, 2, 1]
    evidence = q - p

    def elbo(law):
        alive = law > 0
        return float((law * evidence).sum() - (law[alive] * (law[alive].log() - p[alive])).sum())

    closed = torch.cat([q[:2].softmax(0), torch.zeros(3)]).double()
    found = posterior.what_if(f"{posterior.projections[2]}.base.8", False)
    assert found.elbo_loss == pytest.approx(elbo(q.exp()) - elbo(closed), rel=1e-5)
    assert found.nll_rise == pytest.approx(float(((q.exp() - closed) * evidence).sum()), rel=1e-5)


def test_what_cannot_be_forced_is_told():
    posterior = opened(made(prior="fixed", bits=8))
    with pytest.raises(ValueError, match=r"0\.query\.base\.16 is pinned by its prior: it cannot be open"):
        posterior.what_if("0.query.base.16", True)
    with pytest.raises(ValueError, match=r"no gate '0\.query\.base\.7'.*0\.query\.base\.8"):
        posterior.what_if("0.query.base.7", True)
    assert not any(bool(x.any()) for x in posterior.free())


def test_rhat_is_that_of_endless_draws():
    programs = [made(seed=seed) for seed in (0, 1, 2)]
    joined = Posterior(arviz_data.concatenate([to_arviz(p, draw(p, 5)) for p in programs], [0, 1, 2]))
    drawn = torch.stack([expected_bits(p.layout, draw(p, 40_000, seed=7).z) for p in programs])  # (C, S, L, T)
    within, between = drawn.var(1).mean(0), drawn.mean(1).var(0)
    assert torch.allclose(joined.rhat().z.float(), (1 + between / within).sqrt(), rtol=0.02)
    same = Posterior(arviz_data.concatenate([to_arviz(programs[0], draw(programs[0], 5))] * 2, [0, 1]))
    assert bool((same.rhat().z == 1).all())
    assert bool(opened(programs[0]).rhat().z.isnan().all())


def test_another_rate_is_the_nested_prior_at_that_rate():
    program = made(rate=0.4, rank_rate=0.4)
    posterior = opened(program, draws=4000)
    found = posterior.reweighted(1.3)
    laws = []
    for log_q, log_p in zip(posterior.log_q, posterior.log_prior, strict=True):
        rates = torch.full((*log_q.shape[2:-1], log_q.shape[-1] - 1), 1.3 * 0.4, dtype=torch.float64)
        laws.append((log_q[0, 0] - log_p[0] + NestedBernoulli.from_rate(rates).depth_log_probs).softmax(-1))
    z, g = (law.flip(-1).cumsum(-1).flip(-1)[..., 1:] for law in laws)
    assert found.bops_exact == pytest.approx(float(expected_bops(program.layout, z, g).adapted_ratio), rel=1e-6)
    drawn = posterior.data["posterior"]["bops_adapted"].values[0]
    error = math.sqrt(found.weights**2 @ (drawn - found.bops_adapted) ** 2)
    assert found.bops_adapted == pytest.approx(found.bops_exact, abs=4 * error)
    same = posterior.reweighted(1.0)
    assert np.allclose(same.weights, 1 / 4000) and same.bops_exact == pytest.approx(
        float(posterior.expected_bops().adapted_ratio)
    )
    with pytest.raises(ValueError, match="2 doubles every rate"):
        posterior.reweighted(0)


def test_random_rates_travel_with_a_ratio():
    program = made(prior="hierarchical")
    data = to_arviz(program, draw(program, 300))
    rates = data["posterior"]["rate"]
    assert rates.dims == ("chain", "draw", "law") and "rank_value" in rates["law"].values
    prior = data["prior"]["rate"].mean(("chain", "draw"))
    assert np.allclose(prior, 1.0, atol=4 / math.sqrt(300))  # Gamma(1, 1)
    ratio = data["sample_stats"]["log_ratio"].values[0]
    assert np.isfinite(ratio).all()
    weights, k = arviz_data.pareto_weights(ratio)
    assert weights.sum() == pytest.approx(1) and math.isfinite(k)
    assert arviz_data.pareto_weights(ratio[:20])[1] == math.inf


def test_a_file_is_read_whole_and_can_be_replaced(tmp_path):
    data = to_arviz(made(), draw(made(), 4))
    path = tmp_path / "posterior.nc"
    for _ in range(2):
        arviz_data.save(data, path)
        data = arviz_data.read(path)
    again = arviz_data.read(tmp_path)
    for name in arviz_data.group_names(data):
        assert arviz_data.group(again, name).identical(arviz_data.group(data, name))
    with pytest.raises(ValueError, match="do not fit together"):
        other = made(scope="encoder")
        arviz_data.concatenate([data, to_arviz(other, draw(other, 4))], [0, 1])


def test_arviz_works_on_it_without_preparation():
    import arviz

    for scope in ("adapted", "encoder"):
        programs = [made(scope=scope, seed=seed) for seed in (0, 1)]
        data = arviz_data.concatenate([to_arviz(p, draw(p, 30)) for p in programs], [0, 1])
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
